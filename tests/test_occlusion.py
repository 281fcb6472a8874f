"""Hidden and shuffled patches against loops in NumPy; which are hidden first; files; any devices."""
import csv
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Pictures, open_evaluator
from PIL import Image

import cb_vit
from cb_vit.config import ConfigError
from cb_vit.evaluators.attack import example_keys
from cb_vit.evaluators.patches import draw_looks, hidden, hide, shuffle
from cb_vit.monitor.occlusion import draw_occlusion

N, CLASSES, GRID, PATCH = 37, 3, (2, 3), 2
HEIGHT, WIDTH = GRID[0] * PATCH, GRID[1] * PATCH
PP = f"value_range(0, 1)|onehot({CLASSES})|keep('image', 'labels')"
WAYS = ("random", "centre", "outer", "salient", "non_salient")
FILES = ["occluded.png", "occlusion.csv", "occlusion.png"]


def random():
    """(pictures, labels, parameters of a model that sums pixels); most labels are what it says."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N, HEIGHT, WIDTH, 3), np.uint8)
    params = {"weights": rng.normal(size=(HEIGHT * WIDTH * 3, CLASSES)), "bias": np.array([0.1, 0.0, 0.0])}
    labels = logits_of(pictures, params).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return pictures, labels, params


def logits_of(pixels, params):
    return (pixels / 255).reshape(len(pixels), -1) @ params["weights"] + params["bias"]


def attention_of(images, xp=np):
    """[b h n m] of two heads, with a class token and one more before the patches, which look at bright patches."""
    patches = images.reshape(len(images), GRID[0], PATCH, GRID[1], PATCH, 3).sum((2, 4, 5))
    patches = patches.reshape(len(images), 1, 1, -1)
    rows = xp.concatenate([xp.zeros((len(images), 1, 1, 2)), patches], axis=3)
    return xp.concatenate([rows, rows**2], axis=1) + xp.zeros((1, 1, 8, 1))


def predict(state, images, attention=None):
    logits = images.reshape(len(images), -1) @ state.params["weights"] + state.params["bias"][None]
    out = {"stem": jnp.zeros((len(images), *GRID, 1))}
    if attention:
        # Of the last block alone, and of the class token alone.
        seen = attention_of(images, jnp)
        blocks = {"block00": {"attention": attention(-seen)},
                  "block01": {"attention": attention(jnp.concatenate([seen[:, :, :1], -seen[:, :, 1:]], axis=2))}}
        out["encoder"] = {**blocks, "pre_ln": jnp.zeros((1, 1, 1))}
    return logits, out


def build(token=True, labels=None, broken=(), **settings):
    pictures, known, params = random()
    params = jax.tree.map(jnp.float32, params) | ({"cls": jnp.zeros(1)} if token else {})
    source = Pictures(pictures, known if labels is None else labels, CLASSES, broken)
    return open_evaluator("occlusion", {"data": source}, predict, params, PP,
                          **dict(ways=WAYS, ratios=(0.0, 0.4, 1.0), shuffle=(1, 2)) | settings)


def run(**settings):
    evaluator, state = build(**settings)
    return dict(evaluator.run(state))


def order_of(way, picture, params, token):
    """Numbers of the patches of an image in the order in which they go."""
    if way in ("centre", "outer"):
        distance = [((y + 0.5) / 2 - 0.5) ** 2 + ((x + 0.5) / 3 - 0.5) ** 2 for y in range(2) for x in range(3)]
        return np.argsort(np.array(distance, np.float32) * (1 if way == "centre" else -1), kind="stable")
    if token:
        salience = attention_of(picture[None] / 255)[0, :, 0].mean(0)[-6:]
    else:  # the gradient of a sum is its weights
        slope = np.abs(params["weights"][:, logits_of(picture[None], params)[0].argmax()]).reshape(HEIGHT, WIDTH, 3)
        salience = slope.reshape(GRID[0], PATCH, GRID[1], PATCH, 3).sum((1, 3, 4)).ravel()
    return np.argsort(-salience if way == "salient" else salience, kind="stable")


def without(picture, patches):
    picture = picture.copy()
    for number in patches:
        y, x = divmod(int(number), GRID[1])
        picture[y * PATCH:(y + 1) * PATCH, x * PATCH:(x + 1) * PATCH] = 0
    return picture


@pytest.fixture(scope="module")
def found():
    return run()


@pytest.mark.parametrize("token", [True, False])
def test_the_accuracies_are_those_of_a_loop(found, token):
    pictures, labels, params = random()
    metrics = found if token else run(token=False)
    for way in WAYS[1:]:
        changed = np.stack([without(one, order_of(way, one, params, token)[:2]) for one in pictures])  # 40 % of 6 are 2
        assert metrics[f"{way}/0.4/prec@1"] == pytest.approx(np.mean(logits_of(changed, params).argmax(1) == labels))
    clean = np.mean(logits_of(pictures, params).argmax(1) == labels)
    for way in WAYS:
        assert metrics[f"{way}/0/prec@1"] == metrics["clean/prec@1"] == metrics["shuffle/1/prec@1"]
        assert metrics["clean/prec@1"] == pytest.approx(clean)
        assert metrics[f"{way}/1/prec@1"] == pytest.approx(np.mean(labels == 0))  # the bias alone is left
    assert len(metrics) == 1 + 5 * 3 + 2 and len({metrics[f"{way}/0.4/prec@1"] for way in WAYS}) > 2


def test_padding_batch_size_and_devices_change_nothing(found):
    assert run(devices=8, batch_size=24) == found


def test_every_image_has_an_order_of_its_own_that_is_the_same_at_every_share():
    _, state = build()
    model, pixels = functools.partial(predict, state), jnp.zeros((6, HEIGHT, WIDTH, 3))
    looks, later, other = jax.jit(lambda: [
        draw_looks(("random",), (1, 2), model, pixels[:count], example_keys(seed, jnp.int32(first), count),
                   has_class_token=True) for seed, first, count in ((0, 0, 6), (0, 4, 2), (1, 0, 6))])()
    ranks, places = looks.ranks["random"], looks.places[2]
    assert all(sorted(one.ravel().tolist()) == list(range(6)) for one in ranks)
    assert all(sorted(one.tolist()) == list(range(4)) for one in places)
    assert len({str(one) for one in ranks}) > 3 and len({str(one) for one in places}) > 3
    assert (other.ranks["random"] != ranks).any()
    np.testing.assert_array_equal(later.ranks["random"], ranks[4:])  # where an image stands is all that counts
    np.testing.assert_array_equal(later.places[2], places[4:])


@pytest.mark.parametrize("fill, value", [("black", 0), ("mean", 127.5)])
def test_what_is_hidden_is_black_or_what_normalising_takes_to_0(fill, value):
    evaluator, _ = build(fill=fill, pp_fn=PP.replace("(0, 1)", "(-1, 1)"))
    pictures, gone = random()[0], np.random.default_rng(1).random((N, *GRID)) < 0.5
    expected = pictures.astype(np.float32)
    expected[gone.repeat(PATCH, 1).repeat(PATCH, 2)] = value
    np.testing.assert_allclose(hide(jnp.float32(pictures), jnp.asarray(gone), evaluator._fill), expected, atol=1e-3)


def test_tiles_move_whole():
    pictures, rng = random()[0], np.random.default_rng(2)
    places = np.stack([rng.permutation(4) for _ in range(N)])
    moved = np.asarray(shuffle(jnp.float32(pictures), jnp.asarray(places), tiles=2))
    tile = lambda image, number: image[number // 2 * 2:][:2, number % 2 * 3:][:, :3]  # noqa: E731
    for before, after, own in zip(pictures, moved, places, strict=True):
        for number in range(4):
            np.testing.assert_array_equal(tile(after, number), tile(before, own[number]))


@pytest.mark.parametrize("share, patches, expected", [
    (0.29, 100, 29), (0.7, 10, 7), (0.1, 196, 19), (0.9, 196, 176), (0.0, 9, 0), (1.0, 9, 9)])
def test_shares_are_rounded_down(share, patches, expected):
    assert hidden(share, patches) == expected


def test_the_files_say_what_was_measured(found):
    evaluator, state = build(examples=20, skip_errors=0.2, broken=(0, 3))
    metrics, files = dict(evaluator.run(state)), dict(evaluator.files())
    assert sorted(files) == FILES
    rows = list(csv.DictReader(io.StringIO(files["occlusion.csv"])))
    names = [row["way"] + ("" if row["way"] == "clean" else f"/{row['ratio'] or row['tiles']}") for row in rows]
    assert {f"{name}/prec@1": float(row["prec@1"]) for name, row in zip(names, rows, strict=True)} == pytest.approx(
        metrics, abs=1e-6)
    assert {int(row["examples"]) for row in rows} <= {18, 19, 20}
    for name in ("occluded.png", "occlusion.png"):
        assert Image.open(io.BytesIO(files[name])).format == "PNG"


def test_without_labels_there_is_nothing_to_measure_but_something_to_draw():
    evaluator, state = build(labels=np.full(N, -1), ways=(), ratios=(), shuffle=(2,), examples=8)
    assert all(np.isnan(value) for value in dict(evaluator.run(state)).values())
    assert sorted(dict(evaluator.files())) == FILES
    assert draw_occlusion({"random": [(0.0, 0.5)], "outer": [(0.0, np.nan)]}, [], "").startswith(b"\x89PNG")


def test_salience_is_the_class_tokens_attention_in_the_last_block():
    model, rng = cb_vit.Model(CLASSES, variant="mu/4", pool_type="tok"), np.random.default_rng(0)
    images, key = jnp.float32(rng.random((2, 8, 12, 3))), jax.random.key(0)
    shapes = jax.eval_shape(lambda: model.init(key, images)["params"])
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    last = f"block{model.config.depth - 1:02d}"

    @jax.jit
    def both(params):
        call = lambda pixels, **kw: model.apply({"params": params}, pixels, **kw)  # noqa: E731
        looks = draw_looks(("salient",), (), call, images, jax.random.split(key, 2), has_class_token=True)
        return looks.ranks["salient"], call(images, attention=True)[1]["encoder"][last]["attention"]

    ranks, attention = both(params)
    for rank, seen in zip(ranks, attention.mean(1)[:, 0, 1:], strict=True):
        np.testing.assert_array_equal(np.argsort(rank.ravel()), np.argsort(-seen, kind="stable"))


@pytest.mark.parametrize("settings, message", [
    (dict(ratios=(-0.1,)), "val.ratios: are shares from 0 to 1, got -0.1"), (dict(ratios=(1.1,)), "val.ratios: are"),
    (dict(ratios=(0.5, 0.5)), "val.ratios: must be different"), (dict(ways=("left",)), "val.ways[0]: unknown value"),
    (dict(shuffle=(4,)), "val.shuffle: 4 rows and columns of tiles do not divide images of 4×6 pixels"),
    (dict(shuffle=(0,)), "val.shuffle: is a number of rows and columns, at least 1; got 0"),
    (dict(ways=(), shuffle=()), "val.ways: and ratios, or shuffle, say what is measured, and all are empty"),
    (dict(fill="white"), "val.fill: unknown value 'white'"), (dict(examples=0), "val.examples: must be at least 1"),
    (dict(prefix="/"), "val.prefix: '/' is to be a folder of the run's own"), (dict(seed=2**32), "val.seed: must be")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build(**settings)
    assert str(error.value).startswith(message)


def test_a_model_that_does_not_say_its_patches_is_refused():
    with pytest.raises(ConfigError, match="^type: 'occlusion' hides patches, and the model does not say"):
        build()[0].check(None, {"pre_logits": None})
