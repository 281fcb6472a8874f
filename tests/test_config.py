"""Schemas: every wrong key, type and value ends in one line that names the field, the value and the way out."""
import dataclasses
import math
from typing import Any, Literal

import ml_collections
import pytest
from ml_collections.config_dict import placeholder

from cb_vit.config import ConfigError, Duration, as_read, parse, plain, suggest
from cb_vit.overrides import lay_over


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError("rate", f"must be 0 or more, got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Outer:
    seed: int
    total: Duration
    inner: Inner
    name: str = "x"
    flag: bool = False
    kind: Literal["cosine", "linear", 3] = "cosine"
    layers: tuple[int, ...] | None = None
    pair: tuple[str, float] = ("a", 1.0)
    blocks: dict[str, Inner] = dataclasses.field(default_factory=dict)
    patch: int | tuple[int, int] = 16
    inners: Inner | tuple[Inner, ...] | None = None
    free: Any = None
    ckpt: Duration | None = None
    log: Duration = Duration(50, "steps")


GOOD: dict[str, Any] = dict(seed=1, total_epochs=2, inner=dict(size=3))


def test_a_good_block_becomes_a_frozen_dataclass_of_the_declared_types():
    config = ml_collections.ConfigDict(dict(
        seed=7.0, total_examples=100, inner=dict(size=3, rate=1), name="n", flag=True, kind=3, layers=[0, 1],
        pair=["b", 2], blocks=dict(one=dict(size=1)), patch=[8, 4], inners=[dict(size=1), dict(size=2)],
        free=dict(a=[1]), ckpt_percent=0.25, log_steps=None))
    cfg = parse(Outer, config)
    assert cfg == Outer(
        seed=7, total=Duration(100, "examples"), inner=Inner(3, 1.0), name="n", flag=True, kind=3, layers=(0, 1),
        pair=("b", 2.0), blocks={"one": Inner(1)}, patch=(8, 4), inners=(Inner(1), Inner(2)), free={"a": (1,)},
        ckpt=Duration(0.25, "percent"), log=Duration(50, "steps"))
    assert type(cfg.seed) is int and type(cfg.inner.rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 2


def test_none_means_not_set():
    cfg = parse(Outer, GOOD | dict(name=None, ckpt_steps=None, layers=None, inners=None, patch=None))
    assert cfg == parse(Outer, GOOD)


@pytest.mark.parametrize("change, error", [
    (dict(sead=1), "config.sead: unknown; did you mean seed?"),
    (dict(total_epoch=1), "config.total_epoch: unknown; did you mean total_epochs?"),
    (dict(inner=dict(size=1, rte=1)), "config.inner.rte: unknown; did you mean rate?"),
    (dict(inner=dict(size=1, zzz=1)), "config.inner.zzz: unknown; config.inner takes size, rate"),
    (dict(blocks=dict(b=dict(sise=1))), "config.blocks.b.sise: unknown; did you mean size?"),
    (dict(seed=None), "config.seed: required and not set; give seed"),
    (dict(total_epochs=None),
     "config.total: required and not set; give total_steps or total_epochs or total_examples"),
    (dict(inner=None), "config.inner: required and not set; give inner"),
    (dict(inner=dict(rate=1.0)), "config.inner.size: required and not set; give size"),
    (dict(inner=3), "config.inner: expected a block of settings, got 3"),
    (dict(inner=dict(size=1, rate=-1)), "config.inner.rate: must be 0 or more, got -1.0"),
    (dict(seed="1"), "config.seed: expected a whole number, got '1'"),
    (dict(seed=1.5), "config.seed: expected a whole number, got 1.5"),
    (dict(seed=math.inf), "config.seed: expected a whole number, got inf"),
    (dict(seed=True), "config.seed: expected a whole number, got True"),
    (dict(inner=dict(size=1, rate="fast")), "config.inner.rate: expected a number, got 'fast'"),
    (dict(inner=dict(size=1, rate=True)), "config.inner.rate: expected a number, got True"),
    (dict(inner=dict(size=1, rate=math.nan)), "config.inner.rate: expected a number, got nan"),
    (dict(name=3), "config.name: expected a string, got 3"),
    (dict(flag=1), "config.flag: expected True or False, got 1"),
    (dict(flag="True"), "config.flag: expected True or False, got 'True'"),
    (dict(kind="cosin"), "config.kind: unknown value 'cosin'; did you mean cosine? Choices: cosine, linear, 3"),
    (dict(kind="zzz"), "config.kind: unknown value 'zzz'; Choices: cosine, linear, 3"),
    (dict(kind=4), "config.kind: unknown value 4; Choices: cosine, linear, 3"),
    (dict(layers=3), "config.layers: expected a list, each entry a whole number, got 3"),
    (dict(layers=[1, "b"]), "config.layers[1]: expected a whole number, got 'b'"),
    (dict(pair=["a"]), "config.pair: expected (a string, a number), got ('a',)"),
    (dict(pair=["a", "b"]), "config.pair[1]: expected a number, got 'b'"),
    (dict(blocks=[1]), "config.blocks: expected a block of settings, got (1,)"),
    (dict(patch="big"), "config.patch: expected a whole number or (a whole number, a whole number), got 'big'"),
    (dict(patch=[1, "b"]), "config.patch[1]: expected a whole number, got 'b'"),
    (dict(inners=[dict(size="x")]), "config.inners[0].size: expected a whole number, got 'x'"),
    (dict(ckpt_steps=1, ckpt_epochs=2), "config.ckpt: ckpt_steps and ckpt_epochs are both set; keep one"),
    (dict(ckpt_steps=2.5), "config.ckpt_steps: expected a whole number, got 2.5"),
    (dict(ckpt_examples="1e6"), "config.ckpt_examples: expected a whole number, got '1e6'"),
    (dict(ckpt_epochs=-1), "config.ckpt_epochs: must be 0 or more, got -1.0"),
    (dict(ckpt_epochs=math.inf), "config.ckpt_epochs: must be 0 or more, got inf"),
    (dict(ckpt_percent=10),
     "config.ckpt_percent: is a fraction of the run, 0 to 1, got 10.0; write 0.1 for 10 %"),
], ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_block_is_one_line(change, error):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, GOOD | change)
    assert str(caught.value) == error
    assert "\n" not in error


def test_a_block_that_is_no_block():
    with pytest.raises(ConfigError, match="^config.model: expected a block of settings, got 'vit'$"):
        parse(Inner, "vit", "config.model")


def test_errors_keep_the_path_and_can_be_put_under_another():
    error = ConfigError("lr", "too big").under("config.optax")
    assert (error.path, error.message, str(error)) == ("config.optax.lr", "too big", "config.optax.lr: too big")
    with pytest.raises(ConfigError, match="^somewhere.else.size: required"):
        parse(Inner, {}, "somewhere.else")


def test_suggest_finds_near_misses_only():
    assert suggest("sead", ["lr", "seed"]) == "; did you mean seed?"
    assert suggest("zzz", ["lr", "seed"]) == ";"


def test_durations_in_steps():
    steps = lambda value, unit, **kw: Duration(value, unit).steps(batch_size=100, **kw)  # noqa: E731
    assert steps(7, "steps") == 7
    assert steps(1000, "examples") == 10
    assert steps(2, "epochs", examples=1010) == 20  # 20.2
    assert steps(2, "epochs", examples=1040) == 21  # 20.8
    assert steps(0.1, "percent", total_steps=205) == 20  # 20.5, to the even number
    assert steps(0.1, "percent", total_steps=206) == 21
    for unit in ("examples", "epochs", "percent"):  # however short, a step; but nothing stays nothing
        assert steps(0.001, unit, examples=10, total_steps=10) == 1
        assert steps(0, unit, examples=10, total_steps=10) == 0


def test_durations_that_lack_what_they_refer_to():
    with pytest.raises(ConfigError, match="^epochs: the data source has no length; give steps or examples$"):
        Duration(1, "epochs").steps(8)
    with pytest.raises(ConfigError, match="^percent: the length of the run itself cannot be a percentage; give steps"):
        Duration(0.1, "percent").steps(8)


def test_plain_resolves_placeholders_references_and_lists():
    config = ml_collections.ConfigDict(dict(a=placeholder(int), b=dict(c=[1, [2]], d=placeholder(str))))
    config.b.d = "x"
    config.e = config.b.get_ref("d")
    config.f = config.b.get_oneway_ref("d") + "y"
    config.b.d = "z"
    assert plain(config) == {"a": None, "b": {"c": (1, (2,)), "d": "z"}, "e": "z", "f": "zy"}
    assert type(plain(config)["b"]) is dict
    assert plain(placeholder(int)) is None


def durations():
    config = ml_collections.ConfigDict(dict(
        total_epochs=90.0, total_steps=placeholder(int), ckpt_steps=5, ckpt_epochs=placeholder(float), grad_steps=2,
        schedule=dict(warmup_epochs=5.0, warmup_percent=placeholder(float), ckpt_steps=3)))
    return config.lock()


def read(config):
    """A block of `lay_over` with its texts in place, for what no schema here reads."""
    return {key: read(value) if isinstance(value, dict) else getattr(value, "text", value)
            for key, value in config.items()}


def test_a_duration_on_the_command_line_replaces_the_files_whatever_its_unit():
    config = durations()
    laid = lay_over(config, [("total_steps", "7"), ("schedule.warmup_percent", "0.5"), ("steps", "1")])
    assert read(laid) == dict(
        total_epochs=None, total_steps="7", ckpt_steps=5, ckpt_epochs=None, grad_steps=2, steps="1",
        schedule=dict(warmup_epochs=None, warmup_percent="0.5", ckpt_steps=3))
    assert config.is_locked


def test_two_units_on_the_command_line_contradict_each_other():
    laid = lay_over(durations(), [("total_steps", "7"), ("total_epochs", "2")])
    with pytest.raises(ConfigError, match="^config.total: total_steps and total_epochs are both set; keep one$"):
        parse(Outer, GOOD | {key: laid[key] for key in ("total_steps", "total_epochs")})


@pytest.mark.parametrize("name, text, value", [
    ("seed", "7", 7), ("inner.rate", "1e-3", 1e-3), ("inner.rate", "2", 2.0), ("name", "7", "7"),
    ("name", "(1, 2)", "(1, 2)"),
    ("flag", None, True), ("flag", "1", True), ("flag", "false", False), ("kind", "linear", "linear"), ("kind", "3", 3),
    ("layers", "(0, 2)", (0, 2)), ("layers", "3", (3,)), ("layers", "None", None), ("pair", "('b', 2)", ("b", 2.0)),
    ("inner", "{'size': 4}", Inner(4)), ("name", "None", "x"), ("layers", "[1]", (1,))])
def test_a_text_is_read_as_its_field_says(name, text, value):
    laid = lay_over(GOOD, [(name, text)])
    found = parse(Outer, laid)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    raw = as_read(laid)
    for part in name.split("."):
        raw = raw[part]
    assert raw == (dict(size=4) if name == "inner" else None if text == "None" else value)


@pytest.mark.parametrize("name, text, error", [
    ("seed", "x", "config.seed: expected a whole number, got 'x'"),
    ("seed", None, "config.seed: no value given; write --"),
    ("seed", "1.5", "config.seed: expected a whole number, got '1.5'"), ("flag", "2", "config.flag: expected True or"),
    ("kind", "cosin", "config.kind: unknown value 'cosin'; did you mean cosine?"),
    ("layers", "(0, 'a')", r"config.layers[1]: expected a whole number, got 'a'"),
    ("inner", "{'size': 4, 'rat': 1}", "config.inner.rat: unknown; did you mean rate?"),
    ("inner.rate", "-1", "config.inner.rate: must be 0 or more, got -1.0"),
    ("seed.x", "1", "config.seed: is 1, not a block of settings; config.seed.x cannot be set"),
    ("inner.sise", "1", "config.inner.sise: unknown; did you mean size?")])
def test_a_text_that_cannot_be_read_is_refused_by_name(name, text, error):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, lay_over(GOOD, [(name, text)]))
    assert str(caught.value).startswith(error)


def test_what_refers_to_an_overridden_setting_follows_it():
    config = ml_collections.ConfigDict(dict(a=1.0, b=dict(c=2)))
    config.d, config.e = config.get_ref("a"), config.b.get_oneway_ref("c") * 2
    laid = lay_over(config, [("a", "3"), ("b.c", "5")])
    assert (laid["a"].text, laid["d"], laid["b"]["c"].text, laid["e"]) == ("3", 3.0, "5", 10)


def test_a_block_of_nothing_but_none_is_not_set():
    assert parse(Outer, GOOD | dict(inners=dict(size=None, rate=None))).inners is None
    with pytest.raises(ConfigError, match="config.inner.size: required and not set"):
        parse(Outer, GOOD | dict(inner=dict(size=None)))
