"""Prediction: equal to the model by hand, whatever the batch; what is printed, drawn and refused."""
import contextlib
import dataclasses
import io
import json
import os
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal
from helpers import tool as run_tool
from PIL import Image

from cb_vit import Model
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError, Failure
from cb_vit.pp.normalisation import IMAGENET
from cb_vit.prediction import Predictor, ahead, preprocessing
from cb_vit.tools import attention_folder
from cb_vit.tools import predict as tool
from cb_vit.tools.attention_folder import AttentionFolder
from cb_vit.tools.predict import Options, find_images, pick_layers, read_names
from cb_vit.train_state import TrainState
from cb_vit.weights import open_weights
from cb_vit.weights.containers import write_safetensors
from cb_vit.weights.dialects.conversion import describe
from cb_vit.weights.dialects.timm import to_timm

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
MEAN, STD = np.array(IMAGENET)


def save_weights(path, num_classes=7, normalisation=IMAGENET, **changes):
    """A file of random weights, with a head that tells images apart; the model and its parameters."""
    model = Model(num_classes, **{**dict(patch_size=4, width=16, depth=2, mlp_dim=16, num_heads=2, pool_type="tok",
                                         init="deit"), **changes})
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf, params)
    write_safetensors(path, to_timm(params, model.config), describe(model.config, normalisation))
    return model, params


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    return open_weights(path, "path") if save_weights(path) else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes and modes in several folders, and one that is broken."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / "aa").mkdir()
    for name, shape in (("a.png", (40, 30, 3)), ("b/10.JPG", (25, 60, 3)), ("b/9.webp", (18, 18, 3)),
                        ("aa/z.png", (20, 20, 4)), ("b/deep/x.bmp", (50, 50)), ("c.jpeg", (33, 20))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    (folder / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a JPEG")
    (folder / "b" / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


ORDER = ["a.png", "c.jpeg", "aa/z.png", "b/10.JPG", "b/9.webp", "b/broken.jpg", "b/deep/x.bmp"]


# Files and names.


def test_a_folder_is_read_in_order_and_each_file_once(folder):
    assert find_images([str(folder)]) == [f"{folder}/{name}" for name in ORDER]
    notes = f"{folder}/b/notes.txt"  # named by the user, whatever its name
    assert find_images([notes, f"{folder}/c.jpeg", str(folder)]) == [notes, f"{folder}/c.jpeg"] + [
        f"{folder}/{name}" for name in ORDER if name != "c.jpeg"]


def test_no_images(tmp_path):
    with pytest.raises(ConfigError, match=r"^arguments: no images in .*; they end in \.jpg, \.jpeg, .*, \.bmp$"):
        find_images([str(tmp_path)])
    with pytest.raises(ConfigError, match="^arguments: /no/such does not exist; give images, or folders of them$"):
        find_images([str(tmp_path), "/no/such"])


@pytest.mark.parametrize("text", [
    "ant\nbee, or wasp \ncat\n", '["ant", "bee, or wasp", "cat"]', '{"2": "cat", "0": "ant", "1": "bee, or wasp"}',
    '{"bee, or wasp": 1, "cat": 2, "ant": 0}',
    '\n{"0": ["n1", "ant"], "1": ["n2", "bee, or wasp"], "2": ["n3", "cat"]}'])
def test_names_of_classes(text, tmp_path):
    (tmp_path / "names").write_text(text)
    assert read_names(str(tmp_path / "names"), 3) == ["ant", "bee, or wasp", "cat"]


@pytest.mark.parametrize("text, error", [
    ("ant\nbee\n", "has 2 names, the model 3 classes$"),
    ('{"0": "ant", "1": "bee", "3": "cat"}', "holds neither one name a line nor JSON of names"),
    ('["ant", "bee", 3]', "holds neither .*an entry is no text"), ('["ant", ', "holds neither"),
    (b"\xff\xfe\x00", "holds neither"), (None, "No such file or directory$")])
def test_names_that_do_not_fit(text, error, tmp_path):
    path = tmp_path / "names"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"^--classes: {path}.*{error}"):
        read_names(str(path), 3)


def test_layers():
    assert (pick_layers("last", 4), pick_layers("all", 3), pick_layers("2, 0,2", 4)) == ((3,), (0, 1, 2), (2, 0))
    for text in ("4", "-1", "first", "1,,2", ""):
        with pytest.raises(ConfigError, match="^--layers: expected last, all, or numbers from 0 to 3 divided by"):
            pick_layers(text, 4)


def test_work_is_done_ahead_in_order_and_not_too_far():
    begun, gate, lock = [], threading.Event(), threading.Lock()

    def work(item):
        with lock:
            begun.append(item)
        gate.wait(10)
        return -item

    found = ahead(work, range(100), 4, 5)
    gate.set()
    assert [next(found) for _ in range(3)] == [0, -1, -2]
    assert set(begun) <= set(range(8))  # 2, which was asked for last, and five more
    found.close()
    assert list(ahead(work, range(20), 4, 5)) == [-item for item in range(20)]


# What the model says.


def by_hand(model, params, files):
    """Probabilities of each file, one at a time: the resizing of DeiT's evaluation and the model itself."""
    found, apply = [], jax.jit(model.apply)
    for file in files:
        image = Image.open(file).convert("RGB")
        width, height = image.size
        size = (18, int(18 * height / width)) if width < height else (int(18 * width / height), 18)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - 16) / 2), round((size[1] - 16) / 2)
        pixels = (np.asarray(image.crop((left, top, left + 16, top + 16)), np.float32) / 255 - MEAN) / STD
        logits, _ = apply({"params": params}, jnp.asarray(pixels[None], jnp.float32))
        found.append(np.asarray(jax.nn.softmax(logits[0])))
    return np.array(found)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_probabilities_are_those_of_the_model_by_hand(batch_size, deit, folder, tmp_path):
    model, params = save_weights(tmp_path / "w.safetensors")
    files = find_images([str(folder)])
    predictor = Predictor(deit, preprocessing(deit), top=7)
    found = list(predictor(files, batch_size))
    assert [one.path for one in found] == files
    assert [one.path for one in found if one.error] == [f"{folder}/b/broken.jpg"]
    found = [one for one in found if not one.error]
    expected = by_hand(model, params, [one.path for one in found])
    for one, probabilities in zip(found, expected, strict=True):
        assert one.classes == tuple(np.argsort(-probabilities))
        np.testing.assert_allclose(one.probabilities, np.sort(probabilities)[::-1], rtol=2e-4, atol=1e-6)
    assert len({one.classes for one in found}) > 1  # it tells them apart, or this would show little
    assert predictor._apply._cache_size() == 1  # the last batch is of the same size


