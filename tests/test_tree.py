"""Names of leaves, and rules that go by them."""
import collections

import flax.struct
import jax
import pytest

from cb_vit.config import ConfigError
from cb_vit.tree import (
    blocks,
    check_rules,
    first_match,
    flatten_with_names,
    is_stacked,
    key_name,
    map_with_names,
    names,
    unflatten_names,
)

Pair = collections.namedtuple("Pair", ["mu", "nu"])


@flax.struct.dataclass
class State:
    step: int
    opt: tuple


TREE = State(step=0, opt=(Pair(mu={"b": {"kernel": 1}, "a": 2}, nu=None), [3, 4]))
NAMES = ["step", "opt/0/mu/a", "opt/0/mu/b/kernel", "opt/1/0", "opt/1/1"]
PARAMS = {"head": {"kernel": 1, "bias": 2}, "block_1": {"kernel": 3}}


def test_names_follow_dicts_fields_and_indices_in_jaxs_order():
    assert names(TREE) == NAMES
    pairs, treedef = flatten_with_names(TREE)
    assert pairs == list(zip(NAMES, jax.tree.leaves(TREE), strict=True))
    assert jax.tree.unflatten(treedef, [leaf for _, leaf in pairs]) == TREE


def test_what_is_no_key():
    with pytest.raises(TypeError, match="not an entry of a key path: 3"):
        key_name(3)


def test_map_with_names_keeps_the_structure_and_takes_more_trees():
    tenfold = jax.tree.map(lambda leaf: 10 * leaf, TREE)
    assert map_with_names(lambda name, a, b: f"{name} {a + b}", TREE, tenfold) == State(step="step 0", opt=(
        Pair(mu={"b": {"kernel": "opt/0/mu/b/kernel 11"}, "a": "opt/0/mu/a 22"}, nu=None),
        ["opt/1/0 33", "opt/1/1 44"]))


def test_the_first_rule_that_matches_the_whole_name_wins():
    rules = [("head", 0), ("head/.*", 1), (".*/kernel", 2), (".*", 3)]
    assert [first_match(name, rules) for name in ("head/kernel", "block_1/kernel", "cls", "head")] == [1, 2, 3, 0]
    assert first_match("x", [("y", 1)]) is None
    assert first_match("x", [("y", 1)], default=7) == 7


def test_nested_dicts_from_names():
    assert unflatten_names(dict(flatten_with_names(PARAMS)[0])) == PARAMS
    assert unflatten_names({}) == {}


def test_rules_that_do_nothing_are_refused():
    check_rules([("head/.*", None), (".*", None)], PARAMS, "config.x")
    with pytest.raises(ConfigError, match=r"^config.x\[1\]: 'haed/\.\*' matches no parameter; names look like "
                                          "block_1/kernel, head/bias, head/kernel$"):
        check_rules([("head/.*", None), ("haed/.*", None)], PARAMS, "config.x")
    with pytest.raises(ConfigError, match=r"^config.x\[0\]: 'kernel' matches no parameter"):  # not only a part
        check_rules([("kernel", None)], PARAMS, "config.x")
    with pytest.raises(ConfigError, match=r"^config.x\[0\]: '\(' is not a regular expression: "):
        check_rules([("(", None)], PARAMS, "config.x")


@pytest.mark.parametrize("name, shape, numbers, stacked", [
    ("Transformer/encoderblock_11/Dense_0/kernel", (4, 4), (11,), False),
    ("opt/0/mu/encoderblock_0/bias", (4,), (0,), False),
    ("Transformer/encoderblock/Dense_0/kernel", (3, 4, 4), (0, 1, 2), True),
    ("encoderblock/bias", (2, 4), (0, 1), True),
    ("Transformer/encoder_norm/scale", (4,), (), False),
    ("encoderblock", (3,), (), False),
    ("my_encoderblock_1/bias", (4,), (), False)])
def test_blocks_of_a_leaf(name, shape, numbers, stacked):
    assert blocks(name, shape) == numbers and is_stacked(name) is stacked
