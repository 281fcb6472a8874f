"""Density of attention against its definitions in float64, from whole maps; the evaluator on any number of devices."""
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import Numbered

from cb_vit import Model, dist
from cb_vit.analysis.attention_measures import DISTANCE, MEASURES, Density, by_block
from cb_vit.analysis.density import read_density
from cb_vit.analysis.density_sums import Spread
from cb_vit.config import ConfigError
from cb_vit.evaluators import attention_density, common
from cb_vit.evaluators.attention_density import Evaluator
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState

GRID, PATCH, K = (2, 3), (2, 4), 3
# Row by row, a 2×3 grid of patches two pixels high and four wide.
DISTANCES = np.sqrt([[0, 16, 64, 4, 20, 68], [16, 0, 16, 20, 4, 20], [64, 16, 0, 68, 20, 4],
                     [4, 20, 68, 0, 16, 64], [20, 4, 20, 16, 0, 16], [68, 20, 4, 64, 16, 0]])


def of_map(a, prefix):
    """What one map [n n] says, by its definition: (queries, keys, measure) → value; inf: not defined."""
    a, found = np.asarray(a, np.float64), {}
    tokens = {"all": slice(None), "patches": slice(prefix, None), "prefix": slice(prefix)}
    for queries, keys in itertools.product(tokens if prefix else ("all", "patches"), ("all", "patches")):
        rows = a[tokens[queries], tokens[keys]]
        rows = rows[rows.sum(1) > 0]
        p = rows / rows.sum(1, keepdims=True)
        n = a[:, tokens[keys]].shape[1]
        entropies = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
        jacobians = [np.square(np.diag(row) - np.outer(row, row)).sum() for row in p]
        singular = np.linalg.svd(p, compute_uv=False) if len(p) else np.zeros(1)
        values = dict(
            entropy=entropies, entropy_normalised=entropies / math.log(n), effective_tokens=np.exp(entropies),
            top_k_mass=np.sort(p, 1)[:, -K:].sum(1), distance_from_uniform=np.abs(p - 1 / n).sum(1) / 2,
            rank=[(singular**2).sum() ** 2 / (singular**4).sum()] if len(p) else [], jacobian=jacobians)
        if queries == keys == "patches":
            values[DISTANCE] = (p * DISTANCES[a[prefix:, prefix:].sum(1) > 0]).sum(1)
        found |= {(queries, keys, name): np.mean(value) if len(value) else np.inf for name, value in values.items()}
    return found


def of_maps(maps, density):
    """The same for [i h n n], in the order of `series`: [i h s]."""
    order = [series[:3] for series in density.series]
    return np.array([[[of_map(a, density.prefix)[key] for key in order] for a in heads] for heads in maps])


def softmax(scale, prefix, shape=(4, 2), seed=0):
    n = 6 + prefix
    z = scale * np.random.default_rng(seed).normal(size=(*shape, n, n))
    return scipy.special.softmax(z, -1).astype(np.float32)


def assert_close(found, expected, density):
    for number, (queries, keys, name, low, high, _) in enumerate(density.series):
        np.testing.assert_allclose(found[..., number], expected[..., number], rtol=1e-5, atol=1e-6 * max(high, 1),
                                   err_msg=f"{name} of {queries} over {keys}")
        inside = found[..., number][np.isfinite(found[..., number])]
        assert (inside > low - 1e-5).all() and (inside < high * (1 + 1e-5) + 1e-5).all()


@pytest.fixture(scope="module", params=[0, 2], ids="prefix {}".format)
def reduce(request):
    density = Density(GRID, PATCH, request.param, K)
    return density, jax.jit(density)


def test_every_measure_is_its_definition(reduce):
    density, function = reduce
    maps = [softmax(scale, density.prefix, seed=int(10 * scale)) for scale in (0.01, 2, 30)]
    maps.append(maps[1].astype(jnp.bfloat16).astype(np.float32))  # whose rows do not sum to 1
    assert np.abs(maps[-1].sum(-1) - 1).max() > 1e-4
    for a in maps:
        assert_close(np.asarray(function(a)), of_maps(a, density), density)


