"""Attacks against NumPy with numerical gradients: the ball, the pixels, every normalisation, any devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Pictures, open_evaluator
from scipy.special import log_softmax

from cb_vit.config import ConfigError
from cb_vit.datasets.chosen import draw
from cb_vit.evaluators.attack import Attack, example_keys, perturb

N, CLASSES, SIDE = 41, 4, 3
HALF = f"value_range(-1, 1)|onehot({CLASSES})|keep('image', 'labels')"
MEAN, STD = np.array([120.0, 100.0, 90.0]), np.array([60.0, 50.0, 70.0])
VGG = f"vgg_value_range({tuple(MEAN.tolist())}, {tuple(STD.tolist())})|onehot({CLASSES})"
EPS = (1.0, 6.0)


def random():
    """(pictures, labels, parameters of a model), of which some pixels are black and some white."""
    rng = np.random.default_rng(0)
    pictures = np.clip(rng.integers(-60, 316, (N, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    params = {"in": rng.normal(size=(SIDE * SIDE * 3, 8)) / 3, "out": rng.normal(size=(8, CLASSES)) * 2}
    labels = forward(params, pictures / 127.5 - 1).argmax(1)  # most are right
    labels[::7] = (labels[::7] + 1) % CLASSES
    return pictures, labels, params


def forward(params, images, np=np):
    return np.tanh(images.reshape(len(images), -1) @ params["in"]) @ params["out"]


def predict(state, images):
    """A model that knows pixels from -1 to 1."""
    return forward(state.params, images, jnp), {}


def predict_adapted(state, images):
    """The same for images as `VGG` has them, brought to its own normalisation as `cb-vit eval --weights` does."""
    scale, shift = (jnp.float32(values).reshape(1, 1, 1, 3) for values in (STD / 127.5, MEAN / 127.5 - 1))
    return predict(state, images * scale + shift)


def build(pp=HALF, model=predict, labels=None, broken=(), **settings):
    pictures, known, params = random()
    source = Pictures(pictures, known if labels is None else labels, CLASSES, broken)
    return open_evaluator("attack", {"data": source}, model, jax.tree.map(jnp.float32, params), pp,
                          **dict(eps=EPS, steps=4, examples=None) | settings)


def run(**settings):
    evaluator, state = build(**settings)
    return dict(evaluator.run(state))


def loss_of(pixels, labels, params):
    return -log_softmax(forward(params, pixels / 127.5 - 1), axis=1)[np.arange(len(labels)), labels]


def slope_of(pixels, labels, params):
    """The gradient with respect to pixels, by differences."""
    found, flat = np.zeros(pixels.shape), pixels.reshape(len(pixels), -1)
    for number, step in enumerate(np.eye(flat.shape[1]) * 1e-3):
        ends = (loss_of((flat + sign * step).reshape(pixels.shape), labels, params) for sign in (1, -1))
        found.reshape(flat.shape)[:, number] = np.subtract(*ends) / 2e-3
    return found


def by_hand(attack, eps, pictures, labels, params, rows, steps=4, seed=0):
    """(accuracy, loss) under an attack, in float64 with numerical gradients."""
    pictures, labels = pictures[rows].astype(np.float64), labels[rows]
    pixels, step = pictures, eps
    if attack == "pgd":
        keys = example_keys(seed, jnp.int32(0), len(rows))
        noise = jax.vmap(lambda key: jax.random.uniform(key, pictures.shape[1:], jnp.float32, -1, 1))(keys)
        pixels, step = np.clip(pictures + eps * np.asarray(noise), 0, 255), 2.5 * eps / steps
    for _ in range(1 if attack == "fgsm" else steps):
        pixels = pixels + step * np.sign(slope_of(pixels, labels, params))
        pixels = np.clip(np.clip(pixels, pictures - eps, pictures + eps), 0, 255)
    hits = forward(params, pixels / 127.5 - 1).argmax(1) == labels
    return hits.mean(), loss_of(pixels, labels, params).mean()


@pytest.fixture(scope="module")
def found():
    return run()


def test_the_numbers_are_those_of_numerical_gradients(found):
    data, expected = random(), {}
    for attack in ("fgsm", "pgd"):
        for eps in EPS:
            expected |= dict(zip((f"{attack}/eps_{eps:g}/prec@1", f"{attack}/eps_{eps:g}/loss"),
                                 by_hand(attack, eps, *data, np.arange(N)), strict=True))
    clean = by_hand("fgsm", 0, *data, np.arange(N))
    assert found == pytest.approx(expected | {"clean/prec@1": clean[0], "clean/loss": clean[1]}, rel=1e-3)
    # An attack does harm, and more of it with more room.
    for attack in ("fgsm", "pgd"):
        losses = [found[f"{name}/loss"] for name in ("clean", f"{attack}/eps_1", f"{attack}/eps_6")]
        assert losses == sorted(losses) and losses[2] > 1.3 * losses[0]
    assert found["pgd/eps_6/prec@1"] < found["clean/prec@1"]


def test_padding_batch_size_and_devices_change_nothing(found):
    assert run(devices=8, batch_size=64) == pytest.approx(found, rel=1e-5)


def test_an_eps_is_the_same_in_every_normalisation(found):
    assert run(pp=VGG, model=predict_adapted) == pytest.approx(found, rel=1e-4)


def test_without_room_nothing_changes(found):
    still = run(eps=(0.0,), step_size=3.0)
    assert still.keys() == {f"{attack}/{name}" for attack in ("clean", "fgsm/eps_0", "pgd/eps_0")
                            for name in ("prec@1", "loss")}
    for name, value in still.items():
        assert value == found[f"clean/{name.split('/')[-1]}"]


def test_some_examples_are_drawn_and_those_without_a_label_or_broken_do_not_count():
    pictures, labels, params = random()
    rows = draw(N, 20, 3)
    changed = labels.copy()
    changed[rows[4]] = -1
    found = run(labels=changed, broken=(int(rows[9]),), skip_errors=0.2, examples=20, seed=3, attacks=("fgsm",))
    kept = np.delete(rows, (4, 9))
    assert (found["fgsm/eps_6/prec@1"], found["fgsm/eps_6/loss"]) == pytest.approx(
        by_hand("fgsm", 6.0, pictures, labels, params, kept), rel=1e-3)
    assert all(np.isnan(value) for value in run(labels=np.full(N, -1), eps=(1.0,)).values())


@jax.jit
def perturbed(image, attack, keys):
    return perturb(image, jnp.cos, attack, keys)


@pytest.mark.parametrize("eps, steps, begins", [(0.5, 1, False), (8.0, 3, True), (255.0, 5, True), (0.0, 2, True)])
def test_images_stay_in_the_ball_and_among_pixels(eps, steps, begins):
    image = jnp.float32(random()[0][:7])
    attack = Attack(jnp.float32(eps), jnp.float32(eps), jnp.int32(steps), jnp.bool_(begins))
    keys = example_keys(0, jnp.int32(5), 7)
    moved = np.asarray(perturbed(image, attack, keys), np.float64)
    assert moved.min() >= 0 and moved.max() <= 255
    assert np.abs(moved - np.asarray(image)).max() <= eps * (1 + 1e-6)
    assert eps == 0 or np.abs(moved - np.asarray(image)).max() > 0.9 * eps * (eps < 255)
    # Where an image begins is a matter of its place alone.
    later = perturbed(image[3:5], attack, example_keys(0, jnp.int32(8), 2))
    np.testing.assert_array_equal(moved[3:5], later)


@pytest.mark.parametrize("settings, message", [
    (dict(eps=(-1.0,)), "val.eps: is in units of a pixel from 0 to 255, got -1.0"),
    (dict(eps=(1.0, 256.0)), "val.eps: is in units of a pixel from 0 to 255, got 256.0"),
    (dict(eps=(0.03,)), "val.eps: is in units of a pixel from 0 to 255, got 0.03: 8 / 255 is written 8"),
    (dict(eps=()), "val.eps: must be different, and at least one"), (dict(eps=(1.0, 1.0)), "val.eps: must be"),
    (dict(eps=(1.0, 1.0000001)), "val.eps: must be"),
    (dict(attacks=("cw",)), "val.attacks[0]: unknown value 'cw'; Choices: fgsm, pgd"),
    (dict(attacks=()), "val.attacks: must be different"), (dict(steps=0), "val.steps: must be at least 1, got 0"),
    (dict(step_size=0.0), "val.step_size: is in units of a pixel"), (dict(examples=0), "val.examples: must be at"),
    (dict(seed=-1), "val.seed: must be in [0, 2³²)")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(**settings)
    assert str(error.value).startswith(message)
