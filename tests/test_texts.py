"""Text of others: shown without harm, and JSON of every kind that is right or refused, whatever becomes of it."""
import copy
import functools
import json
import os
import random

import pytest
from etils import epath

from cb_vit import retry, texts, workdir
from cb_vit.checkpoint_reading import Reader, digest
from cb_vit.config import ConfigError, Failure
from cb_vit.damage import Damaged
from cb_vit.datasets import DataError, open_source
from cb_vit.datasets.tfds import TfdsConfig, _default_config, open_folder
from cb_vit.models.vit import Config, resolve
from cb_vit.pp import builder
from cb_vit.pp.normalisation import HALF, Normalisation
from cb_vit.records import reopen
from cb_vit.registry import parse_calls
from cb_vit.tools.predict import read_names
from cb_vit.weights import hub, loading
from cb_vit.weights.containers import FormatError, open_file
from cb_vit.weights.containers.index import read_index, shards
from cb_vit.weights.dialects import cards, images
from cb_vit.weights.dialects.conversion import _described

OURS = (ConfigError, Failure, Damaged)  # Damaged is told by whoever reads checkpoints
DEEP = 2000
TIMM = dict(architecture="vit_tiny_patch16_224", num_classes=2, global_pool="token", label_names=["a", "b"],
            model_args=dict(img_size=32, patch_size=[8, 8], num_heads=3, act_layer="gelu", no_embed_class=False),
            pretrained_cfg=dict(input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], crop_pct=0.9,
                                interpolation="bicubic", crop_mode="center"))
HUGGINGFACE = dict(model_type="vit", num_attention_heads=3, hidden_size=192, hidden_act="gelu", layer_norm_eps=1e-12,
                   image_size=32, patch_size=16, id2label={"0": "a", "1": "b"}, architectures=["ViTModel"],
                   image_processor_type="ViTImageProcessor", size=dict(height=32, width=32), resample=2, do_resize=True,
                   image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255, do_rescale=True,
                   do_center_crop=True, crop_size=32)
TOWERS = dict(model_type="siglip", text_config=dict(vocab_size=9), id2label={"0": "a", "1": "b"},
              vision_config=dict(model_type="siglip_vision_model", num_attention_heads=3, hidden_size=192,
                                 hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, image_size=[32, 32]))
HEADER = {"__metadata__": {"format": "pt", "a": "b"},
          "x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
          "y": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "m-1-of-2.bin", "b": "m-2-of-2.bin"}}
CONFIG = resolve(Config(patch_size=(4, 4), width=16, depth=1, mlp_dim=16, num_heads=2))
RUN = workdir.run_notes("vit", CONFIG, 3, ["a", "b"], (16, 16, 3), "decode|resize(16)|value_range(-1,1)|onehot(3)",
                        pp_evals={"val": "decode|resize(16)|value_range(-1,1)"}, total_steps=3)
META = {"format": 1, "step": 3, "metrics": {"val/prec@1": 0.5}, "arrays": {"params/x": [[2, 3], "float32", 17]},
        "stream": {"config": {"seed": 0}, "class_names": ["a"], "examples": 3, "fingerprint": "0"}, "config": {"lr": 1}}
OTHERS = (None, True, -1, 0, 3, 10**30, 10**400, -0.5, 1e300, float("nan"), float("inf"), "", "x", "\x1b[31m", "\ud800",
          [], {}, [[]], [None], {"x": None}, ["a", 1], {"": {"": []}}, [10**400] * 3, [1e-320] * 3)