def test_context_changes_what_a_file_says(deit, folder):
    with_context = open_weights(deit.path, "path", context="cb")
    a, b = (next(iter(Predictor(w, preprocessing(w))([f"{folder}/a.png"], 1))) for w in (deit, with_context))
    assert abs(a.probabilities[0] - b.probabilities[0]) > 1e-3


def test_output_that_is_not_finite(deit, folder):
    broken = dataclasses.replace(deit, fetch=lambda like: jax.tree.map(lambda leaf: leaf * np.nan, deit.fetch(like)))
    with pytest.raises(Failure, match=r"a\.png: the model's output is not finite; are these weights whole\?$"):
        list(Predictor(broken, preprocessing(broken))([f"{folder}/a.png"], 1))


# Preprocessing.

IMAGENET_RANGE = "vgg_value_range((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))"


@pytest.mark.parametrize("given, done", [
    (None, f"decode|resize_small(18, 'bicubic')|central_crop((16, 16))|{IMAGENET_RANGE}"),
    ("resize(16)", f"decode(3)|resize(16)|{IMAGENET_RANGE}"),
    ("decode(exif=True)|resize(16)|value_range(-1, 1)", "decode(exif=True)|resize(16)|value_range(-1, 1)"),
    ("decode|resize(16)|value_range|onehot(7)|keep('image', 'labels')", "decode|resize(16)|value_range"),
    ("", f"decode(3)|{IMAGENET_RANGE}")])
def test_preprocessing_in_place_of_the_models(given, done, deit):
    assert preprocessing(deit, given).text == done


def test_what_is_not_known_of_the_images(deit):
    unknown = dataclasses.replace(deit, normalisation=None, pp=None)
    for pp in (None, "resize(16)"):
        with pytest.raises(ConfigError, match="^--pp: .* does not say how its pixels were normalised; end --pp in "):
            preprocessing(unknown, pp)
    assert preprocessing(unknown, "resize(16)|value_range(-1, 1)").text == "decode(3)|resize(16)|value_range(-1, 1)"
    with pytest.raises(ConfigError, match=r"^--pp: .* does not say what is done to its images; give --pp='decode\|"):
        preprocessing(dataclasses.replace(deit, pp=None))
    any_size = dataclasses.replace(deit, grid=None)
    with pytest.raises(ConfigError, match=r"^--pp: 'decode\(3\).*' leaves the size of the images open, and "):
        Predictor(any_size, preprocessing(any_size, ""))


