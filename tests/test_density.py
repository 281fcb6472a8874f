"""The density of attention as table, picture and command; gradients of softmax against JAX's and numpy's."""
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random, refusal, timm_shapes
from PIL import Image
from scipy.special import softmax

from cb_vit.analysis import softmax_gradient as gradient
from cb_vit.analysis.attention_measures import Density
from cb_vit.analysis.density import Row, as_csv, draw_density, number_of_keys, pick, read_density
from cb_vit.analysis.density_sums import DensitySums
from cb_vit.analysis.softmax_gradient import draw_gradient, families
from cb_vit.config import Failure
from cb_vit.prediction import Prediction
from cb_vit.tools import cli
from cb_vit.tools import density as tool
from cb_vit.weights.containers import write_safetensors


def rows(n=10, heads=2, blocks=3, value=0.5):
    """Rows as of a model with n tokens."""
    measures = {"entropy": np.log(n) * value, "entropy_normalised": value, "jacobian": 0.01, "effective_tokens": 3.0}
    found = [Row(block, head, "all", "all", name, mean + block / 100 * (name == "jacobian"), 0.1, *[mean] * 5)
             for block in range(blocks) for name, mean in measures.items() for head in [*map(str, range(heads)), "all"]]
    return [*found, Row(0, "all", "patches", "patches", "attention_distance", 12.5, 0, *[12.5] * 5),
            Row(0, "all", "prefix", "patches", "rank", *[float("nan")] * 7)]


# The table.


def test_a_table_is_read_as_it_was_written():
    found = read_density(as_csv(rows()))
    assert as_csv(found) == as_csv(rows()) and len(found) == len(rows())
    assert found[-1][:5] == rows()[-1][:5] and np.isnan(found[-1][5:]).all()
    np.testing.assert_allclose([row[5:] for row in found[:-1]], [row[5:] for row in rows()[:-1]], rtol=1e-6)
    assert as_csv(found).splitlines()[0] == "block,head,queries,keys,measure,mean,std,q05,q25,q50,q75,q95"


@pytest.mark.parametrize("change", [
    lambda text: "", lambda text: text.replace("block,", "blocks,"), lambda text: text + "0,all\n",
    lambda text: text + "x,all" + ",a" * 3 + ",1" * 7, lambda text: text + "-1,all" + ",a" * 3 + ",1" * 7,
    lambda text: text + "0,every" + ",a" * 3 + ",1" * 7, lambda text: text + "0,all" + ",a" * 3 + ",inf" * 7,
    lambda text: text + "0,all" + ",a" * 3 + ",1e300" * 7, lambda text: text + "0,all" + ",a" * 3 + ",1" * 8,
    lambda text: text + '"', lambda text: "\x89PNG\0"])
def test_what_is_no_table_is_refused(change):
    with pytest.raises(ValueError, match=r"^is no density\.csv \(line \d+: "):
        read_density(change(as_csv(rows())))


def test_rows_are_picked_and_tell_how_many_tokens_there_are():
    assert [row.block for row in pick(rows(), "entropy")] == [0, 1, 2]
    assert [row.head for row in pick(rows(), "entropy", heads=True)] == ["0", "1"] * 3
    assert len(pick(rows(), "attention_distance")) == 1 and not pick(rows(), "rank", queries="prefix", keys="patches")
    for n in (2, 197, 1370, 16_385):
        assert number_of_keys(read_density(as_csv(rows(n)))) == n
    assert number_of_keys(rows(value=0.0)) is None and number_of_keys([]) is None


# Pictures.


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


def test_pictures_show_each_model():
    runs = {"none": rows(), "CB $x$": rows(17, value=0.3), "\x1b[31m": rows(value=0.2)}
    blue, orange, green = ([0x1f, 0x6f, 0xb4], [0xd1, 0x60, 0x3d], [0x2a, 0x9d, 0x6f])
    for picture in map(pixels, (draw_density(runs, "a $title$"), draw_gradient(runs))):
        assert all((np.abs(picture - colour).max(-1) < 48).sum() > 15 for colour in (blue, orange, green))


