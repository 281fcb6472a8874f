"""docs/dinov2_from_onnx.py on a graph of a few nodes, as PyTorch's exporter names and orders them."""
import importlib.util

import numpy as np
import pytest
from helpers import ROOT

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

LAYER, D, F, P = "backbone.encoder.layer.0.", 6, 24, 2


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("dinov2_from_onnx", ROOT / "docs" / "dinov2_from_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph(product="MatMul"):
    """Two matrices, a norm, and positions that are resized; all random. Also what must be found of each."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {
        "backbone.embeddings.patch_embeddings.projection.weight": draw(D, 3, P, P),
        "backbone.embeddings.patch_embeddings.projection.bias": draw(D), f"{LAYER}norm1.weight": draw(D),
        f"{LAYER}norm1.bias": draw(D), f"{LAYER}mlp.fc1.bias": draw(F), f"{LAYER}mlp.fc2.bias": draw(D),
        f"{LAYER}layer_scale1.lambda1": draw(D), "decoder.final_conv.bias": draw(1), "onnx::MatMul_1": draw(D, F),
        "onnx::MatMul_2": draw(F, D), "onnx::Concat_3": draw(1, 1, D), "onnx::Reshape_4": draw(1, 9, D)}
    constant = lambda name, value: helper.make_node(  # noqa: E731
        "Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))
    nodes = [
        constant("/backbone/encoder/layer.0/attention/attention/Constant_2_output_0", np.int64([3])),
        constant("/backbone/encoder/layer.0/norm1/Constant_1_output_0", np.float32(1e-6)),
        helper.make_node(product, ["x", "onnx::MatMul_1"], ["a"]),
        helper.make_node("Add", [f"{LAYER}mlp.fc1.bias", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"]),
        helper.make_node("Add", ["c", f"{LAYER}mlp.fc2.bias"], ["d"]),
        helper.make_node("Reshape", ["onnx::Reshape_4", "shape"], ["e"]),
        helper.make_node("Resize", ["e", "", "", "sizes"], ["f"]),
        helper.make_node("Concat", ["onnx::Concat_3", "f"], ["g"], axis=1),
        helper.make_node("Add", ["x", "g"], ["/backbone/embeddings/Add_output_0"])]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), arrays


def test_matrices_are_found_by_their_biases(script):
    model, arrays = graph()
    found = script.convert(script.Graph(model))
    fc1, fc2 = (found[f"encoder.layer.0.mlp.fc{i}.weight"] for i in (1, 2))
    np.testing.assert_array_equal(fc1, arrays["onnx::MatMul_1"].T)
    np.testing.assert_array_equal(fc2, arrays["onnx::MatMul_2"].T)
    whole = found["embeddings.position_embeddings"]
    np.testing.assert_array_equal(whole, np.concatenate([arrays["onnx::Concat_3"], arrays["onnx::Reshape_4"]], axis=1))
    named = {name.removeprefix("backbone.") for name in arrays if name.startswith("backbone.")}
    assert found.keys() == named | {"encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.fc2.weight",
                                    "embeddings.position_embeddings"}


def test_sizes_are_those_of_the_graph(script):
    model, _ = graph()
    card = script.cards(script.Graph(model), script.convert(script.Graph(model)))["config.json"]
    assert card["num_attention_heads"] == 3 and card["layer_norm_eps"] == 1e-6 and card["mlp_ratio"] == 4
    assert (card["hidden_size"], card["num_hidden_layers"], card["patch_size"], card["image_size"]) == (D, 1, P, 3 * P)


def test_another_graph_is_no_silent_mistake(script):
    with pytest.raises(AssertionError, match=r"mlp.fc1.bias is added to Conv, not to a product"):
        script.convert(script.Graph(graph("Conv")[0]))
