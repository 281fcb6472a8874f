"""Batches for a loop of one's own: those of training and of its evaluators."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import photographs

import cb_vit
from cb_vit import experiment, workdir
from cb_vit.config import ConfigError
from cb_vit.settings import check
from cb_vit.train_step import augmented


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("home"), 20)


def config(folder, **changes):
    made = cb_vit.get_config(f"folder:root={folder / 'flowers'},variant=mu/8,size=32,epochs=2,batch_size=16")
    return made.to_dict() | dict(plot=False) | changes


def test_training_batches_are_those_of_the_train_step(folder):
    train, run = cb_vit.batches(config(folder)), experiment.build(check(config(folder)))
    assert train.class_names == ("daisy", "rose", "tulip") and train.num_classes == 3
    assert train.image_shape == (32, 32, 3) and len(train) == run.total_steps == 7  # 54 images, twice
    settings = run.settings
    seen = list(train)
    assert len(seen) == 7
    for step, raw in enumerate(run.pipeline.train(0, 0, 7)):
        sent = jax.device_put(raw, run.batch_sharding)
        expected = jax.jit(lambda batch, step: augmented(
            batch, step, prepare=settings.input.pp.device, augment=settings.recipe, seed=0))(sent, jnp.int32(step))
        for name in ("image", "labels", "_mask"):
            np.testing.assert_array_equal(seen[step][name], expected[name], f"{name} of step {step}")
    np.testing.assert_array_equal(next(iter(train))["image"], seen[0]["image"])  # a loop begins anew
    assert seen[0]["image"].sharding.num_devices == train.replicated.num_devices == jax.device_count()


def test_the_batches_of_a_run_have_its_numbers_of_the_classes(folder, tmp_path):
    order = ("tulip", "daisy", "rose")
    given = config(folder)
    model = check(given).model
    notes = workdir.run_notes("vit", model, 3, order, (32, 32, 3), given["input"]["pp"], pp_evals={}, total_steps=7)
    workdir.write_notes(tmp_path / "run", given, notes)
    val = cb_vit.batches(tmp_path / "run", "val")
    batch, plain = next(iter(val)), next(iter(cb_vit.batches(given, "val")))
    assert val.class_names == order
    there = np.asarray(batch["_mask"])
    named = [order[label] for label in np.asarray(batch["labels"]).argmax(-1)[there]]
    assert named == [("daisy", "rose", "tulip")[label] for label in np.asarray(plain["labels"]).argmax(-1)[there]]
    with pytest.raises(ConfigError, match="^config: .*/nothing is not the folder of a run"):
        cb_vit.batches(str(tmp_path / "nothing"))


def test_an_evaluators_batches_hold_each_example_once(folder):
    val = cb_vit.batches(config(folder), "val")
    batches = list(val)
    assert len(val) == len(batches) == 1 and int(sum(batch["_mask"].sum() for batch in batches)) == 6
    labels = batches[0]["labels"][batches[0]["_mask"]]
    assert np.asarray(labels).sum(0).tolist() == [2, 2, 2] and batches[0]["image"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="^evaluator: unknown evaluator of this config 'vall'; did you mean val"):
        cb_vit.batches(config(folder), "vall")
