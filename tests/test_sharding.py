"""Where state lives: rules by name, and what they save."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cb_vit import dist, sharding
from cb_vit.config import ConfigError
from cb_vit.models import vit
from cb_vit.train_state import create, state_shapes, state_shardings
from cb_vit.tree import map_with_names

MESH = dist.create_mesh([("data", -1), ("model", 2)])  # 4 × 2
EVERYTHING = "fsdp(axis='data', min_size_to_shard_mb=0)"


def infer(tree, strategy, mesh=None):
    return sharding.infer(tree, sharding.parse_strategy(strategy, "config.sharding_strategy"), mesh or MESH)


def spec(shape, rules, mesh=MESH, dtype=jnp.float32):
    tree = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    return infer(tree, [("w", rules)], mesh)["w"].spec


@pytest.mark.parametrize("shape, rules, expected", [
    # fsdp: the longest axis that is free and divides
    ((8, 16, 12), EVERYTHING, P(None, "data")),
    ((8, 18, 12), EVERYTHING, P(None, None, "data")),  # 18 is longest, but not divisible by 4
    ((7, 9), EVERYTHING, P()),
    ((8, 8), EVERYTHING, P("data")),  # the first of equals
    ((), EVERYTHING, P()),
    ((12, 16), "fsdp(axis=('data', 'model'), min_size_to_shard_mb=0)", P(None, ("data", "model"))),
    ((12, 20), "fsdp(axis=('data', 'model'), min_size_to_shard_mb=0)", P()),  # neither divides by 8
    # shard_dim, from the front and from the end
    ((8, 6), "shard_dim('model', 1)", P(None, "model")),
    ((3, 8, 6), "shard_dim('model', -1)", P(None, None, "model")),
    ((8, 6), "shard_dim('model', -2)", P("model")),
    ((8, 6), "shard_dim(('data', 'model'), 0)", P(("data", "model"))),
    # several rules, left to right: fsdp takes what tensor parallelism leaves
    ((8, 16), f"shard_dim('model', 1)|{EVERYTHING}", P("data", "model")),
    ((8, 16), f"{EVERYTHING}|replicate|shard_dim('model', 0)", P("model")),
    ((8, 16), "replicate", P()),
    ((8, 16), "", P()),
])
def test_rules(shape, rules, expected):
    assert spec(shape, rules) == expected


def test_fsdp_leaves_small_arrays_whole():
    assert spec((1024, 1023), "fsdp('data')") == P()  # just below 4 MiB
    assert spec((1024, 1024), "fsdp('data')") == P("data")
    assert spec((1024, 1024), "fsdp('data')", dtype=jnp.bfloat16) == P()
    assert spec((1024, 1024), "fsdp('data', min_size_to_shard_mb=2)", dtype=jnp.bfloat16) == P("data")


@pytest.mark.parametrize("rules, error", [
    ("shard_dim('model', 2)", r"w: an array of shape \(8, 9\) has no axis 2"),
    ("shard_dim('model', -3)", r"w: an array of shape \(8, 9\) has no axis -3"),
    ("shard_dim('model', 1)", r"w: axis 1 of an array of shape \(8, 9\) is not divisible by 'model' = 2"),
    ("shard_dim('model', 0)|shard_dim('data', -2)", r"w: axis -2 of an array of shape \(8, 9\) is sharded twice"),
    ("shard_dim('modle', 0)", "w: the mesh has no axis 'modle'; config.mesh has data, model"),
    ("fsdp(('data', 'x'), 0)", "w: the mesh has no axis 'x'; config.mesh has data, model"),
])
def test_rules_that_do_not_fit_their_leaf(rules, error):
    with pytest.raises(ConfigError, match=f"^config.sharding_strategy: {error}$"):
        spec((8, 9), rules)


@pytest.mark.parametrize("rules", [
    f"shard_dim('data', 1)|{EVERYTHING}", "shard_dim('model', 0)|shard_dim(('data', 'model'), 1)"])
def test_a_mesh_axis_shards_an_array_once(rules):
    with pytest.raises(ConfigError, match=r": w: mesh axis '\w+' shards two axes of an array of shape \(8, 16\)$"):
        spec((8, 16), rules)


@pytest.mark.parametrize("rules, error", [
    ("fdsp('data')", "unknown sharding rule 'fdsp'; did you mean fsdp"),
    ("zero", "unknown sharding rule 'zero'; Choices: fsdp, replicate, shard_dim"),
    ("shard_dim('data')", r"\"shard_dim\('data'\)\": missing a required argument: 'dim'. It takes shard_dim\(axis"),
    ("fsdp(axis=3)", r"'fsdp\(axis=3\)': axis: expected a string or a list, each entry a string, got 3"),
    ("shard_dim('data', 'x')", ".*: dim: expected a whole number, got 'x'"),
    ("fsdp('data', '4')", ".*: min_size_to_shard_mb: expected a number, got '4'"),
    ("fsdp(", r"cannot read 'fsdp\('"),
])
def test_rules_that_cannot_be_read_are_found_without_a_mesh(rules, error):
    with pytest.raises(ConfigError, match=rf"^config.x\[1\]: {error}"):
        sharding.parse_strategy([(".*", "replicate"), ("w", rules)], "config.x")


TREE = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in ("head", "body", "neck")}


def test_the_first_regex_that_matches_decides_and_the_rest_is_replicated():
    strategy = [("head", "replicate"), ("head|body", EVERYTHING), ("body", "shard_dim('model', 0)")]
    placed = infer(TREE, strategy)
    assert {name: leaf.spec for name, leaf in placed.items()} == {"head": P(), "body": P("data"), "neck": P()}
    assert all(leaf.mesh is MESH for leaf in placed.values())


def test_a_regex_that_matches_nothing():
    for strategy in ([(".*", "replicate"), ("haed", "replicate")], [("head", "replicate"), ("hea", EVERYTHING)]):
        with pytest.raises(ConfigError, match=r"^config.sharding_strategy\[1\]: 'h\w+' matches no parameter; names "
                                              "look like body, head, neck$"):
            infer(TREE, strategy)


# A ViT whose every array but the scalars has an axis that 8 divides.
MODEL = vit.Model(16, patch_size=4, width=64, depth=1, mlp_dim=128, num_heads=8, pool_type="gap")
TX = optax.adam(1e-3)


def init(key):
    return MODEL.init(key, jnp.zeros((1, 16, 16, 3)))["params"]


def placements(strategy, devices, axes=(("data", -1),)):
    """Shapes of the state, and where `strategy` puts each leaf on that many devices."""
    shapes = state_shapes(init, TX)
    strategy = sharding.parse_strategy(strategy, "config.sharding_strategy")
    return shapes, state_shardings(shapes, strategy, dist.create_mesh(axes, devices=jax.devices()[:devices]))


def bytes_per_device(state):
    """What each device really holds, smallest and largest."""
    held = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return min(held.values()), max(held.values())


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_fsdp_divides_the_state_by_the_number_of_devices(devices):
    def measured(strategy):
        shapes, shardings = placements(strategy, devices)
        return bytes_per_device(jax.device_put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), shardings))

    _, whole = measured([(".*", "replicate")])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(init, TX).params))
    scalars = 4 + 4 + 1  # step, Adam's count, the finite flag
    assert whole == 3 * 4 * parameters + scalars
    least, most = measured([(".*", EVERYTHING)])
    assert least == most == (whole - scalars) // devices + scalars  # no device carries more than another


def test_a_state_is_born_where_it_lives_and_with_the_same_numbers():
    strategy = [
        (".*/(query|key|value)/kernel", f"shard_dim('model', -2)|{EVERYTHING}"),
        (".*/Dense_0/kernel", f"shard_dim('model', -1)|{EVERYTHING}"),
        (".*/Dense_1/kernel", f"shard_dim('model', -2)|{EVERYTHING}"),
        (".*", EVERYTHING)]
    born = [create(init, TX, placements(*where)[1], jax.random.key(0)) for where in (
        ([(".*", "replicate")], 1), (strategy, 8, [("data", 4), ("model", 2)]))]
    kernel = born[1].params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P("data", "model")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(64 // 4, 128 // 2)}
    map_with_names(lambda name, a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name), *born)


def test_one_regex_serves_a_parameter_and_the_optimisers_copies_of_it():
    _, state = placements([(".*embedding/kernel", EVERYTHING)], 8)
    for tree in (state.params, state.opt[0].mu, state.opt[0].nu):
        assert tree["embedding"]["kernel"].spec == P(None, None, None, "data")
        assert tree["head"]["kernel"].is_fully_replicated
