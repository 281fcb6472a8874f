"""Suites of evaluators: what they read, skip, measure and write."""
import csv
import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
from helpers import After, Numbered, open_evaluator, predict_numbered, random, refusal, timm_shapes
from PIL import Image
from safetensors.numpy import save_file
from scipy.special import log_softmax

from cb_vit import dist
from cb_vit.analysis.survey import Surveyor
from cb_vit.config import ConfigError, parse
from cb_vit.datasets import Absent, DataError, align, classes_of, objectnet, open_source
from cb_vit.datasets.labels import wnids
from cb_vit.datasets.relabel import Relabelled
from cb_vit.evaluators import common, stored_corruptions
from cb_vit.input_pipeline import InputConfig
from cb_vit.pp import builder
from cb_vit.pp.normalisation import Normalisation
from cb_vit.settings import check
from cb_vit.tools import cli, config_files, eval_only, results, suites
from cb_vit.weights import export_run, open_weights
from cb_vit.workdir import write_notes

WNIDS = wnids()
MODEL = ("--model=num_heads=4", "--model=gelu=erf", "--model=layer_norm_eps=1e-6")


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model of ImageNet's classes in `tiny`, and some of the sets in `data`."""
    home = tmp_path_factory.mktemp("suites")
    (home / "tiny").mkdir()
    save_file(random(timm_shapes(depth=1, **{"head.weight": (1000, 32), "head.bias": (1000,)})),
              home / "tiny" / "model.safetensors")
    card = {"input_size": [3, 12, 12], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    (home / "tiny" / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": card}))
    data, number = home / "data", 0
    for place in (0, 3, 999):
        for _ in range(2):
            number += 1
            picture(data / "imagenet" / "val" / WNIDS[place] / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    (data / "real.json").write_text(json.dumps([[0], [], [1, 2, 3], [], [999], [5]]))
    for place in (0, 2, 10, 250):
        picture(home / "v2" / str(place) / "x.jpeg")
    for place in (6, 11, 13):
        picture(data / "imagenet-a" / WNIDS[place] / "x.jpg", place)
    (data / "imagenet-a" / "README.txt").write_text("about")
    return home


# Classes that the data has.


def named(labels, classes, broken=()):
    source = Numbered(labels, len(classes), broken)
    source.class_names = tuple(classes)
    return source


@pytest.mark.parametrize("places", [(9, 1, 4, 7, 0, 2, 6), (3, 8)])
@pytest.mark.parametrize("by_names", [True, False])
def test_only_classes_of_the_data_compete(places, by_names):
    rng = np.random.default_rng(0)
    own = rng.integers(-1, len(places), 40)
    own[:len(places)] = range(len(places))
    truth = np.where(own < 0, -1, np.array(places)[own])
    letters = tuple("abcdefghij")
    if by_names:  # the data names a part of the model's classes, in an order of its own
        source = align(named(own.tolist(), [letters[place] for place in places]), letters, 10, "data")
    else:  # it names all, and has examples of some
        source = named(truth.tolist(), letters)
    logits = rng.normal(0, 3, (40, 10)).astype(np.float32)
    logits[:, [5]] = 50  # a class that the data does not have would always win
    evaluator, state = open_evaluator(
        "classification", {"data": source}, predict_numbered, {"logits": logits}, "onehot(10)|keep('image', 'labels')",
        devices=4, only_data_classes=True)
    found, counted, columns = dict(evaluator.run(state)), truth >= 0, sorted(places)
    inside, order = logits[counted][:, columns], np.argsort(-logits[counted][:, columns], axis=1)
    right = np.searchsorted(columns, truth[counted])
    assert found["prec@1"] == pytest.approx(np.mean(order[:, 0] == right)) and evaluator.counted == counted.sum()
    assert found["loss"] == pytest.approx(-log_softmax(np.float64(inside), axis=1)[np.arange(len(right)), right].mean())
    assert ("prec@5" in found) == (len(places) > 5)
    if len(places) > 5:
        assert found["prec@5"] == pytest.approx(np.mean(np.any(order[:, :5] == right[:, None], axis=1)))


def test_data_must_say_its_classes():
    with pytest.raises(ConfigError, match=r"^data: does not name its classes.*leave out only_data_classes"):
        classes_of(Numbered([0, 1], 10), "data")
    with pytest.raises(ConfigError, match="has no example with a class"):
        classes_of(named([-1, -1], "ab"), "data")
    assert classes_of(named([0, 1, 0], "abc", broken=(1,)), "data", skip_errors=True).tolist() == [0]
    with pytest.raises(DataError, match="example 1 is broken"):
        classes_of(named([0, 1, 0], "abc", broken=(1,)), "data")


# Where data lies.


def folder(root, **more):
    return dict(name="folder", root=str(root), split="all", whole=True) | more


def test_classes_alone_are_one_split(home):
    found = open_source(folder(home / "data" / "imagenet-a"), "data")
    assert found.class_names == tuple(WNIDS[place] for place in (6, 11, 13)) and len(found) == 3
    assert found.contents.left_out == {"outside of class folders": 1}
    with pytest.raises(ConfigError, match=r"\.split: no split 'val'.*with whole=True there is this one alone"):
        open_source(folder(home / "data" / "imagenet-a", split="val"), "data")
    for more in (dict(holdout=0.1), dict(labels_file="x.csv")):
        with pytest.raises(ConfigError, match=r"\.whole: .*leave out holdout"):
            open_source(folder(home, **more), "data")


def test_folders_of_v2_are_places_in_the_order_of_imagenet(home):
    source = open_source(folder(home / "v2"), "data")
    for names in (None, WNIDS, WNIDS[::-1]):
        aligned = align(source, names, 1000, "data")
        places = {example["id"].split("/")[-2]: example["label"] for example in map(aligned.__getitem__, range(4))}
        assert places == {str(n): 999 - n if names == WNIDS[::-1] else n for n in (0, 2, 10, 250)}


@pytest.mark.parametrize("block", [
    dict(name="folder", split="val", root="{}/gone"), dict(name="folder", split="all", whole=True, root="{}/gone"),
    dict(name="folder", split="val", root="{}/dangling"), dict(name="idx", split="test", root="{}/gone"),
    dict(name="folder", split="val", root="{}", labels_file="no.csv"), dict(name="idx", split="test", root="{}"),
    dict(name="imagenet_a", split="test", data_dir="{}"),
    dict(name="imagenet_v2/topimages:3.0.0", split="test", data_dir="{}/gone")])
def test_what_is_not_there_is_told_from_what_is_otherwise(tmp_path, block):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    block = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in block.items()}
    with pytest.raises(Absent):
        open_source(block, "data")
    several = dict(name="first_of", blocks=(block, dict(name="fake", split="test", num_examples=7)))
    assert len(open_source(several, "data")) == 7
    with pytest.raises(Absent, match="^data: nothing is there: .*, and "):
        open_source(dict(name="first_of", blocks=(block, block)), "data")


def test_what_is_there_and_wrong_is_no_absence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for block in (folder(tmp_path / "file"), folder(tmp_path / "empty"), dict(name="idx", split="test", root=str(
            tmp_path / "file")), folder(tmp_path, whole=False, split="vla")):
        for data in (block, dict(name="first_of", blocks=(block, dict(name="fake", split="test")))):
            with pytest.raises(ConfigError) as caught:
                open_source(data, "data")
            assert not isinstance(caught.value, Absent)
    for wrong, message in ((dict(blocks=()), "blocks: is empty"), (dict(blocks=(dict(name="fake", split="test"),),
                           split="val"), "split: and labels are said by each"), ({}, "blocks")):
        with pytest.raises(ConfigError, match=message):
            open_source(dict(name="first_of") | wrong, "data")


def real(home, **more):
    images = dict(name="folder", root=str(home / "data" / "imagenet"), split="val")
    return dict(name="real", images=images, labels_file=str(home / "data" / "real.json")) | more


def test_objectnet_has_the_classes_of_its_folders_and_no_border(tmp_path):
    pixels = np.zeros((9, 8, 3), np.uint8) + np.uint8([255, 0, 0])
    pixels[2:-2, 2:-2] = np.arange(4, dtype=np.uint8)[:, None]
    for folder in ("alarm_clock", "backpack", "air_freshener"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "x.png")
    block = dict(name="objectnet", images=dict(name="folder", root=str(tmp_path), split="all", whole=True))
    source = open_source(block, "data")
    assert source.num_classes == 1000 and len(source) == 2  # no class of ImageNet is an air freshener
    assert [example["label"][:2].tolist() for example in map(source.__getitem__, range(2))] == [[409, 530], [414, -1]]
    np.testing.assert_array_equal(source[0]["image"], pixels[2:-2, 2:-2])
    look = Surveyor("data", source, exif=False, smallest=1)(0)  # which check-data asks
    assert look.label == f"{WNIDS[409]} or {WNIDS[530]}" and look.size == (5, 4)
    assert len(objectnet.table()) == 113 and set().union(*objectnet.table().values()) <= {*WNIDS}

    (tmp_path / "backpack" / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="x.png: cannot be decoded"):
        source[1]
    for folder in ("alarm_clock", "backpack"):
        (tmp_path / folder / "x.png").unlink()
        (tmp_path / folder).rmdir()
    with pytest.raises(ConfigError, match="data.images: not one of its folders is called as ObjectNet's"):
        open_source(block, "data")


def test_real_has_all_labels_of_an_image(home, tmp_path):
    source = open_source(real(home), "data")
    found = {example["id"][-10:-5]: example["label"].tolist() for example in map(source.__getitem__, range(6))}
    assert found == {"00001": [0, -1, -1], "00002": [-1] * 3, "00003": [1, 2, 3], "00004": [-1] * 3,
                     "00005": [999, -1, -1], "00006": [5, -1, -1]}
    turned = Relabelled(source, range(999, -1, -1), 1000, WNIDS[::-1])
    assert turned[[found["00003"] == source[i]["label"].tolist() for i in range(6)].index(True)]["label"].tolist() == [
        998, 997, 996]
    with pytest.raises(Absent, match="real.json of google-research"):
        open_source(real(home, labels_file=str(tmp_path / "no.json")), "data")
    for content in ("[[0], 3]", "[[1000]]", "{", "[[true]]", "[[0.5]]", "7"):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(DataError, match="should be a list of lists of classes"):
            open_source(real(home, labels_file=str(tmp_path / "real.json")), "data")
    (tmp_path / "real.json").write_text("[[0]]")
    with pytest.raises(DataError, match="is not called as an image of ImageNet's val.*to 00000001"):
        list(map(open_source(real(home, labels_file=str(tmp_path / "real.json")), "data").__getitem__, range(6)))
    with pytest.raises(DataError, match="several labels an image"):
        classes_of(source, "data")


# Evaluators that may be left out.

BLOCK = dict(type="classification", log_steps=5, pp_fn="value_range(-1, 1)|onehot(3)",
             data=dict(name="fake", split="test", num_examples=20, num_classes=3))


def opened(told, **blocks):
    configs = {name: common.read_evaluator(BLOCK | block, f"config.evals.{name}") for name, block in blocks.items()}
    training = parse(InputConfig, dict(data=BLOCK["data"], pp="", batch_size=16, num_threads=3))
    sharding = dist.batch_sharding(dist.create_mesh([("data", 8)]), "data")
    return common.open_all(configs, lambda config: lambda state, images: (images.reshape(-1, 3072)[:, :3], {}),
                           state_shapes=None, sharding=sharding, training=training, num_classes=3,
                           on_absent=lambda name, error: told.append((name, str(error))))


def test_optional_evaluators_are_left_out_where_their_data_is_absent(tmp_path, monkeypatch, caplog):
    told, gone = [], dict(data=folder(tmp_path / "gone"))
    assert list(opened(told, val={}, other=gone | dict(optional=True), last=dict(optional=True))) == ["val", "last"]
    [(name, why)] = told
    assert name == "other" and why.startswith(f"config.evals.other.data.root: {tmp_path}/gone is no folder")
    with pytest.raises(Absent, match=r"config\.evals\.other\.data\.root"):
        opened(told, other=gone)
    (tmp_path / "gone").touch()
    with pytest.raises(ConfigError, match="is no folder"):
        opened(told, other=gone | dict(optional=True))
    further = dict(type="calibration", fit=folder(tmp_path / "nothing"), prefix="x/", optional=True)
    assert not opened(told, other=further) and told[-1][1].startswith("config.evals.other.fit.root")
    common.tell_absent("other", Absent("a.b", "is not there"))
    assert "config.evals.other is left out, as it is optional: a.b: is not there" in caplog.text
    monkeypatch.setattr(dist, "worst", lambda number: {False: 1}.get(number, number) if calls.append(number) or len(
        calls) % 2 == 0 else number)
    calls = []  # the first of each two asks whether a process has failed, the second whether one has no data
    assert not opened(told, val=dict(optional=True)) and "is there, but not for another process" in told[-1][1]


# ImageNet-C as it is stored.


def test_stored_corruptions_are_measured_as_they_are():
    labels = [0, 1, 2] * 4
    logits = np.random.default_rng(1).normal(0, 1, (36, 3)).astype(np.float32)
    sources = {"data": named(labels, "abc")} | {
        f"fog/{severity}": After(12 * number, labels, 3) for number, severity in enumerate((2, 5), 1)}
    evaluator, state = open_evaluator(
        "stored_corruptions", sources, predict_numbered, {"logits": logits}, "onehot(3)|keep('image', 'labels')",
        corruptions=("fog",), severities=(2, 5), root="/c")
    wrong = np.mean(np.argmax(logits, axis=1).reshape(3, 12) != labels, axis=1)
    assert dict(evaluator.run(state)) == pytest.approx({
        "clean/error": wrong[0], "severity_2/error": wrong[1], "severity_5/error": wrong[2],
        "fog/error": wrong[1:].mean(), "error": wrong[1:].mean()})
    assert {name: block.root for name, block in evaluator.config.further.items()} == {
        "fog/2": "/c/fog/2", "fog/5": "/c/fog/5"}
    assert common.sources_of(evaluator).keys() == sources.keys()
    preprocess = stored_corruptions._as_stored(
        builder.build("decode|resize_small(14)|central_crop(12)|value_range(-1, 1)|onehot(3)", "pp"), (12, 12, 3))
    assert preprocess.text == "decode|resize((12, 12))|value_range(-1, 1)|onehot(3)"


def test_all_75_folders_count_and_no_other():
    block = dict(BLOCK, type="stored_corruptions", root="/c")
    config = common.read_evaluator(block, "val")
    assert len(config.further) == 75 and "frost/5" in config.further
    with pytest.raises(ConfigError, match=r"val\.corruptions: ImageNet-C has no 'fogg'; did you mean fog\?"):
        common.read_evaluator(block | dict(corruptions=("fogg",)), "val")


# Tables.


def test_rows_of_other_models_stay_and_that_of_the_same_is_replaced(tmp_path):
    path, row = tmp_path / "results-x.csv", ["m", "224", "1.000", "99.000", "", "", "5.72", "0.900", "bicubic"]
    assert results.with_rows(path, [row]).splitlines()[0] == ",".join(results.TIMM) == (
        "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation")
    for new in (row, ["a, b", *row[1:]], ["m", "384", *row[2:]]):
        path.write_text(results.with_rows(path, [new]))
    assert results.read_rows(path) == [["m", "384", *row[2:]], ["a, b", *row[1:]]]
    for content in (b"model,top1\n", b"\xff\xfe", (",".join(results.TIMM) + "\na,b\n").encode()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="--output: .* is another table"):
            results.read_rows(path)


@pytest.mark.parametrize("size, whole, share", [(224, 248, 0.9), (224, 256, 0.875), (224, 235, 0.95), (224, 224, 1.0)])
def test_crop_shares_are_those_of_timm(size, whole, share):
    assert results._crop_share(size, whole) == share


@pytest.mark.parametrize("path, name", [
    ("hf://timm/vit_x.in1k", "vit_x.in1k"), ("runs/a/", "runs/a"), ("w.npz", "w.npz"), ("hf://a/b@main", "b@main")])
def test_models_are_called_as_they_are_given(path, name):
    assert results.model_name(path) == name


# Whole suites.


def run(*argv):
    eval_only.main(cli.parse(eval_only, list(map(str, argv))))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_robustness_from_end_to_end(home, tmp_path, capsys):
    run("--suite=robustness:batch_size=8", f"--data_dir={home / 'data'}", f"--weights={home / 'tiny'}", *MODEL,
        f"--output={tmp_path}")
    text = capsys.readouterr().out
    table = text[text.index("data set"):]
    images = {line.split()[0]: line.split()[-1] for line in table.splitlines()[1:] if "left out" not in line}
    assert images.items() >= {"imagenet": "6", "imagenet-real": "4", "imagenet-a": "3"}.items()
    for name in ("imagenet-r", "sketch", "imagenetv2-top-images", "imagenet-c"):
        assert re.search(rf"^{name} +left out: (nothing is there|.* is no folder)", table, re.MULTILINE)
    metrics = {row["metric"]: float(row["value"]) for row in rows_of(tmp_path / "metrics.csv")}
    assert "imagenet-a/prec@5" not in metrics and {"imagenet/prec@5", "imagenet-real/loss"} <= metrics.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"} | {
        f"results-{name}.csv" for name in ("imagenet", "imagenet-a", "imagenet-real")}
    [row] = rows_of(tmp_path / "results-imagenet-a.csv")
    assert (row["model"], row["img_size"], row["crop_pct"], row["interpolation"], row["top5"]) == (
        str(home / "tiny"), "12", "0.900", "bicubic", "")
    assert float(row["top1"]) == pytest.approx(100 * metrics["imagenet-a/prec@1"], abs=1e-3)
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)


