"""Two-stage weights against loops over the published formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.errors import FormatError
from slim_core.layers import QuantizedLinear
from slim_core.numerics import EPS
from slim_core.scheme import QuantScheme
from slim_core.two_stage import (
    LARGEST_GROUP_SCALE,
    SECOND_SCALE,
    quantize_two_stage,
    two_stage_integers,
    two_stage_scales,
)

F32 = np.float32


def slow(weight, size):
    """Return codes and both scales of the formula, element by element."""
    rows, columns = weight.shape
    codes = np.zeros(weight.shape, int)
    first, second = np.zeros((rows, 1), F32), np.zeros((rows, columns // size), F32)
    for row in range(rows):
        first[row] = max(F32(np.abs(weight[row]).max()) / F32(119), F32(EPS))
        q1 = [int(np.rint(w / first[row, 0])) for w in weight[row]]
        for group in range(columns // size):
            inside = slice(group * size, (group + 1) * size)
            second[row, group] = max(1, np.rint(F32(max(map(abs, q1[inside]))) / F32(7)))
            for column in range(inside.start, inside.stop):
                code = np.rint(F32(q1[column]) / second[row, group])
                codes[row, column] = min(7, max(-8, int(code)))
    return codes, first, second


@given(arrays(F32, (3, 8), elements=st.floats(-100, 100, width=32)), st.sampled_from([2, 4, 8]))
def test_formula(weight, size):
    first, second = two_stage_scales(weight, size)
    codes = quantize_two_stage(weight, first, second)
    expected = slow(weight, size)
    for found, wanted in zip((codes, first, second), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert codes.dtype == np.int8
    integers = two_stage_integers(codes, second)
    assert np.all(np.abs(integers) <= 127 + 9)  # -8 * 17 at most, int8 for the codes that occur
    assert 1 <= second.min() <= second.max() <= LARGEST_GROUP_SCALE


def test_a_row_of_zeros_is_a_row_of_zeros():
    weight = np.zeros((2, 8), F32)
    first, second = two_stage_scales(weight, 4)
    layer = QuantizedLinear(
        "a",
        QuantScheme.parse("w4a8_dynamic_g4"),
        quantize_two_stage(weight, first, second),
        first,
        np.zeros_like(first),
        extras={SECOND_SCALE: second},
    )
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(layer.dequantized(), weight)


def test_error_is_at_most_half_a_step_of_both_stages():
    weight = np.random.default_rng(0).standard_normal((32, 128)).astype(F32)
    first, second = two_stage_scales(weight, 32)
    codes = quantize_two_stage(weight, first, second)
    restored = two_stage_integers(codes, second) * first
    bound = first * (np.repeat(second, 32, axis=1) / 2 + 0.5)
    clipped = np.abs(codes) >= 7  # the second scale is rounded, so the last code can fall short
    assert np.all((np.abs(restored - weight) <= bound * 1.001) | clipped)
    assert np.linalg.norm(restored - weight) / np.linalg.norm(weight) < 0.12


def test_groups_must_divide():
    with pytest.raises(FormatError, match="group size 3 does not divide 8 input channels"):
        two_stage_scales(np.ones((2, 8), F32), 3)
