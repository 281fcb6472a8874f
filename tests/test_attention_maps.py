"""Attention maps and rollout against closed forms; their pictures by the pixels."""
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cb_vit import Model
from cb_vit.analysis.attention_maps import View, patch_map, reading_tokens, rollout
from cb_vit.analysis.attention_pictures import Scale, draw_index, draw_maps, overlay
from cb_vit.monitor.contact_sheet import Line

GRID = (2, 3)


def config(**changes):
    return Model(3, patch_size=4, width=8, depth=2, mlp_dim=8, num_heads=2, **changes).config


def random_attention(*shape, seed=0):
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), shape))


MODELS = [(dict(pool_type="tok"), 1), (dict(pool_type="tok", distilled=True), 2), (dict(pool_type="gap"), 0),
          (dict(pool_type="map"), 0), (dict(pool_type="0"), 0), (dict(pool_type="tok", registers=3), 4),
          (dict(pool_type="map", registers=3), 3)]


@pytest.mark.parametrize("changes, prefix", MODELS)
def test_uniform_attention_is_a_uniform_map(changes, prefix):
    n = 6 + prefix
    attention = jnp.full((2, n, n), 1 / n)
    np.testing.assert_allclose(patch_map(attention, reading_tokens(config(**changes)), GRID), np.ones((2, *GRID)), 1e-6)


@pytest.mark.parametrize("prefix", [1, 2])
def test_a_patch_is_shown_where_it_is(prefix):
    n = 6 + prefix
    for patch in range(6):
        attention = jnp.zeros((n, n)).at[0, prefix + patch].set(1)
        expected = np.zeros(GRID)
        expected[patch // 3, patch % 3] = n  # all of the class token's attention
        np.testing.assert_array_equal(patch_map(attention, slice(0, 1), GRID), expected)


@pytest.mark.parametrize("changes, rows, who", [
    (dict(pool_type="tok"), [0], "the class token"),
    (dict(pool_type="tok", distilled=True), [0, 1], "the class and distillation tokens"),
    (dict(pool_type="0"), [0], "the first token"),
    (dict(pool_type="gap"), range(8), "all tokens, on average"),
    (dict(pool_type="map"), range(8), "all tokens, on average"),
    (dict(pool_type="tok", registers=1), [0], "the class token"),
    (dict(pool_type="gap", registers=2), range(2, 8), "all patches, on average"),
    (dict(pool_type="map", registers=2), range(2, 8), "all patches, on average"),
    (dict(pool_type="none", registers=2), range(8), "all tokens, on average")])
def test_whose_attention_it_is(changes, rows, who):
    attention, model = random_attention(8, 8), config(**changes)
    expected = 8 * np.mean(attention[np.array(rows), 2:], axis=0).reshape(GRID)
    np.testing.assert_allclose(patch_map(attention, reading_tokens(model), GRID), expected, 1e-5)
    assert View(model, GRID, (0,)).who == who


def test_rollout_in_closed_form():
    eye, uniform = (jnp.broadcast_to(a, (2, 3, 5, 5)) for a in (jnp.eye(5), jnp.full((5, 5), 0.2)))
    np.testing.assert_array_equal(rollout([eye] * 3), eye[:, 0])
    # Uniform attention is a projection U: the product of ½ (U + I) over L blocks is U + 2⁻ᴸ (I - U).
    np.testing.assert_allclose(rollout([uniform] * 3), uniform[:, 0] + (eye - uniform)[:, 0] / 8, rtol=1e-6)


def test_rollout_goes_from_the_first_block_to_the_last():
    blocks = [random_attention(2, 3, 5, 5, seed=seed) for seed in range(3)]
    first, second, third = (np.asarray(block, np.float64).mean(1) / 2 + np.eye(5) / 2 for block in blocks)
    found = rollout(blocks)
    np.testing.assert_allclose(found, third @ second @ first, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), np.ones((2, 5)), rtol=1e-6)


def test_the_maps_of_a_model():
    model = Model(3, patch_size=4, width=48, depth=2, mlp_dim=8, num_heads=12, pool_type="tok")
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    _, out = jax.jit(lambda: model.init_with_output(jax.random.key(1), images, attention=True)[0])()
    first, last = (np.asarray(out["encoder"][f"block{i:02d}"]["attention"]) for i in range(2))
    by_hand = lambda attention: 7 * attention[:, 0, 1:].reshape(2, 2, 3)  # noqa: E731

    one = View(model.config, GRID, (1,))
    assert one.titles == ("block 1, mean of heads", *(f"head {i}" for i in range(12)))
    maps = one.maps(out["encoder"])
    assert maps.shape == (2, 13, 2, 3)
    np.testing.assert_allclose(maps[:, 0], by_hand(last.mean(1)), rtol=1e-5)
    np.testing.assert_allclose(maps[:, 11], by_hand(last[:, 10]), rtol=1e-5)

    both = View(model.config, GRID, (1, 0), rollout=True)
    assert both.titles == ("rollout", "block 1", "block 0")
    maps, flow = both.maps(out["encoder"]), rollout([jnp.asarray(first), jnp.asarray(last)])
    np.testing.assert_allclose(maps[:, 0], by_hand(np.asarray(flow)), rtol=1e-5)
    np.testing.assert_allclose(maps[:, 2], by_hand(first.mean(1)), rtol=1e-5)


def test_colours_over_grey():
    rng = np.random.default_rng(0)
    image, colours = rng.random((4, 5, 3)), rng.random((4, 5, 3))
    grey = (image @ [0.299, 0.587, 0.114])[..., None]
    np.testing.assert_allclose(overlay(image, colours, np.zeros((4, 5))), np.broadcast_to(grey, (4, 5, 3)))
    np.testing.assert_allclose(overlay(image, colours, np.ones((4, 5))), 0.2 * grey + 0.8 * colours)


