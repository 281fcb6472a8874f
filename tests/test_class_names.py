"""One class, one meaning: in training, evaluation, fine-tuning, distillation, and where a run goes on."""
import contextlib
import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cb_vit import startup, weights
from cb_vit.checkpoint import Checkpointer
from cb_vit.checkpoint_reading import digest
from cb_vit.config import ConfigError
from cb_vit.distillation import DistillationConfig, make_teacher
from cb_vit.evaluators import common
from cb_vit.evaluators.common import measure
from cb_vit.model_init import fit, open_init
from cb_vit.pp import builder
from cb_vit.settings import check
from cb_vit.stream import check_hosts
from cb_vit.train import train_and_evaluate
from cb_vit.tree import flatten_with_names

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "emu": (0, 0, 255)}


def paint(root, split, names, count=8):
    """Class folders of plain squares; of the name each has the colour, whatever the order."""
    for name in names:
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), COLOURS[names[name]]).save(root / split / name / f"{i}.png")
    return root


def config(root, classes=3, **changes):
    pp = f"decode|value_range(-1, 1)|onehot({classes})|keep('image', 'labels')"
    return dict(
        seed=0, total_steps=12, lr=1e-2, schedule=dict(decay_type="constant"), log_training_steps=12, plot=False,
        input=dict(data=dict(name="folder", root=str(root), split="train"), batch_size=8, pp=pp),
        model=dict(patch_size=4, width=16, depth=1, mlp_dim=16, num_heads=2, context="cb", head_zeroinit=False)
    ) | changes


def val(root, classes=3, **data):
    return dict(type="classification", log_steps=12, data=dict(name="folder", root=str(root), split="val", **data),
                pp_fn=f"decode|value_range(-1, 1)|onehot({classes})|keep('image', 'labels')")


