import pytest

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.validate import (
    check_choice,
    check_float,
    check_int,
    check_str_list,
    check_type,
    did_you_mean,
)


def test_types():
    assert check_type("x", 3, int) == 3
    assert check_type("x", True, bool) is True
    for value, kind, given in [(True, int, "bool"), ("3", int, "str"), (1, bool, "int")]:
        with pytest.raises(InvalidTypeError, match=f"x must be {kind.__name__}, not {given}"):
            check_type("x", value, kind)
    with pytest.raises(TypeError):
        check_type("x", None, str)


def test_long_values_are_cut_in_messages():
    with pytest.raises(InvalidTypeError) as caught:
        check_type("x", "v" * 1000, int)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("value", "low", "high", "allowed"),
    [
        (0, 1, None, "at least 1, not 0"),
        (9, None, 8, "at most 8, not 9"),
        (9, 1, 8, r"in \[1, 8\], not 9"),
        (-1, 0, 8, r"in \[0, 8\], not -1"),
    ],
)
def test_ranges(value, low, high, allowed):
    with pytest.raises(InvalidValueError, match=f"bits must be {allowed}"):
        check_int("bits", value, low=low, high=high)
    with pytest.raises(ValueError, match=f"bits must be {allowed}".replace("9", "9.0")[:-1]):
        check_float("bits", float(value), low=low, high=high)


@pytest.mark.parametrize("value", [1, 8])
def test_ranges_are_closed(value):
    assert check_int("bits", value, low=1, high=8) == value


def test_floats():
    result = check_float("x", 3)
    assert result == 3.0
    assert type(result) is float
    with pytest.raises(InvalidValueError, match="x must be a number, not NaN"):
        check_float("x", float("nan"))
    with pytest.raises(InvalidValueError, match=r"in \[0, 1\], not inf"):
        check_float("x", float("inf"), low=0, high=1)
    with pytest.raises(InvalidValueError, match="x is too large"):
        check_float("x", 10**400)
    for value in (True, "1", None):
        with pytest.raises(InvalidTypeError, match="x must be float"):
            check_float("x", value)


def test_choices():
    assert check_choice("bits", 4, [4, 8]) == 4
    with pytest.raises(InvalidValueError, match=r"bits must be one of 4, 8, not 5$"):
        check_choice("bits", 5, (bits for bits in [4, 8]))
    with pytest.raises(InvalidValueError, match="not True"):
        check_choice("bits", True, [1, 2])
    with pytest.raises(InvalidValueError, match=r"Hint: did you mean 'minmax'\?"):
        check_choice("method", "minmx", ["minmax", "histogram"])


def test_lists_of_str():
    names = ["a", "b"]
    copy = check_str_list("names", names)
    assert copy == names
    assert copy is not names
    with pytest.raises(InvalidTypeError, match="names must be list, not tuple"):
        check_str_list("names", ("a",))
    with pytest.raises(InvalidTypeError, match=r"names\[1\] must be str, not int"):
        check_str_list("names", ["a", 1])


def test_suggestions():
    assert did_you_mean("layer.1", ["layer.0", "norm"]) == "did you mean 'layer.0'?"
    assert did_you_mean("layer.2", ["layer.0", "layer.1"]) in (
        "did you mean 'layer.1' or 'layer.0'?",
        "did you mean 'layer.0' or 'layer.1'?",
    )
    assert did_you_mean("xyz", ["layer.0"]) is None
    assert did_you_mean(3, ["3"]) is None