def test_stress_measures_a_run_on_its_own_data(home, tmp_path, capsys):
    save_file(random(timm_shapes(depth=1)), tmp_path / "five.safetensors")
    weights = open_weights(tmp_path / "five.safetensors", "path", num_heads=4, gelu="erf", layer_norm_eps=1e-6)
    weights = dataclasses.replace(weights, normalisation=Normalisation.of((0.5, 0.5), 3))
    folder = tmp_path / "run"
    export_run.write_run(str(folder), weights, jax.device_get(weights.read()), False)
    config = config_files.get_config("debug:size=12").to_dict()
    own = dict(BLOCK, data=dict(BLOCK["data"], image_size=12, num_classes=5), pp_fn="vgg_value_range|onehot")
    config |= {"evals": {"first": dict(own, data=dict(own["data"], num_examples=3)), "val": own},
               "keep_best": dict(metric="val/prec@1")}
    write_notes(folder, config, json.loads((folder / "run.json").read_text()))
    args = cli.parse(eval_only, ["--suite=stress:examples=9", f"--weights={folder}", "--config.evals.attack.steps=1"])
    settings = check(suites.settle(suites.read_suite(args), args, config, None))
    assert {block.type: block.pp_fn.text for block in settings.evals.values()} == dict.fromkeys(
        ("classification", "calibration", "corruptions", "attack", "occlusion"), own["pp_fn"])
    assert {block.data.num_examples for block in settings.evals.values()} == {20} and settings.keep_best is None
    assert settings.evals["attack"].steps == 1 and settings.evals["occlusion"].examples == 9
    (tmp_path / "mine.py").write_text("""
import configs.stress as base

def get_config(arg=None):
    config = base.get_config(arg)
    config.evals = {name: config.evals[name] for name in ("val", "attack")}
    return config
""")
    run(f"--suite={tmp_path / 'mine.py'}:examples=9", f"--weights={folder}", f"--output={folder / 'stress'}",
        "--config.evals.attack.attacks=('fgsm',)", "--config.evals.attack.eps=(1.0,)")
    assert re.search(r"^val +[\d.]+ +- +20$", capsys.readouterr().out, re.MULTILINE)
    found = {row["metric"]: (row["evaluator"], row["type"]) for row in rows_of(folder / "stress" / "metrics.csv")}
    assert found["val/prec@1"] == ("val", "classification")
    assert found["attack/fgsm/eps_1/prec@1"] == ("attack", "attack")
    assert [row["model"] for row in rows_of(folder / "stress" / "results-val.csv")] == [str(folder)]


