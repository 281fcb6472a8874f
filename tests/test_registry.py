"""Tables of choices, and the language of `pp` and sharding strings."""
import dataclasses

import pytest

from cb_vit.config import ConfigError
from cb_vit.registry import Call, Registry, parse_calls


def test_a_call_has_a_name_literals_and_its_own_text():
    crop, flip, scale = parse_calls(" crop(224, (3, -1), area_min=5.5,name='x') | flip|scale(-1, hi=[1, None])", "p")
    text = "crop(224, (3, -1), area_min=5.5, name='x')"
    assert crop == Call("crop", (224, (3, -1)), {"area_min": 5.5, "name": "x"}, text)
    assert flip == Call("flip", (), {}, "flip")
    assert (scale.args, scale.kwargs) == ((-1,), {"hi": [1, None]})
    assert parse_calls("flip()", "p")[0].args == ()


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_has_no_calls(text):
    assert parse_calls(text, "p") == ()


@pytest.mark.parametrize("text", [
    "a||b", "a|", "|a", "a(1", "a b", "a(1)(2)", "a.b(1)", "3", "'a'", "a & b", "a(**{})", "a(x=1, x=2)", "a\0", "a;b",
    "a = 1", "lambda: 1"])
def test_other_forms_are_refused_with_the_text_and_the_way_to_write_it(text):
    with pytest.raises(ConfigError, match=r"^p: cannot read .*; write it as 'op\(1\)\|op2\(name=2\)'$") as error:
        parse_calls(text, "p")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a(b)", "a(x=b)", "a(1 + b)", "a(*[1])", "a({[]: 1})", "a(__import__('os'))"])
def test_arguments_are_plain_values_and_nothing_is_run(text):
    with pytest.raises(ConfigError, match="^p: .* arguments must be plain values such as 224, 0.5 or 'name'$"):
        parse_calls(text, "p")


def test_pick_lists_the_choices():
    table = Registry("loss", {"softmax": 1, "sigmoid": 2})
    assert table.pick("sigmoid", "p") == 2
    with pytest.raises(ConfigError, match=r"^config.loss: unknown loss 'sofmax'; did you mean softmax\? Choices: "
                                          "sigmoid, softmax$"):
        table.pick("sofmax", "config.loss")
    with pytest.raises(ConfigError, match="^config.loss: unknown loss 'zzz'; Choices: sigmoid, softmax$"):
        table.pick("zzz", "config.loss")


def test_a_name_is_given_once():
    table = Registry("op")

    @table.register("one")
    def one():
        return 1

    assert table["one"] is one and one() == 1
    with pytest.raises(KeyError, match="op 'one' is registered twice"):
        table.register("one")


@dataclasses.dataclass
class Crop:
    size: int
    area_min: float = 8

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}")


def bind(text, function=Crop):
    return parse_calls(text, "p")[0].bind(function, "config.pp")


def test_bind_calls_with_arguments_of_the_declared_types():
    crop = bind("crop(224.0, area_min=5)")
    assert crop == Crop(224, 5.0) and (type(crop.size), type(crop.area_min)) == (int, float)

    def op(first, *rest, pair: tuple[int, ...] = ()):
        return first, rest, pair

    assert bind("op([1], 2, 3, pair=[4, 5])", op) == ([1], (2, 3), (4, 5))


@pytest.mark.parametrize("text, error", [
    ("crop", "config.pp: 'crop': missing a required argument: 'size'. It takes crop(size"),
    ("crop(1, 2, 3)", "config.pp: 'crop(1, 2, 3)': too many positional arguments. It takes crop(size"),
    ("crop(sise=1)", "config.pp: 'crop(sise=1)': missing a required argument: 'size'. It takes crop(size"),
    ("crop(1, sise=1)", "config.pp: 'crop(1, sise=1)': got an unexpected keyword argument 'sise'. It takes crop(size"),
    ("crop(0)", "config.pp: 'crop(0)': size must be positive, got 0"),
    ("crop('x')", "config.pp: crop('x'): size: expected a whole number, got 'x'"),
    ("crop(1, area_min=True)", "config.pp: 'crop(1, area_min=True)': area_min: expected a number, got True"),
])
def test_arguments_that_do_not_fit(text, error):
    with pytest.raises(ConfigError) as caught:
        bind(text)
    assert str(caught.value).replace('"', "").startswith(error)
    assert caught.value.path == "config.pp" and "\n" not in str(caught.value)


def test_an_error_about_an_argument_names_it():
    def op(size):
        raise ConfigError("size", "expected a number")

    with pytest.raises(ConfigError, match=r"^config.pp: 'op\(1\)': size: expected a number$"):
        bind("op(1)", op)
