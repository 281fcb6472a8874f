"""The picture of the first batch: the very images and targets that the train step hands to the model."""
import contextlib
import functools
import io
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from cb_vit import experiment, first_batch, losses
from cb_vit.first_batch import FirstBatch, draw_batch, sampler
from cb_vit.input_pipeline import to_device
from cb_vit.settings import check
from cb_vit.train_state import TrainState
from cb_vit.train_step import train_step

MIXED = dict(mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair"), random_erasing=dict(prob=0.9),
             label_smoothing=0.1)
PP = "flip_lr|{}|onehot(10)|keep('image', 'labels')"


@functools.cache
def build(values="value_range(-1, 1)", augmented=True, batch_size=40, broken=()):
    """(experiment, the batch of step 3)."""
    data = dict(name="fake", split="train", num_examples=64, image_size=8, num_classes=10, encoded=bool(broken),
                broken=broken)
    pp = "decode|" * bool(broken) + PP.format(values)
    run = experiment.build(check(dict(
        seed=0, total_steps=8, lr=1e-2, schedule=dict(decay_type="constant"), loss="softmax_xent",
        input=dict(data=data, batch_size=batch_size, pp=pp, skip_errors=0.5 if broken else False),
        model=dict(variant="mu/4", width=16, depth=1, mlp_dim=16, num_heads=2), **(MIXED if augmented else {}))))
    batches = to_device(run.pipeline.train(0, 3, 4), run.pipeline.rows, run.batch_sharding, batch_size)
    with contextlib.closing(batches):
        return run, next(batches)


def seen_in_training(run, batch, step):
    """(images, labels) that the train step hands to model and loss."""
    seen, tx = [], optax.sgd(0.1)

    class Onlooker(nn.Module):
        def apply(self, params, images, train, rngs):
            seen.append(images)
            return jnp.zeros((len(images), 10)) * params["params"], {}

    def loss(logits, targets):
        seen.append(targets)
        return losses.softmax_xent(logits, targets)

    state = TrainState(jnp.int32(step), jnp.float32(1), tx.init(jnp.float32(1)), jnp.bool_(True))

    def look(state, batch):
        train_step(state, batch, model=Onlooker(), tx=tx, trainable=True, loss=loss,
                   prepare=run.settings.input.pp.device, augment=run.settings.recipe, seed=run.settings.seed)
        return seen

    return map(np.asarray, jax.jit(look)(state, batch))


@pytest.mark.parametrize("values, mean, std", [
    ("value_range(-1, 1)", 0.5, 0.5), ("vgg_value_range", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_the_images_and_targets_are_those_of_the_train_step(values, mean, std):
    run, batch = build(values)
    images, labels = seen_in_training(run, batch, 3)
    shown = jax.jit(sampler(run))(batch, jnp.int32(3))
    rows = np.linspace(0, 39, 32).round().astype(int)
    expected = 255 * np.clip(images[rows] * np.float32(std) + np.float32(mean), 0, 1)
    assert np.abs(np.asarray(shown["image"], np.float32) - expected).max() < 0.501
    np.testing.assert_allclose(0.9 * shown["weights"] + 0.01, labels[rows], atol=1e-6)
    assert (np.sort(shown["weights"], 1)[:, -2] > 0.01).any()  # some are mixed, or this would show little
    other = jax.jit(sampler(run))(batch, jnp.int32(4))
    assert (other["image"] != shown["image"]).mean() > 0.1


def test_without_augmentation_the_pixels_are_the_hosts():
    run, batch = build("vgg_value_range", augmented=False, batch_size=16)
    shown = jax.jit(sampler(run))(batch, jnp.int32(3))
    np.testing.assert_array_equal(shown["image"], batch["image"])
    np.testing.assert_array_equal(np.argmax(shown["weights"], 1), batch["label"])


def test_rows_that_could_not_be_read_are_known():
    run, batch = build(broken=(1, 5, 7, 20, 33, 50))
    shown = jax.jit(sampler(run))(batch, jnp.int32(3))
    rows = np.linspace(0, 39, 32).round().astype(int)
    np.testing.assert_array_equal(shown["readable"], np.asarray(batch["_mask"])[rows])
    assert not shown["readable"].all()


def test_captions(monkeypatch):
    tiles = []
    monkeypatch.setattr(first_batch, "draw_sheet", lambda found, title, note: tiles.extend(found) or b"")
    weights = np.array([[0, 1, 0, 0], [0.384, 0, 0.616, 0], [0, 0, 0, 0], [0.5, 0.2, 0.25, 0.05], [1, 0, 0, 0],
                        [1, 1, 0, 0]])
    readable = np.arange(6) != 4
    for names in (("ant", "bee", "cat", "dog"), None):
        tiles.clear()
        draw_batch(np.zeros((6, 8, 8, 3), np.uint8), weights, readable, class_names=names, title="", note="")
        said = [" · ".join(line.text + line.end for line in tile.lines) for tile in tiles]
        one, two, three = ("ant", "bee", "cat") if names else ("class 0", "class 1", "class 2")
        assert said == [two, f"{three}  0.62 · {one}  0.38", "no label", f"{one}  0.50 · {three}  0.25 · and 2 more",
                        "could not be read", f"{one}  1.00 · {two}  1.00"]


def test_it_is_left_in_the_workdir_and_failing_is_a_warning(tmp_path, caplog):
    run, batch = build()
    with FirstBatch(run, tmp_path / "run") as picture:
        picture.draw(batch, 3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
    with Image.open(io.BytesIO((tmp_path / "run" / "first_batch.png").read_bytes())) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        with FirstBatch(run, tmp_path / "file") as picture:
            picture.draw(batch, 3)
    assert "not all that belongs into" in caplog.text and "File exists" in caplog.text