def test_errors_come_early_and_say_what_to_do(home, tmp_path):
    data, tiny = f"--data_dir={home / 'data'}", [f"--weights={home / 'tiny'}", *MODEL]

    def says(*argv):
        return refusal(eval_only, *argv)

    assert "'robustnes'; did you mean robustness?" in says("--suite=robustnes", data, *tiny)
    assert says("--suite=stress", "--config=digits", *tiny).startswith("--suite: takes the place of --config")
    assert "give --data_dir" in says("--suite=robustness", *tiny)
    assert says("--suite=robustness", "--data_dir=no", *tiny).startswith("--data_dir: no is no folder")
    assert "a comma ends" in says("--suite=robustness", "--data_dir=a,b", *tiny)
    assert says("--suite=digits", *tiny).startswith("--suite: digits is an experiment")
    assert says(data, *tiny).startswith("--data_dir: is of a suite") and says("--pp=x", *tiny).startswith("--pp: is of")
    assert "does not exist; give the workdir" in says("--suite=stress", f"--workdir={tmp_path}/no")
    assert "config.evals.attack.data: is left to the run" in says("--suite=stress", *tiny)
    with pytest.raises(ConfigError, match="stress is a suite of evaluators, no experiment: cb-vit eval --suite=stress"):
        cli.config_of(cli.parse(eval_only, ["--config=stress"]))
    (tmp_path / "results-imagenet.csv").write_text("a,b\n")
    assert "is another table" in says("--suite=robustness", data, *tiny, f"--output={tmp_path}")
    nothing = says("--suite=robustness", f"--data_dir={tmp_path}", *tiny)
    assert nothing.startswith("there is nothing to evaluate on: imagenet: nothing is there") and "sketch:" in nothing
    for count, has in ((10, "has 10"), (0, "has no head")):
        with pytest.raises(ConfigError, match=rf"^--suite: is for models of 1,000 classes, and m {has}; "):
            suites.check_classes({"num_classes": 1000}, count, "m")


def test_processes_know_of_each_other_before_weights_are_opened(home, monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "initialize", lambda: calls.append("initialize"))
    monkeypatch.setattr(eval_only.source, "open_source", lambda *args: calls.append("open") or sys.exit())
    for more in (["--suite=stress"], ["--config=debug"]):
        with pytest.raises(SystemExit):
            run(f"--weights={home / 'tiny'}", *more)
    assert calls == ["initialize", "open"] * 2


def test_suites_are_listed_as_what_they_are():
    assert config_files.suites() == ["robustness", "stress"]
    listed = dict(line.split(maxsplit=1) for line in config_files.overview())
    assert all(listed[name].startswith("Suite: ") for name in config_files.suites())