@pytest.mark.parametrize("low, high", [(0.9, 1.1), (0.02, 7.0), (0.3, 0.31)])
def test_a_scale_spans_what_there_is(low, high):
    scale = Scale.of(np.linspace(low, high, 1001))
    assert scale.high == pytest.approx(high, rel=0.01)
    assert scale.low == pytest.approx(max(low + 0.005 * (high - low), scale.high / 100))
    assert scale.extend == "both"
    found = scale.strength(np.array([0, scale.low, np.sqrt(scale.low * scale.high), scale.high, 99]))
    np.testing.assert_allclose(found, [0, 0, 0.5, 1, 1], atol=1e-12)
    assert scale.ticks()[0] == pytest.approx(scale.low) and scale.ticks()[-1] == pytest.approx(scale.high)


def test_a_scale_shows_neither_noise_nor_more_than_two_decades():
    flat = Scale.of(1 + 1e-6 * np.random.default_rng(0).normal(size=500))
    np.testing.assert_allclose((flat.low, flat.high), (1 / 1.02**0.5, 1.02**0.5), rtol=1e-5)
    assert flat.extend == "neither"
    np.testing.assert_allclose(flat.strength(np.ones(3)), 0.5, atol=1e-3)
    steep = Scale.of(np.array([0] * 50 + [50.0] * 50))
    assert (steep.low, steep.high, steep.extend) == (0.5, 50, "min")
    nothing = Scale.of(np.zeros(9))
    np.testing.assert_array_equal(nothing.strength(np.zeros(9)), 0)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int32)


@pytest.mark.parametrize("shape", [(8, 12, 3), (240, 180, 1)])
def test_a_picture(shape):
    image = np.full(shape, 100, np.uint8)
    hot = np.zeros(GRID)
    hot[0, 2] = 7
    drawn = pixels(draw_maps(image, {"hot": hot, "cold": np.zeros(GRID)}, "a $title$", "a note"))
    # Inches at 120 dots: three tiles, with gaps, margin and bar; the head, one row and a margin.
    tile = 1.9 * shape[0] / shape[1]
    np.testing.assert_allclose(drawn.shape[:2], (120 * (0.98 + tile + 0.15), 120 * (0.15 + 3 * 2.02 + 0.75)), atol=1)
    at = lambda column, y, x: drawn[int(120 * (0.98 + y * tile)), int(120 * (0.15 + column * 2.02 + x * 1.9))]  # noqa: E731
    np.testing.assert_array_equal(at(0, 0.5, 0.5), [100] * 3)  # the input, as it is
    np.testing.assert_array_equal(at(2, 0.5, 0.5), [100] * 3)  # no attention: the image in grey
    np.testing.assert_array_equal(at(1, 0.9, 0.1), [100] * 3)
    assert at(1, 0.15, 0.9).sum() > 500


def test_many_maps_stand_in_rows_and_uniform_ones_are_even():
    image = np.zeros((8, 12, 3), np.uint8)
    drawn = pixels(draw_maps(image, {str(i): np.ones(GRID) for i in range(8)}, ""))
    tile = 1.9 * 8 / 12
    expected = 120 * (0.98 + 2 * tile + 0.32 + 0.15), 120 * (0.15 + 5 * 2.02 + 0.75)
    np.testing.assert_allclose(drawn.shape[:2], expected, atol=1)
    row = drawn[int(120 * (0.98 + tile / 2)), int(120 * (0.15 + 2.02)) + 5:int(120 * (0.15 + 2.02 + 1.9)) - 5]
    assert (row == row[0]).all() and 10 < row[0].max() < 200  # of the middle of the scale


def test_a_map_that_hardly_differs_from_uniform_shows_its_structure():
    weak = np.full(GRID, 0.95)
    weak[0, 2] = 1.05
    picture = Scale.of(weak).paint(np.full((60, 90, 1), 100, np.uint8), weak)
    np.testing.assert_array_equal(picture[55, 5], [100] * 3)
    assert np.abs(picture[5, 85].astype(int) - 100).max() > 100


def test_a_map_on_another_level_leaves_the_others_their_colours():
    image, weak = np.full((8, 12, 3), 100, np.uint8), np.linspace(0.95, 1.05, 6).reshape(GRID)
    alone, beside = (pixels(draw_maps(image, maps, "", apart=("rollout",)))
                     for maps in ({"weak": weak}, {"weak": weak, "rollout": weak / 9}))
    at = slice(int(120 * 0.98) + 2, int(120 * (0.98 + 1.9 * 8 / 12)) - 2)
    first, second = (slice(int(120 * (0.15 + i * 2.02)) + 2, int(120 * (0.15 + i * 2.02 + 1.9)) - 2) for i in (1, 2))
    np.testing.assert_array_equal(alone[at, first], beside[at, first])
    assert np.abs(beside[at, first] - beside[at, second]).max() < 12  # alike, each on its own scale


def test_an_index_shows_images_and_maps_side_by_side():
    images = [np.full((16, 16, 3), 10 * number, np.uint8) for number in range(5)]
    maps = [np.full(GRID, 1.0 + number) for number in range(5)]
    drawn = pixels(draw_index(images, maps, [[Line("name")]] * 5, "title", "what"))
    for number in range(1, 5):
        assert (drawn == 10 * number).all(-1).sum() >= 160 * 160
    assert (drawn == 10).all(-1).sum() == 160 * 160  # its map is coloured; that of 0 is the image in grey
