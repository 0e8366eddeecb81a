import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_lowrank import ranks
from slim_lowrank.rank_requests import LayerShape, check_ranks, choose_ranks, parse_request


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [
        (10, 16, 16),
        (13, 16, 16),
        (23, 16, 32),
        (24, 16, 32),
        (40, 16, 48),
        (1, 64, 64),
        (95, 64, 128),
        (108, 64, 128),
        (340, 64, 320),
        (31, 13, 39),
        (5.96, 1, 6),
    ],
)
def test_round_to(value, divisor, expected):
    assert ranks.round_to(value, divisor) == expected


@given(st.floats(0.01, 1e5), st.integers(1, 512))
def test_round_to_is_a_near_multiple(value, divisor):
    rounded = ranks.round_to(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= divisor
    assert rounded >= 0.9 * value
    assert abs(rounded - value) <= divisor


@pytest.mark.parametrize(
    ("shape", "ratio", "expected"),
    [
        ((4096, 4096), 0.3, 640),
        ((4096, 4096), 0.5, 1024),
        ((4096, 4096), 0.8, 1664),
        ((4096, 4096), 0.9, 1856),
        ((11008, 4096), 0.5, 1472),
        ((11008, 4096), 0.8, 2368),
        ((1000, 2048), 0.5, 320),
        ((10, 256), 0.5, None),
    ],
)
def test_matrix_ratio(shape, ratio, expected):
    assert choose_ranks(LayerShape("linear", shape), ratio, 64, _no_weight) == expected


def test_small_matrix_without_rounding():
    assert choose_ranks(LayerShape("linear", (10, 256)), 0.5, 1, _no_weight) == 4


@pytest.mark.parametrize(
    ("shape", "divisor", "expected"),
    [
        ((128, 64, 3, 3), 64, (64, 64)),
        ((256, 256, 3, 3), 64, (192, 192)),
        ((512, 512, 3, 3), 64, (320, 320)),
        ((64, 64, 3, 3), 64, None),
        ((2048, 512, 1, 1), 64, (192, 192)),
        ((64, 256, 1, 1), 16, (32, 32)),
        ((64, 64, 1, 7), 1, (37, 37)),
        ((64, 64, 7, 1), 1, (37, 37)),
        ((64, 3, 7, 7), 1, (9, 3)),
    ],
)
def test_conv_ratio(shape, divisor, expected):
    assert choose_ranks(LayerShape("conv", shape), 0.5, divisor, _no_weight) == expected


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 5),
    st.integers(1, 5),
    st.floats(0.1, 0.9),
)
def test_conv_rank_solves_the_budget(out, inp, height, width, ratio):
    shape = (out, inp, height, width)
    rank = ranks.conv_rank(ratio, shape)
    kept = rank * inp + rank**2 * height * width + rank * out
    assert kept == pytest.approx(ratio * math.prod(shape), rel=1e-9)


def test_linear_pair_takes_the_larger_rank():
    assert choose_ranks(LayerShape("linear", (64, 64)), (4, 8), 1, _no_weight) == 8


@pytest.mark.parametrize(
    ("form", "rank", "shape", "expected"),
    [
        ("factors", (8,), (64, 32), 8 * 96),
        ("pivot", (8,), (64, 32), 8 * 96 - 64),
        ("out", (5,), (7, 3, 3, 3), 5 * (27 + 7)),
        ("in", (2,), (7, 3, 3, 3), 2 * (3 + 63)),
        ("spatial", (4,), (7, 3, 5, 3), 4 * (15 + 21)),
        ("tucker2", (4, 2), (7, 3, 3, 3), 6 + 72 + 28),
    ],
)
def test_form_params(form, rank, shape, expected):
    assert ranks.form_params(form, rank, shape) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0.5), (16, 16), (16.0, 16), ("VBMF", "vbmf"), ((3, 4), (3, 4)), ([3, 4], (3, 4))],
)
def test_parse_request(value, expected):
    assert parse_request("x", value) == expected


@pytest.mark.parametrize("value", ["svd", (1, 2, 3), -1, 0, None, True, 1.5, (0, 1), float("nan")])
def test_parse_request_refuses(value):
    with pytest.raises((InvalidTypeError, InvalidValueError), match="fc"):
        parse_request("fc", value)


@pytest.mark.parametrize("value", [0, 33, 2.0, True, "8", (8, 40)])
def test_check_ranks_refuses(value):
    with pytest.raises((InvalidTypeError, InvalidValueError), match="fc"):
        check_ranks("fc", LayerShape("linear", (64, 32)), value)


def _no_weight():
    raise AssertionError("ratios need no weights")