def nodes(tree):
    """`(container, key)` of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, node in items:
        yield tree, key
        yield from nodes(node)


def mutate(tree, rng):
    """The bytes of JSON in which one thing is wrong: a node, or the bytes themselves."""
    tree, kind = copy.deepcopy(tree), rng.random()
    container, key = rng.choice(list(nodes(tree)))
    if kind < 0.6:
        container[key] = rng.choice(OTHERS)
    elif kind < 0.7:
        del container[key]
    elif kind < 0.8:
        container[key] = "@"
        opening = rng.choice(["[", '{"a":', '[{"b":'])
        depth = rng.choice([70, DEEP])
        closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(opening) if c in "[{")
        new = rng.choice([opening * depth + "1" + closing * depth, "9" * 5000, "-Infinity", '{"a":1,"a":2}', "1e999"])
        return json.dumps(tree).replace('"@"', new).encode()
    data = json.dumps(tree).encode()
    if kind >= 0.98:
        return rng.choice([b"", b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), b"[" * 10**5, data + data])
    if kind >= 0.9:
        return data[:rng.randrange(len(data))]
    if kind >= 0.8:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1:]
    return data


def read_card(read, path, data):
    path.write_bytes(data)
    card = hub._json(path)
    said = read(card, "w")
    try:
        known = Normalisation.of(images.normalisation(card), 3)
    except ValueError:  # which `convert` tells
        known = HALF
    images.evaluation(card, known, (2, 2), (16, 16))
    return said


def read_header(path, data):
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(10))
    return open_file(path)


read_huggingface, read_towers = (
    functools.partial(read_card, functools.partial(cards.huggingface, kinds=kinds))
    for kinds in (("vit", "deit"), ("siglip_vision_model", "siglip")))


def read_index_file(path, data):
    path.write_bytes(data)
    return shards(str(path), read_index(str(path))[0])


def read_run(path, data):
    path.write_bytes(data)
    notes = workdir.read_json(epath.Path(path))
    try:
        loading._told_by_run(notes)
    except retry.PARSING:  # which `_open_run` tells
        pass
    return workdir.class_names(notes, path)


def read_config(path, data):
    path.write_bytes(data)
    config = workdir.read_json(epath.Path(path))
    return workdir.changes(config, {"lr": 1, "model": {"depth": 2}})


def read_meta(path, data):
    try:
        meta = texts.parse_json(data)
        if isinstance(meta, dict):  # whoever forges notes can forge their digest
            data = json.dumps({**meta, "digest": digest(meta)}).encode()
    except ValueError:
        pass
    return Reader(epath.Path(path.parent))._parse(3, data)


def read_records(path, data):
    path.write_bytes(b'{"step": 1, "x": 1.0}\n' + data.replace(b"\n", b" ") + b'\n{"step": 2, "x": null}\n')
    return reopen(epath.Path(path), 2)


def read_metadata(path, data):
    return _described({"cb_vit": data.decode("utf-8", "replace")}, "w")


def read_classes(path, data):
    path.write_bytes(data)
    return read_names(str(path), 3)


def read_default(path, data):
    folder = path.parent / ".config"
    folder.mkdir(exist_ok=True)
    (folder / "metadata.json").write_bytes(data)
    return _default_config(epath.Path(path.parent))


READERS = {  # reader, what it reads when all is well, how many mutations of that
    "timm's card": (functools.partial(read_card, cards.timm), TIMM, 250),
    "Hugging Face's card": (read_huggingface, HUGGINGFACE, 150), "card of two towers": (read_towers, TOWERS, 100),
    "header": (read_header, HEADER, 300), "index": (read_index_file, INDEX, 200), "run.json": (read_run, RUN, 150),
    "config.json": (read_config, {"lr": 0.1, "model": {"depth": 1}, "a": [1, {"b": None}]}, 150),
    "checkpoint": (read_meta, META, 250), "records": (read_records, {"step": 2, "loss": 1.5, "n": 3}, 150),
    "metadata": (read_metadata, {"model": {"num_heads": 3, "gelu": "erf", "context": "cb"}, "grid": [2, 2],
                                 "normalisation": [[0.5], [0.5]], "class_names": ["a", "b"]}, 150),
    "classes": (read_classes, {"0": ["n1", "ant"], "1": ["n2", "bee"], "2": "cat"}, 100),
    "default": (read_default, {"default_config_name": "x"}, 50),
}


def test_enough_mutations():
    assert sum(count for _, _, count in READERS.values()) == 2000


@pytest.mark.parametrize("name", READERS)
def test_json_of_others_is_right_or_refused_in_one_line(name, tmp_path):
    read, good, count = READERS[name]
    read(tmp_path / "it", json.dumps(good).encode())
    rng, refused = random.Random(name), 0
    for _ in range(count):
        data = mutate(good, rng)
        try:
            read(tmp_path / "it", data)
        except OURS as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, data[:200]
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} at {data[:300]!r}") from error
    assert name in ("records", "default") or refused > count / 8


def test_descriptions_of_prepared_data(tmp_path):
    source = open_source(dict(name="digits", split="test", data_dir=str(tmp_path)), "data")
    folder, rng = epath.Path(source.folder), random.Random(0)
    config = TfdsConfig(name="sklearn_digits", split="test", id_key="id")
    for name in ("features.json", "dataset_info.json"):
        whole = (folder / name).read_bytes()
        for _ in range(20):
            (folder / name).write_bytes(mutate(json.loads(whole), rng))
            try:
                open_folder(folder, config, "data")
            except OURS as error:
                assert "\n" not in str(error) and ("data.split: " in str(error) or str(folder) in str(error))
        (folder / name).write_bytes(whole)
        (folder / name).rename(folder / "aside")
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match="it is a pipe or a device, no regular file"):
            open_folder(folder, config, "data")
        (folder / "aside").replace(folder / name)


def test_json_is_read_in_one_way():
    assert texts.parse_json(b'\xef\xbb\xbf{"a": [1, "\\ud800"], "\\ud800": NaN}')["a"] == [1, "\ud800"]
    assert texts.parse_json(b"[" * 64 + b"]" * 64) and texts.parse_json(b"[" + b"[]," * 999 + b"1]")
    for text, error in (("[" * 66 + "]" * 66, "nested more than 64 deep"),
                        ('{"a":' * 9000 + "1" + "}" * 9000, "nested more than 64 deep"),
                        ('{"a": 1, "b": {"c": 1, "c": 2}}', "a name stands twice"), ("9" * 5000, "4300"),
                        ("", "Expecting value"), ("\udcff", "invalid start byte")):
        with pytest.raises(ValueError, match=error):
            texts.parse_json(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        texts.parse_json(b'[{"\\ud800": 1}]', encodable=True)


@pytest.mark.parametrize("text, shown", [
    ("Käse – 猫 🐈\u200d⬛ a\\n", "Käse – 猫 🐈\u200d⬛ a\\n"), ("a\x1b[2J\x07", r"a\x1b[2J\x07"),
    ("a\nb\r\tc\x85\u2028", r"a\nb\r\tc\x85\u2028"), ("\x9b31m\x7f", r"\x9b31m\x7f"),
    ("gpj.\u202eexe", r"gpj.\u202eexe"), (os.fsdecode(b"n\xff"), r"n\udcff")])
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert texts.printable(text) == shown
    shown.encode()


@pytest.mark.parametrize("text", [
    "decode(" + "(" * 5000, "decode(" + "[" * 150 + "]" * 150 + ")", "|".join(["a"] * 9000), "a" + ".b" * 9000,
    "resize(" + "-" * 9000 + "1)", "resize(" + "9" * 5000 + ")", "resize(" + "(" * 90 + "1" + ",)" * 90 + ")", "\0",
    "resize({[]: 1})", "value_range(1" + "0" * 400 + ")", "resize(1" + "0" * 400 + ")"])
def test_calls_nested_deep_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^pp: .") as caught:
        [parse_calls(text, "pp"), builder.build(text, "pp")]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_a_metadata_error_names_the_file():
    with pytest.raises(FormatError, match="^w: what its metadata say under 'cb_vit'"):
        _described({"cb_vit": "[" * 5000}, "w")