def test_there_is_always_something_to_draw():
    for png in (draw_density({"empty": []}), draw_gradient({})):
        assert pixels(png).std() > 1


# Gradients of softmax.


def some(n=7):
    z = np.random.default_rng(0).normal(size=(20, n)) * np.geomspace(0.01, 20, 20)[:, None]
    return z, softmax(z, -1)


def test_norms_of_gradients_are_those_of_jax_and_numpy():
    z, p = some()
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacobian(jax.nn.softmax)))(jnp.asarray(z, jnp.float32)))
    np.testing.assert_allclose(gradient.jacobian_norm(p), np.linalg.norm(jacobians, axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(gradient.relative_jacobian_norm(p) * np.linalg.norm(p, axis=1),
                               np.linalg.norm(jacobians, axis=(1, 2)), atol=1e-5)
    low, high = gradient.spectral_bounds(p)
    norms = np.linalg.norm(jacobians, 2, axis=(1, 2))
    assert (low <= norms + 1e-6).all() and (norms <= high + 1e-6).all()
    entropy = lambda z: -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z))  # noqa: E731
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(entropy)))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(gradient.entropy(p), values, atol=1e-5)
    np.testing.assert_allclose(gradient.entropy_gradient_norm(p), np.linalg.norm(gradients, axis=1), atol=1e-5)


def test_closed_forms_that_the_page_derives():
    _, p = some()
    square = (p**2).sum(1)
    assert (gradient.jacobian_norm(p) ** 2 <= square * (1 - square) + 1e-12).all()  # at most 1/4
    m = np.arange(1, 8)
    uniform = families(7)["uniform over m of N keys"]
    np.testing.assert_allclose(gradient.jacobian_norm(uniform) ** 2, (1 - 1 / m) / m, atol=1e-12)
    np.testing.assert_allclose(gradient.relative_jacobian_norm(uniform), np.sqrt(1 - 1 / m), atol=1e-12)
    np.testing.assert_allclose(gradient.entropy(uniform), np.log(m), atol=1e-12)
    np.testing.assert_allclose(gradient.entropy_gradient_norm(uniform), 0, atol=1e-12)
    near = softmax(1e-5 * some()[0][-1:], -1)  # ‖∂H/∂z‖² is 2/N of what the entropy lacks
    np.testing.assert_allclose(gradient.entropy_gradient_norm(near) ** 2,
                               2 / 7 * (np.log(7) - gradient.entropy(near)), rtol=1e-3)