SAME = {name: name for name in COLOURS}


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Training data of cats, dogs and emus; and elsewhere, some of each of two of them."""
    folder = tmp_path_factory.mktemp("animals")
    paint(folder / "A", "train", SAME)
    paint(folder / "B", "val", {name: name for name in ("dog", "emu")}, 4)
    return folder


@pytest.fixture(scope="module")
def run(animals):
    """A run on them that knows them apart, its metrics, and its folder."""
    settings = config(animals / "A", evals=dict(val=val(animals / "B")))
    return settings, train_and_evaluate(settings, animals / "run"), animals / "run"


def test_evaluation_goes_by_names(run):
    _, metrics, folder = run
    assert metrics["val/prec@1"] == 1.0
    notes = json.loads((folder / "run.json").read_text())
    assert notes["class_names"] == ["cat", "dog", "emu"]
    assert notes["data"]["train"]["examples"] == 24 and notes["data"]["val"]["fewest"] == ["cat", 0]


def test_weights_are_scored_by_names(run, animals, tmp_path):
    """And by their numbers where that is asked for, or where they have no names; both are wrong here."""
    found = weights.open_weights(run[2], "weights")
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), jax.sharding.PartitionSpec("data"))

    def score(root, names, **data):
        settings = check(config(animals / "A", evals=dict(val=val(root, **data))))
        state = startup.TrainState(jnp.int32(0), found.read(), (), jnp.bool_(True))
        predict = lambda state, images: found.model.apply({"params": state.params}, images)  # noqa: E731
        evals = common.open_all(settings.evals, lambda config: predict, state_shapes=state, sharding=sharding,
                                training=settings.input, num_classes=3, class_names=names)
        return measure(evals["val"], state)["val/prec@1"]

    assert score(animals / "B", found.class_names) == 1.0
    assert score(animals / "B", found.class_names, labels="index") == 0.0
    with pytest.raises(ConfigError, match=r"config\.evals\.val\.data: has 2 classes, the model 3"):
        score(animals / "B", None)
    paint(tmp_path, "val", {"fox": "cat", "dog": "dog"}, 1)
    with pytest.raises(ConfigError, match=r"^config\.evals\.val\.data: class 'fox' is not among cat, dog, emu"):
        score(tmp_path, found.class_names)


def restore(settings, folder):
    """What a start would do with a run, and nothing more."""
    run = startup.build(check(settings), folder)
    with contextlib.closing(Checkpointer(folder / "checkpoints", read_only=True)) as checkpointer:
        return startup.restore_or_create(run, folder, checkpointer)[0]


def rewrite(folder, change):
    """Change the notes of a checkpoint as another version might have written them."""
    path = folder / "checkpoints" / "12" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta.pop("digest")
    change(meta)
    path.write_text(json.dumps({**meta, "digest": digest(meta)}))


def test_a_copy_elsewhere_is_the_same_data(run, animals, tmp_path, caplog):
    settings, _, folder = run
    shutil.copytree(animals / "A", tmp_path / "copy")
    assert int(restore(config(tmp_path / "copy", evals=settings["evals"]), folder).step) == 12
    assert "config.input.data.root" in caplog.text and "stream of batches" not in caplog.text


def test_a_run_from_before_there_was_an_evened_order_goes_on_without_one(run, animals, tmp_path):
    shutil.copytree(run[2], tmp_path / "run")
    rewrite(tmp_path / "run", lambda meta: meta["stream"]["config"].pop("input.balance"))
    settings = run[0]
    assert int(restore(settings, tmp_path / "run").step) == 12
    with pytest.raises(ConfigError, match=r"^config\.input\.balance: was 0\.0 when this run began, now 1\.0"):
        restore(settings | dict(input=dict(settings["input"], balance=1.0)), tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    (lambda root: (root / "train/cat/0.png").unlink(), "has 23 examples, 24 when"),
    (lambda root: shutil.copy(root / "train/cat/0.png", root / "train/cat/9.png"), "has 25 examples, 24 when"),
    (lambda root: (root / "train/cat/0.png").rename(root / "train/cat/9.png"), "other files"),
    (lambda root: (root / "train/cat/0.png").write_bytes(b"x"), "files of another size"),
    (lambda root: (root / "train/cat").rename(root / "train/zebra"), "class 0 is 'dog', and was 'cat'")])
def test_changed_data_is_refused(run, animals, tmp_path, caplog, change, message):
    settings, _, folder = run
    shutil.copytree(animals / "A", tmp_path / "A")
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()  # the guard does not need it
    change(tmp_path / "A")
    changed = config(tmp_path / "A")
    with pytest.raises(ConfigError, match=rf"^config\.input\.data: .*{message}.*allow_changed_data=True$"):
        restore(changed, tmp_path / "run")
    if "class 0" in message:
        assert int(restore(changed | dict(allow_changed_data=True), tmp_path / "run").step) == 12
        assert message in caplog.text


@pytest.mark.parametrize("change, field", [
    (dict(seed=1), "seed"), (dict(batch_size=16), "input.batch_size"), (dict(repeats=2, batch_size=8), "input.repeats"),
    (dict(pp="decode|flip_lr|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"), "input.pp")])
def test_another_stream_is_refused_without_config_json_too(run, tmp_path, change, field):
    settings, _, folder = run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    top = {key: value for key, value in change.items() if key == "seed"}
    inputs = settings["input"] | {key: value for key, value in change.items() if key != "seed"}
    if field == "input.repeats":  # needs more examples than there are here
        rewrite(tmp_path / "run", lambda meta: meta["stream"]["config"].update({field: 3}))
        inputs = settings["input"]
    with pytest.raises(ConfigError, match=rf"^config\.{field}: was .* when this run began"):
        restore(settings | top | dict(input=inputs), tmp_path / "run")


def test_checkpoints_of_before(run, animals, tmp_path, caplog):
    """What config.json and run.json recorded is compared; of the rest there is a word."""
    settings, _, folder = run
    shutil.copytree(folder, tmp_path / "run")
    rewrite(tmp_path / "run", lambda meta: meta.pop("stream"))
    restore(settings, tmp_path / "run")
    assert "does not say which data it was trained on" in caplog.text
    with pytest.raises(ConfigError, match=r"^config\.seed: was 0 when this run began"):
        restore(settings | dict(seed=1), tmp_path / "run")
    paint(tmp_path / "other", "train", {"ape": "cat", "dog": "dog", "emu": "emu"})
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match="class 0 is 'ape', and was 'cat'"):
        restore(config(tmp_path / "other"), tmp_path / "run")


def test_an_order_that_has_changed_does_not_permute_an_old_run(run, animals, tmp_path):
    """As of a run that has sorted numbers as text: its labels stay."""
    names = {"9": "cat", "10": "dog", "2": "emu"}
    paint(tmp_path, "train", names)
    shutil.copytree(run[2], tmp_path / "run")
    recorded = ["10", "2", "9"]
    rewrite(tmp_path / "run", lambda meta: meta.pop("stream"))
    (tmp_path / "run" / "config.json").unlink()
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": recorded}))
    settings = config(tmp_path)
    restore(settings, tmp_path / "run")
    source = startup.build(check(settings), tmp_path / "run").pipeline.source
    assert list(source.class_names) == recorded
    assert all(recorded[source[i]["label"]] in source[i]["id"].split("/") for i in range(len(source)))


@pytest.mark.parametrize("names, kept, said", [
    (SAME, True, "head: its classes are those of the data, by name"),
    ({"cat": "cat", "dog": "dog", "yak": "emu"}, False, "head: its classes are others: class 'yak' is not among cat"),
    (None, True, "head: its 3 classes are taken to be those of the data, by their numbers")])
def test_a_head_is_kept_only_for_its_own_classes(run, animals, tmp_path, names, kept, said, caplog):
    caplog.set_level(logging.INFO)
    if names:
        data = dict(name="folder", root=str(paint(tmp_path, "train", names)), split="train")
    else:
        data = dict(name="folder", root=str(animals / "A"), split="train", labels="index")
    settings = config("", model_init=str(run[2]))
    settings["input"] = settings["input"] | dict(data=data)
    built = startup.build(check(settings), tmp_path / "new")
    with built.active_mesh():
        state, notes = fit(built, open_init(built.settings))()
    theirs = dict(flatten_with_names(weights.open_weights(run[2], "").read())[0])
    ours = dict(flatten_with_names(state.params)[0])
    assert np.array_equal(ours["head/kernel"], theirs["head/kernel"]) == kept
    assert np.array_equal(ours["embedding/kernel"], theirs["embedding/kernel"])
    assert any(line.startswith(said) for line in notes["model_init"]["report"]), notes
    assert kept or "begun anew, the file's being for other classes: head/bias, head/kernel" in caplog.text


def test_what_a_run_begins_from_gives_the_order(run, animals, tmp_path):
    """The same classes in another order keep the numbers that the head knows them by."""
    settings = config(animals / "A", model_init=str(run[2]))
    shutil.copytree(run[2], tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": ["emu", "cat", "dog"]}))
    source = startup.build(check(settings | dict(model_init=str(tmp_path / "run"))), tmp_path / "new").pipeline.source
    assert source.class_names == ("emu", "cat", "dog")
    assert {source[i]["id"].split("/")[-2]: source[i]["label"] for i in range(24)} == {"emu": 0, "cat": 1, "dog": 2}


def test_a_start_that_was_cut_short_changes_nothing(run, animals, tmp_path):
    """An empty folder of checkpoints, whatever notes lie beside it, is as none."""
    settings = config(animals / "A", model_init=str(run[2]))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for notes in (None, {"class_names": ["emu", "dog", "cat"], "num_classes": 3}):
        if notes:
            (tmp_path / "run" / "run.json").write_text(json.dumps(notes))
        assert startup.build(check(settings), tmp_path / "run").class_names == ("cat", "dog", "emu")


def test_a_checkpoint_itself_knows_its_classes(run, animals, tmp_path):
    shutil.copytree(run[2], tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert startup.recorded_classes(tmp_path / "run") == ("cat", "dog", "emu")
    restore(config(animals / "A"), tmp_path / "run")
    rewrite(tmp_path / "run", lambda meta: meta["stream"]["config"].update({"input.data.of_a_later_version": 3}))
    restore(config(animals / "A"), tmp_path / "run")


def test_hosts_must_have_the_same_data(run, tmp_path, monkeypatch):
    settings, _, folder = run
    built = startup.build(check(settings), folder)
    evals = built.open_evaluators()
    check_hosts(built, evals)
    seen = []
    monkeypatch.setattr("cb_vit.dist.alike", lambda text: seen.append(text) or "cat" not in seen[-1] or len(seen) < 2)
    with pytest.raises(ConfigError, match=r"^config\.evals\.val\.data: is not the same on all hosts"):
        check_hosts(built, evals)
    assert "fingerprint" in seen[0]


def test_a_teacher_is_asked_for_the_students_classes(run):
    teacher, pp = weights.open_weights(run[2], ""), builder.build("value_range(-1, 1)", "pp")
    make = lambda names, count: make_teacher(  # noqa: E731
        DistillationConfig(teacher="x"), teacher, pp, (8, 8, 3), count, names)
    image, params = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32), teacher.read()
    plain = make(("cat", "dog", "emu"), 3).logits(params, image)
    np.testing.assert_array_equal(make(("emu", "cat"), 2).logits(params, image), plain[:, jnp.array([2, 0])])
    np.testing.assert_array_equal(make(None, 3).logits(params, image), plain)
    for names, count, message in ((("cat", "fox"), 2, "class 'fox' is not among cat, dog, emu"),
                                  (None, 2, "has 3 classes, the student has 2")):
        with pytest.raises(ConfigError, match=rf"^config\.distillation\.teacher: .*{re.escape(message)}"):
            make(names, count)


def test_names_that_run_json_cannot_mean_are_refused(run, tmp_path):
    shutil.copytree(run[2], tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    notes = json.loads(path.read_text())
    for names in ("abc", [1, 2, 3], ["a", "b", "c", "d"], {"0": "a"}):
        path.write_text(json.dumps(notes | {"class_names": names}))
        with pytest.raises(ConfigError, match="class_names"):
            weights.open_weights(tmp_path / "run", "weights")
    path.write_text(json.dumps(notes | {"class_names": ["a", "b"]}))  # of a head larger than its data
    assert weights.open_weights(tmp_path / "run", "weights").class_names == ("a", "b", "(unused 2)")