def test_uniform_one_hot_and_permuted_attention(reduce):
    density, function = reduce
    n, prefix = 6 + density.prefix, density.prefix
    uniform, last = np.full((n, n), 1 / n), np.broadcast_to(np.eye(n)[-1], (n, n))
    shuffled = np.eye(n)[np.random.default_rng(0).permutation(n)]
    maps = np.stack([uniform, last, np.eye(n), shuffled] * 2).astype(np.float32).reshape(4, 2, n, n)
    found = np.asarray(function(maps)).reshape(8, -1)[:4]
    at = {series[:3]: number for number, series in enumerate(density.series)}
    for queries, keys in {key[:2] for key in at}:
        say = lambda name: found[:, at[queries, keys, name]]  # noqa: B023, E731
        m, q = n if keys == "all" else 6, {"all": n, "patches": 6, "prefix": prefix}[queries]
        expected = dict(entropy=math.log(m), entropy_normalised=1, effective_tokens=m, top_k_mass=min(K / m, 1),
                        distance_from_uniform=0, rank=1, jacobian=(m - 1) / m**2)
        for name, value in expected.items():
            assert say(name)[0] == pytest.approx(value, rel=1e-5, abs=1e-6), (queries, keys, name)
        expected = dict(entropy=0, entropy_normalised=0, effective_tokens=1, top_k_mass=1,
                        distance_from_uniform=1 - 1 / m, rank=1, jacobian=0)
        for name, value in expected.items():
            assert say(name)[1] == pytest.approx(value, rel=1e-5, abs=1e-6), (queries, keys, name)
        if queries == "all":
            np.testing.assert_allclose(say("rank")[2:], m, rtol=1e-6)  # of a permutation
        elif (queries, keys) == ("prefix", "patches"):  # the identity gives the patches nothing there
            assert all(say(name)[2] == np.inf for name in MEASURES)
        elif queries == keys == "patches":
            assert say("rank")[2] == pytest.approx(q)
    pixels = found[:, at["patches", "patches", DISTANCE]]
    np.testing.assert_allclose(pixels[:3], [DISTANCES.mean(), DISTANCES[:, -1].mean(), 0], rtol=1e-6, atol=1e-6)


def test_hardly_any_attention_to_the_patches_is_as_good_as_all_of_it(reduce):
    density, function = reduce
    a, prefix = softmax(2, density.prefix), density.prefix
    if prefix:
        a[..., prefix:] *= 1e-30
        a[0, 0, 3] = np.eye(6 + prefix)[0]  # and one query gives them none
    assert_close(np.asarray(function(a)), of_maps(a, density), density)


def test_what_is_not_finite_stays_so(reduce):
    density, function = reduce
    a = softmax(1, density.prefix)
    a[0, 0, -1] = np.nan
    found = np.asarray(function(a))
    assert np.isnan(found[0, 0][[series.queries != "prefix" for series in density.series]]).all()
    assert np.isfinite(found[0, 1]).all() and np.isfinite(found[1:]).all()


# Sums over images.


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4, 40, 200), (500,)])
def test_mean_spread_and_quantiles_are_those_of_numpy(sizes):
    density, rng = Density(GRID, PATCH, 1, K), np.random.default_rng(1)
    names = dict.fromkeys(MEASURES)
    series = [next(s for s in density.series if s.measure == name and s.queries == "all") for name in names]
    values = np.stack([s.low + (s.high - s.low) * rng.beta(2, 9, (sum(sizes), 2)) for s in series], -1)
    values[0] = [s.high for s in series]
    if len(values) > 2:
        values[1, 0] = np.inf
        values[2, 1, 3] = np.nan
    spread, start = Spread(series), 0
    for size in sizes:
        spread.add(values[start:start + size].astype(np.float32))
        start += size
    for place in np.ndindex(2, len(series)):
        s, own = series[place[1]], values[(slice(None), *place)]
        own = own[own != np.inf]
        if np.isnan(own).any():
            assert all(np.isnan(x[place]) for x in (spread.mean, spread.std, spread.quantile(0.5)))
            continue
        found = spread.mean[place], spread.std[place]
        np.testing.assert_allclose(found, (own.mean(), own.std()), rtol=1e-5, atol=1e-7)
        low, high = s.scale.forth((s.low, s.high))
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            expected = np.quantile(own, q)
            ends = np.sort(own)[[math.floor(q * (len(own) - 1)), math.ceil(q * (len(own) - 1))]]
            bin_ = s.scale.back(np.clip(s.scale.forth(ends) + (high - low) / 512, low, None)) - ends
            assert abs(spread.quantile(q)[place] - expected) <= bin_.max() + 1e-6


def test_digits_do_not_cancel():
    density = Density(GRID, PATCH, 0, K)
    values = np.full((1000, 1, len(density.series)), 1.5) + 1e-6 * np.random.default_rng(0).normal(size=(1000, 1, 1))
    spread = Spread(density.series)
    for part in np.split(values, 100):
        spread.add(part)
    np.testing.assert_allclose(spread.std[0], values.std(0)[0], rtol=1e-6)


# The evaluator.

N, BROKEN = 11, (4,)


