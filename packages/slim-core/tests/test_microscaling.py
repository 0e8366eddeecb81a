"""Shared powers of two against the formula of the OCP specification."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.errors import FormatError
from slim_core.microscaling import round_groups
from slim_core.numerics import power_scale, quantize_weight, weight_params
from slim_core.scheme import QuantScheme
from slim_core.tables import FP4, FP8

F32 = np.float32


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([FP4, FP8]))
def test_shared_scale(peak, dtype):
    (scale,) = power_scale(F32([peak]), dtype.max)
    largest = {FP4: 2, FP8: 8}[dtype]  # exponent of the largest power of two of the type
    assert scale == 2.0 ** (math.floor(math.log2(peak)) - largest)
    assert scale.dtype == F32


def test_a_group_of_zeros_has_a_scale():
    assert power_scale(np.zeros(2, F32), FP4.max).tolist() == [2.0**-126] * 2


@pytest.mark.parametrize(
    ("text", "cast"), [("w8a8_mxfp8", "float8_e4m3fn"), ("w4a4_mxfp4", "float4_e2m1fn")]
)
@given(x=arrays(F32, (2, 64), elements=st.floats(-1000, 1000, width=32)))
def test_weights_and_activations(text, cast, x):
    scheme = QuantScheme.parse(text)
    assert scheme.weight is not None
    assert scheme.activation is not None
    scale, offset = weight_params(x, scheme.weight)
    codes = quantize_weight(x, scale, offset, scheme.weight)
    expected = np.zeros_like(x)
    for row in range(2):
        for group in range(2):
            inside = slice(32 * group, 32 * group + 32)
            step = scale[row, group]
            limit = scheme.weight.dtype.max
            small = np.clip(x[row, inside] / step, -limit, limit)
            expected[row, inside] = small.astype(getattr(ml_dtypes, cast)).astype(F32) * step
    found = round_groups(x, scheme.activation)
    np.testing.assert_array_equal(found, expected)
    assert codes.dtype == np.int8
    assert not offset.any()


def test_groups_must_divide():
    scheme = QuantScheme.parse("w4a4_mxfp4").activation
    assert scheme is not None
    with pytest.raises(FormatError, match="group size 32 does not divide 40 input channels"):
        round_groups(np.ones((2, 40), F32), scheme)