@pytest.mark.parametrize("pp, error", [
    ("resize(24)", r"makes images of 24×24 with 3 channels; .*deit\.safetensors takes 16×16 with 3$"),
    ("resize(18)", "makes images of 18×18"), ("decode(1)|resize(16)|value_range", "with 1 channels; .* 16×16 with 3$"),
    ("resze(16)", r"unknown preprocessing op 'resze'; did you mean resize\?"), ("resize(", r"cannot read 'resize\('")])
def test_preprocessing_that_does_not_fit(pp, error, deit):
    with pytest.raises(ConfigError, match=f"^--pp: .*{error}"):
        Predictor(deit, preprocessing(deit, pp))


def test_fixed_positions_take_every_size_that_the_patch_divides(deit, folder):
    model = Model(7, patch_size=4, width=16, depth=1, mlp_dim=16, num_heads=2, posemb="sincos2d")
    weights = dataclasses.replace(
        deit, model=model, fetch=lambda like: jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    found = list(Predictor(weights, preprocessing(weights, "resize((24, 20))"))([f"{folder}/a.png"], 1))
    assert found[0].image.shape == (24, 20, 3)
    with pytest.raises(ConfigError, match="takes multiples of 4×4 with 3$"):
        Predictor(weights, preprocessing(weights, "resize(18)"))


def test_an_image_of_another_size_says_how_to_resize(deit, folder):
    found = list(Predictor(deit, preprocessing(deit, "value_range(-1, 1)"))([f"{folder}/b/9.webp"], 1))
    assert found[0].error == ("18×18 pixels, where the model takes 16×16; to resize, give "
                              "--pp='decode(3)|resize((16, 16))|value_range(-1, 1)'")


def test_models_that_do_not_classify(tmp_path):
    save_weights(tmp_path / "w.safetensors", num_classes=None)
    weights = open_weights(tmp_path / "w.safetensors", "path")
    with pytest.raises(ConfigError, match=r"^--weights: .*w\.safetensors has no head, so it has no classes; fine-tune"):
        Predictor(weights, preprocessing(weights))


# What is printed and drawn.


def test_a_table(deit, folder, capsys):
    weights, files = dataclasses.replace(deit, class_names=NAMES), [f"{folder}/a.png", f"{folder}/b/deep/x.bmp"]
    tool.predict(files, weights, Options(top=2))
    out, err = capsys.readouterr()
    expected = []
    for one in Predictor(deit, preprocessing(deit), top=2)(files, 2):
        expected += [f"{path:<{len(files[1])}}  {100 * p:6.2f} %  {NAMES[c]}"
                     for path, c, p in zip((one.path, ""), one.classes, one.probabilities, strict=True)]
    assert out.splitlines() == expected
    assert err.splitlines() == [f"{deit.path}: timm, 7 classes", *deit.notes, f"images: {deit.pp}"]


def test_json_and_a_broken_image(deit, folder, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    files = find_images([str(folder)])
    for classes in (None, str(tmp_path / "names.txt")):
        with pytest.raises(Failure, match="^1 of 7 images could not be read$"):
            tool.predict(files, deit, Options(top=100, format="json", batch_size=4, classes=classes))
        out, err = capsys.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["path"] for line in lines] == [file for file in files if "broken" not in file]
        assert err.splitlines()[-1].startswith(f"{folder}/b/broken.jpg: decode: cannot decode 14 bytes")
        for line in lines:
            assert sorted(entry["class"] for entry in line["top"]) == list(range(7))
            assert sum(entry["probability"] for entry in line["top"]) == pytest.approx(1, abs=1e-5)
            assert all(entry["name"] == (NAMES[entry["class"]] if classes else None) for entry in line["top"])


def test_long_runs_say_how_far_they_are(deit, folder, capsys, monkeypatch):
    monkeypatch.setattr(tool, "QUIET", 0.0)
    tool.predict([f"{folder}/{name}" for name in ORDER if "broken" not in name], deit, Options(batch_size=2))
    first, second = [line for line in capsys.readouterr().err.splitlines() if " of 6 images" in line]
    assert first == "2 of 6 images"  # it compiled: no speed, and no "ETA 0:00:00"
    assert re.fullmatch(r"4 of 6 images \| [1-9][\d.]* img/s \| ETA 0:\d\d:\d\d", second)


def test_pictures_of_the_attention(deit, folder, tmp_path):
    looks, files = tmp_path / "looks", [f"{folder}/a.png", f"{folder}/b/9.webp"]
    options = Options(attention=str(looks), layers="all", rollout=True, top=1)
    tool.predict(files, deit, options)
    assert sorted(str(path.relative_to(looks)) for path in looks.rglob("*.*")) == ["a.png", "b/9.png", "index.png"]
    with Image.open(looks / "a.png") as picture:
        assert picture.size == pytest.approx((120 * (0.15 + 4 * 2.02 + 0.75), 120 * (0.98 + 1.9 + 0.15)), abs=1)

    with Image.open(looks / "index.png") as picture:  # two pairs of 320 by 160
        assert picture.size[0] > 320 and picture.size[1] > 160

    (looks / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"^--attention: .*b/9\.png is already there; choose another fo"):
        tool.predict(files, deit, options)
    assert not (looks / "a.png").exists()
    tool.predict(files, deit, dataclasses.replace(options, overwrite=True, layers="last"))
    with Image.open(looks / "b" / "9.png") as picture:  # input, rollout, mean and two heads
        assert picture.size[0] == pytest.approx(120 * (0.15 + 5 * 2.02 + 0.75), abs=1)


def test_the_true_label_is_that_of_the_folder_if_it_is_a_class(deit, tmp_path, monkeypatch):
    pixels, titles, sheets = Image.fromarray(np.zeros((20, 20, 3), np.uint8)), [], []
    for folder in ("cat", "zoo"):
        (tmp_path / folder).mkdir()
        pixels.save(tmp_path / folder / "index.jpg")
    monkeypatch.setattr(attention_folder, "draw_maps", lambda image, maps, title, *_: titles.append(title) or b"")
    monkeypatch.setattr(attention_folder, "draw_index", lambda *args: sheets.append(args) or b"")
    weights = dataclasses.replace(deit, class_names=NAMES)
    files = find_images([f"{tmp_path}/cat", f"{tmp_path}/zoo"])
    tool.predict(files, weights, Options(attention=str(tmp_path / "looks"), top=1))
    assert re.fullmatch(r"[a-z]{3}   [\d.]+%   \(true label: cat\)", titles[0]) and "true" not in titles[1]
    (_, maps, captions, title, what), = sheets
    assert [line.text for line in captions[0]][1:] == ["true label: cat", "index.jpg"]
    assert [line.text for line in captions[1]][1:] == ["index.jpg"] and maps[0].shape == (4, 4)
    assert title == "Where the model looks: 2 of 2 images" and what.startswith("block 1, mean of heads, ")


def test_the_index_takes_no_images_place(deit, tmp_path):
    for name in ("index.jpg", "b.jpg"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / name)
    files = find_images([str(tmp_path)])
    pictures = AttentionFolder(str(tmp_path / "looks"), files, overwrite=False).pictures
    names = {os.path.basename(name) for name in pictures.values()}
    assert names == {"b.png", "index.jpg.png"}
    (tmp_path / "looks").mkdir()
    (tmp_path / "looks" / "index.png").touch()
    with pytest.raises(ConfigError, match=r"^--attention: .*index\.png is already there; choose another folder"):
        AttentionFolder(str(tmp_path / "looks"), files, overwrite=False)


@pytest.mark.parametrize("options", [dict(layers="all"), dict(rollout=True), dict(overwrite=True)])
def test_options_about_pictures_that_are_not_made(options, deit, folder):
    with pytest.raises(ConfigError, match="^--attention: not given, and --layers, --rollout and --overwrite "):
        tool.predict([f"{folder}/a.png"], deit, Options(**options))


def test_a_folder_for_pictures_that_cannot_be_made(deit, folder):
    with pytest.raises(Failure, match=r"a\.png cannot be written: Not a directory; something else is in its"):
        tool.predict([f"{folder}/a.png"], deit, Options(attention=f"{folder}/c.jpeg/looks"))


# As a user runs it.


def save_run(folder, weights):
    """What training leaves of such a model that prediction needs."""
    pp = "decode|resize(16)|vgg_value_range|onehot(7)|keep('image', 'labels')"
    with contextlib.closing(Checkpointer(folder / "checkpoints")) as checkpointer:
        checkpointer.save(TrainState(jnp.int32(1), weights.read(), (), jnp.bool_(True)), {})
    (folder / "run.json").write_text(json.dumps(dict(
        model_name="vit", model=dataclasses.asdict(weights.model.config), num_classes=7, class_names=NAMES,
        image_shape=(16, 16, 3), pp=pp, pp_evals={"val": pp})))


def test_a_run_of_this_project(deit, folder, tmp_path):
    save_run(tmp_path / "run", deit)
    args = [f"--weights={tmp_path}/run", "--format=json", "--top=3", f"--attention={tmp_path}/looks"]
    code, out, err = run_tool("predict", f"{folder}/a.png", f"{folder}/b/broken.jpg", f"{folder}/c.jpeg", *args)
    assert code == 1 and err.splitlines()[-1] == "error: 1 of 3 images could not be read"
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [f"{folder}/a.png", f"{folder}/c.jpeg"]
    assert Image.open(io.BytesIO((tmp_path / "looks" / "c.png").read_bytes())).format == "PNG"
    expected = next(iter(Predictor(deit, preprocessing(deit, "resize(16)"), 3)([f"{folder}/a.png"], 1)))
    assert [(entry["class"], entry["name"]) for entry in lines[0]["top"]] == [(c, NAMES[c]) for c in expected.classes]


@pytest.mark.parametrize("args, error", [
    (["images"], "--weights: not given; for example --weights=runs/digits"),
    ([], "IMAGE: not given; --help says more"),
    (["images", "--top=0"], "--top: expected a whole number of at least 1, got '0'; --help says more")])
def test_a_command_line_that_lacks_something(args, error):
    assert refusal(tool, *args) == error


# What comes from outside.


def test_pictures_never_meet_nor_replace_an_image(deit, tmp_path):
    scans, pixels = tmp_path / "scans", Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    names = ["0.png", "a.jpg", "a.png", "a.jpg.png", "deep/a.jpg", os.fsdecode(b"n\xff\x1b.bmp")]
    for name in names:
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(os.fsencode(scans / name))
    files = find_images([str(scans), f"{scans}/deep/../a.jpg"])
    assert len(files) == len(names)
    tool.predict(files, deit, Options(attention=str(tmp_path / "looks"), top=1))
    found = {str(path.relative_to(tmp_path / "looks")) for path in (tmp_path / "looks").rglob("*.png")}
    assert found == {"index.png", "0.png", "a.jpg.png", "a.png.png", "a.jpg.png.png", "deep/a.png",
                     os.fsdecode(b"n\xff\x1b.png")}
    before = {path: path.read_bytes() for path in scans.rglob("*.*")}
    with pytest.raises(ConfigError, match=r"^--attention: .*0\.png is one of the images; choose another folder"):
        tool.predict(files, deit, Options(attention=str(scans), overwrite=True))
    assert {path: path.read_bytes() for path in scans.rglob("*.*")} == before


def test_names_that_are_no_text_are_shown_without_harm_and_kept_in_json(deit, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b]0;x\x07\n.png")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(os.fsencode(path))
    weights = dataclasses.replace(deit, class_names=("\x1b[31mred\u202e", *NAMES[1:]))
    tool.predict([path], weights, Options(top=7))
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 7 and r"/\udcff\x1b]0;x\x07\n.png " in table and r"\x1b[31mred\u202e" in table
    tool.predict([path], weights, Options(top=7, format="json"))
    line, = capsys.readouterr().out.splitlines()
    assert json.loads(line)["path"] == path and line.isprintable() and line.isascii()
    assert weights.class_names[0] in [entry["name"] for entry in json.loads(line)["top"]]


def test_only_files_are_opened(deit, tmp_path, caplog):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    files = find_images([str(tmp_path)])
    assert files == [f"{tmp_path}/a.png", f"{tmp_path}/gone.jpg"] and "left out: " in caplog.text
    with pytest.raises(ConfigError, match=r"^arguments: .*/pipe\.jpg is neither a file nor a folder; give images"):
        find_images([f"{tmp_path}/pipe.jpg"])
    with pytest.raises(ConfigError, match="^--classes: .* it is a pipe or a device, no regular file"):
        read_names(f"{tmp_path}/pipe.jpg", 3)
    found = list(Predictor(deit, preprocessing(deit))([f"{tmp_path}/{name}" for name in (
        "pipe.jpg", "gone.jpg", "folder.jpg", "a.png")], 4))
    assert [one.error for one in found] == [
        "it is a pipe or a device, no regular file", "No such file or directory", "Is a directory", None]