def test_families_go_from_uniform_to_one_hot():
    for name, p in families(50).items():
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12, err_msg=name)
        ends = sorted(gradient.entropy(p[[0, -1]]))
        np.testing.assert_allclose(ends, [0, np.log(50)], atol=1e-3, err_msg=name)


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, one without a head, and three photographs, one of which is broken."""
    folder, rng = tmp_path_factory.mktemp("density"), np.random.default_rng(0)
    write_safetensors(folder / "a.safetensors", random(timm_shapes()), {})
    headless = {name: leaf for name, leaf in random(timm_shapes(depth=1), 1).items() if not name.startswith("head.")}
    write_safetensors(folder / "b.safetensors", headless, {})
    (folder / "photos").mkdir()
    for name in ("1.png", "3.png"):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(folder / "photos" / name)
    (folder / "photos" / "2.jpg").write_bytes(b"\xff\xd8\xff not a JPEG")
    return folder


def arguments(folder, *more, weights=("a", "b"), images="photos", output="out"):
    return [f"{folder}/{images}", *(f"--weights={folder}/{name}.safetensors" for name in weights),
            "--model=num_heads=4", "--model=gelu=erf", "--pp=resize(12)|value_range(-1, 1)",
            f"--output={folder}/{output}", *more]


def run(*args):
    tool.main(cli.parse(tool, args))


def test_the_command(folder, capsys):
    with pytest.raises(Failure, match="^1 of 3 images could not be read$"):
        run(*arguments(folder, "--batch_size=2"))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "block", "block", "b", "block", "wrote"]
    assert err.count("photos/2.jpg: decode") == 2
    found = {}
    for name in "ab":
        found[name] = read_density((folder / "out" / name / "density.csv").read_text())
        assert number_of_keys(found[name]) == 10 and len(pick(found[name], "rank", heads=True)) == 4 * len(
            pick(found[name], "rank"))
        first = [row for row in found[name] if row[:5] == (0, "all", "all", "all", "entropy_normalised")]
        assert f"{first[0].mean:.3f}" in lines[1 + 3 * (name == "b")]
    assert found["a"] != found["b"]
    for name in ("density.png", "softmax_gradient.png"):
        assert Image.open(folder / "out" / name).format == "PNG"

    assert refusal(tool, *arguments(folder)).endswith("a/density.csv is already there; choose another folder, or give "
                                                      "--overwrite")
    tool.check_outputs(tool.Options(output=str(folder / "out"), overwrite=True), ["a", "b"], ["photos/1.png"])


def test_images_are_spread_evenly():
    assert tool.spread_evenly("abcdefghij", 3) == ["a", "d", "g"]
    assert tool.spread_evenly("abc", None) == tool.spread_evenly("abc", 9) == ["a", "b", "c"]


@pytest.mark.parametrize("more, settings, message", [
    ([], dict(weights=()), "--weights: not given; for example --weights=runs/digits"),
    ([], dict(output=""), "--output: "),
    ([], dict(output="a.safetensors"), r"a.safetensors is a file; give a folder"),
    ([], dict(weights="aa"), "a.safetensors is given twice; give it once, or tell them apart by --labels"),
    (["--labels=x"], {}, "--labels: 'x' has to be 2 names, divided by commas: one for each --weights"),
    (["--labels=x,"], {}, "--labels: 'x,' has to be 2 names"),
    (["--labels=x/y,x:y"], {}, "--labels: what is called 'x/y' would lie in x_y/, where something else is written"),
    (["--labels=x,density.png"], {}, "--labels: what is called 'density.png' would lie in density.png/"),
    ([], dict(images="none"), "none does not exist; give images, or folders of them"),
    ([], dict(weights="c"), "c.safetensors does not exist"),
    (["--images=0"], {}, "--images: expected a whole number of at least 1"),
    (["--top_k=0"], {}, "--top_k: expected a whole number of at least 1"),
    (["--pp=resize(12)"], {}, "--pp: "), (["--pp=resize(13)|value_range"], {}, "makes images of 13×13"),
    ([], dict(images="photos/2.jpg", weights="b"), "not one of 1 images could be read")])
def test_what_cannot_work_is_refused(more, settings, message, folder, tmp_path):
    arguments_ = arguments(folder, *more, **{"output": tmp_path.name} | settings)
    assert message in refusal(tool, *(arguments_ if settings.get("output") != "" else arguments_[:-1]))


def test_no_image_is_replaced(folder, tmp_path):
    Image.fromarray(np.zeros((20, 16, 3), np.uint8)).save(tmp_path / "density.png")
    args = arguments(folder, "--overwrite")
    assert "density.png is one of the images; choose another folder" in refusal(
        tool, str(tmp_path), *args[1:-2], f"--output={tmp_path}", "--overwrite")


def test_attention_that_is_not_finite():
    sums, batch = DensitySums(Density((1, 2), (4, 4), 0, 5)), [Prediction("1.png", error="broken"), Prediction("2.png")]
    values = np.full((2, 1, 1, 29), np.nan)
    with pytest.raises(Failure, match=r"^2\.png: the model's attention is not finite; are these weights whole\?$"):
        tool._add(sums, batch, values)
    values[1] = 0.5
    tool._add(sums, batch, values)
    assert sums.images == 1