class Pictures(Numbered):
    """Example i is an image of noise."""

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 12, 3), np.uint8)
        return super().__getitem__(index) | {"image": pixels}


MODEL = dict(patch_size=PATCH, width=16, depth=2, mlp_dim=8, num_heads=2, pool_type="tok", distilled=True)


@pytest.fixture(scope="module")
def whole():
    """Parameters in loop layout, and the numbers of each readable image by definition, from whole maps: [i l h s]."""
    model = Model(3, **MODEL)
    images = np.stack([Pictures([0] * N, 3)[i]["image"] for i in range(N) if i not in BROKEN]) / np.float32(127.5) - 1
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), images[:1])["params"], np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    encoder = jax.jit(lambda params: model.apply({"params": params}, images, attention=True)[1]["encoder"])(params)
    density = Density(GRID, PATCH, 2, K)
    return params, np.stack([of_maps(encoder[f"block{i:02d}"]["attention"], density) for i in range(2)], 1), density


def build(params, devices, batch_size, scan=False, **settings):
    model = Model(3, **MODEL, scan=scan)
    mesh = dist.create_mesh([("data", -1)], devices=jax.devices()[:devices])
    config = common.read_evaluator(dict(
        type="attention_density", log_steps=5, data=dict(name="fake", split="test"), pp_fn="value_range(-1, 1)",
        batch_size=batch_size, prefix="density/", num_workers=0, num_threads=2, prefetch=2, skip_errors=0.2,
        top_k=K) | settings, "val")
    sharding = dist.batch_sharding(mesh, "data")
    pipeline = Pipeline(config, Pictures([0] * N, 3, BROKEN), config.pp_fn, dist.local_rows(sharding, batch_size))
    if scan:
        blocks = params["Transformer"]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[f"encoderblock_{i}"] for i in range(2)))
        params = params | {"Transformer": {"encoderblock": stacked, "encoder_norm": blocks["encoder_norm"]}}
    state = TrainState(jnp.int32(7), params, (), jnp.asarray(True))
    return (Evaluator(lambda state, images, **options: model.apply({"params": state.params}, images, **options),
                      config=config, sharding=sharding, pipeline=pipeline),
            jax.device_put(state, dist.replicated(mesh)))


@pytest.mark.parametrize("devices, batch_size, scan", [(1, 4, False), (8, 16, True)])
def test_batches_devices_padding_and_scan_change_nothing(devices, batch_size, scan, whole):
    params, expected, density = whole
    evaluator, state = build(params, devices, batch_size, scan)
    metrics = dict(evaluator.run(state))
    at = {series[:3]: number for number, series in enumerate(density.series)}
    for name in (*MEASURES, DISTANCE):
        where = at[("all", "all", name) if name in MEASURES else ("patches", "patches", name)]
        assert metrics.pop(name) == pytest.approx(expected[..., where].mean(), rel=1e-5)
    blocks = expected[..., at["all", "all", "entropy_normalised"]].mean((0, 2))
    assert metrics == {f"block{i:02d}/entropy_normalised": pytest.approx(blocks[i], rel=1e-5) for i in range(2)}

    files = dict(evaluator.files())
    rows = {row[:5]: row for row in read_density(files["density.csv"])}
    assert len(rows) == 2 * 3 * len(density.series) and files["density.png"].startswith(b"\x89PNG")
    heads = np.concatenate([expected, expected.mean(2, keepdims=True)], 2)
    for (block, head, number), mean in np.ndenumerate(heads.mean(0)):
        row = rows[block, "all" if head == 2 else str(head), *density.series[number][:3]]
        np.testing.assert_allclose(row.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row.std, heads[:, block, head, number].std(), rtol=2e-4, atol=2e-6)
        assert row.q05 <= row.q25 <= row.q50 <= row.q75 <= row.q95


def test_labels_are_not_looked_at():
    assert attention_density.NEEDS_CLASSES is False


def test_blocks_stand_in_their_order():
    encoder = {f"block{i:02d}": {"attention": np.full((1, 1, 1), i, np.float32)} for i in range(101)} | {"pre_ln": None}
    np.testing.assert_array_equal(by_block(encoder)[0, :, 0, 0], np.arange(101))


@pytest.mark.parametrize("settings, message", [
    (dict(top_k=0), "val.top_k: is a number of keys, at least 1, got 0"),
    (dict(prefix="checkpoints/"), "val.prefix: 'checkpoints/' is to be a folder of the run's own")])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        build({}, 1, 4, **settings)
    assert str(error.value).startswith(message)


def test_one_patch_is_refused():
    with pytest.raises(ConfigError, match="^images: make one patch, and attention between patches needs two"):
        Density((1, 1), PATCH, 1, K)
