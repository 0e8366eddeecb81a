"""The formulas against plain float32 arithmetic written out, and against what they promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.dtypes import INT4, INT8, IntType
from slim_core.errors import FormatError, InvalidTypeError, NumericalError
from slim_core.numerics import (
    EPS,
    affine_params,
    check_finite,
    dequantize,
    dequantize_weight,
    fold_static,
    lowest_code,
    quantize,
    quantize_per_token,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import Granularity, QuantScheme, TensorScheme

F32 = np.float32


def scheme(granularity=Granularity.PER_CHANNEL, *, symmetric=True, bits=8, group=0):
    return TensorScheme(IntType(bits), granularity, symmetric, group)


SYM, ASYM = scheme(), scheme(symmetric=False)
WEIGHT_SCHEMES = [
    scheme(granularity, symmetric=symmetric, bits=bits, group=group)
    for granularity, group in (
        (Granularity.PER_TENSOR, 0),
        (Granularity.PER_CHANNEL, 0),
        (Granularity.PER_GROUP, 4),
    )
    for symmetric in (True, False)
    for bits in (4, 8)
]

finite = st.floats(-1e6, 1e6, width=32)
weights = arrays(F32, st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 12])), elements=finite)


def rng(seed=0):
    return np.random.default_rng(seed)


def half_even(value):
    """Round an exact fraction half to even, in integers."""
    return round(Fraction(value))


# --- scale and offset -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "scale", "offset"),
    [
        (1.0, 1.0, 1 / 255, -128),
        (-1.0, 3.0, 4 / 255, -64),
        (0.0, 0.0, EPS, -128),
        (-2.0, -1.0, 2 / 255, 127),
        (-1.0, 1.0, 2 / 255, -1),  # float32 makes 2/255 a little larger, so 127.49... is rounded
        (0.5, 2.55, 0.01, -128),
    ],
)
def test_asymmetric_range_holds_zero(low, high, scale, offset):
    got_scale, got_offset = affine_params(F32([low]), F32([high]), ASYM)
    assert got_scale.dtype == got_offset.dtype == F32
    np.testing.assert_allclose(got_scale, [scale], rtol=1e-7)
    assert got_offset.tolist() == [offset]


@pytest.mark.parametrize(
    ("low", "high", "peak"), [(1.0, 1.0, 1.0), (-3.0, 1.0, 3.0), (-1.0, 3.0, 3.0)]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_range_ends_at_the_larger_side(low, high, peak, bits):
    scale, offset = affine_params(F32([low]), F32([high]), scheme(bits=bits))
    assert scale.tolist() == [F32(peak) / F32(2 ** (bits - 1) - 1)]
    assert offset.tolist() == [0.0]


def test_scale_is_never_below_float32_epsilon():
    assert F32(EPS) == np.finfo(F32).eps
    for kind in (SYM, ASYM):
        scale, _ = affine_params(F32([0.0, -1e-9]), F32([0.0, 1e-9]), kind)
        assert scale.tolist() == [F32(EPS), F32(EPS)]


@given(arrays(F32, 3, elements=finite), arrays(F32, 3, elements=finite))
def test_asymmetric_zero_is_exact(one, two):
    scale, offset = affine_params(np.minimum(one, two), np.maximum(one, two), ASYM)
    assert np.all(offset == np.round(offset))
    assert np.all((offset >= -128) & (offset <= 127))
    codes = quantize(np.zeros(3, F32), scale, offset, INT8)
    np.testing.assert_array_equal(dequantize(codes, scale, offset), 0.0)


# --- rounding -------------------------------------------------------------------------------------


def test_rounding_is_half_to_even_and_clamps():
    x = F32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -128.5, -1e9])
    codes = quantize(x, F32([1.0]), None, INT8)
    assert codes.dtype == np.int8
    assert codes.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128]
    assert quantize(x, F32([1.0]), None, INT8, low=-127).tolist()[-2:] == [-127, -127]
    assert quantize(x, F32([1.0]), F32([3.0]), INT4).tolist() == [4, 4, 6, 2, 2, 7, 7, 7, -8, -8]


@given(
    arrays(F32, 20, elements=st.floats(-1e3, 1e3, width=32)), st.floats(0.001953125, 8, width=32)
)
def test_codes_are_those_of_a_true_division(x, scale):
    codes = quantize(x, F32(scale), None, INT8)
    for value, code in zip(x, codes, strict=True):
        quotient = F32(value) / F32(scale)
        assert code == max(-128, min(127, half_even(float(quotient))))


def test_division_is_not_a_product_with_the_reciprocal():
    random = rng(0)
    scale = random.uniform(0.01, 1, 100_000).astype(F32)
    x = ((random.integers(-100, 100, scale.size) + 0.5) * scale.astype(float)).astype(F32)
    codes = quantize(x, scale, None, INT8)
    np.testing.assert_array_equal(codes, np.rint(x / scale))
    assert np.any(codes != np.rint(x * (F32(1) / scale)))


# --- weights --------------------------------------------------------------------------------------


def test_symmetric_per_channel_weight_by_hand():
    weight = rng().standard_normal((64, 64)).astype(F32)
    scale, offset = weight_params(weight, SYM)
    peak = np.abs(weight).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(scale, peak / F32(127))
    np.testing.assert_array_equal(offset, np.zeros((64, 1), F32))
    codes = quantize_weight(weight, scale, offset, SYM)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / scale), -127, 127))
    assert np.abs(codes).max(axis=1).tolist() == [127] * 64


def test_asymmetric_per_channel_weight_by_hand():
    weight = (rng(1).standard_normal((64, 32)) + 0.3).astype(F32)
    scale, offset = weight_params(weight, ASYM)
    low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
    wanted = (high - low) / F32(255)
    np.testing.assert_array_equal(scale[:, 0], wanted)
    np.testing.assert_array_equal(offset[:, 0], np.rint(-low / wanted) - 128)
    codes = quantize_weight(weight, scale, offset, ASYM)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / scale + offset), -128, 127))


def test_per_tensor_weight_has_one_scale():
    weight = F32([[1, -2], [3, 4]])
    scale, offset = weight_params(weight, scheme(Granularity.PER_TENSOR))
    assert scale.tolist() == [F32(4) / F32(127)]
    assert offset.tolist() == [0.0]


@pytest.mark.parametrize(("bits", "steps", "least"), [(4, 15, -8), (8, 255, -128)])
def test_per_group_weight_by_hand(bits, steps, least):
    weight = rng(2).standard_normal((6, 128)).astype(F32)
    kind = scheme(Granularity.PER_GROUP, symmetric=False, bits=bits, group=32)
    scale, offset = weight_params(weight, kind)
    assert scale.shape == offset.shape == (6, 4)
    codes = quantize_weight(weight, scale, offset, kind)
    assert codes.shape == (6, 128)
    for row in range(6):
        for group in range(4):
            part = slice(32 * group, 32 * group + 32)
            w = weight[row, part]
            s = (max(w.max(), F32(0)) - min(w.min(), F32(0))) / F32(steps)
            z = np.rint(-min(w.min(), F32(0)) / s) + F32(least)
            assert scale[row, group] == s
            assert offset[row, group] == z
            wanted = np.clip(np.rint(w / s + z), least, least + steps)
            np.testing.assert_array_equal(codes[row, part], wanted)
            back = dequantize_weight(codes, scale, offset)[row, part]
            np.testing.assert_array_equal(back, (wanted.astype(F32) - z) * s)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_is_a_channel(symmetric):
    weight = rng(3).standard_normal((5, 16)).astype(F32)
    kind = scheme(Granularity.PER_GROUP, symmetric=symmetric, group=16)
    channel = scheme(symmetric=symmetric)
    params = weight_params(weight, kind)
    for got, wanted in zip(params, weight_params(weight, channel), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(
        quantize_weight(weight, *params, kind), quantize_weight(weight, *params, channel)
    )


@pytest.mark.parametrize("kind", WEIGHT_SCHEMES)
@given(weight=weights)
def test_error_is_at_most_half_a_step(kind, weight):
    scale, offset = weight_params(weight, kind)
    codes = quantize_weight(weight, scale, offset, kind)
    assert codes.dtype == np.int8
    assert codes.min() >= (-kind.dtype.max if kind.symmetric else kind.dtype.min)
    assert codes.max() <= kind.dtype.max
    back = dequantize_weight(codes, scale, offset)
    steps = np.repeat(scale, 4, axis=1) if kind.group_size else scale
    # An asymmetric offset is itself rounded, so the ends of the range may lie half a step outside.
    worst = (0.5 if kind.symmetric else 1.0) + 1e-3
    error = np.abs(back.astype(float) - weight)
    assert np.all(error <= worst * steps.astype(float) + 1e-12)


@pytest.mark.parametrize("kind", WEIGHT_SCHEMES)
@given(weight=weights)
def test_quantizing_again_changes_nothing(kind, weight):
    scale, offset = weight_params(weight, kind)
    codes = quantize_weight(weight, scale, offset, kind)
    back = dequantize_weight(codes, scale, offset)
    np.testing.assert_array_equal(quantize_weight(back, scale, offset, kind), codes)


@given(weights)
def test_symmetric_codes_change_sign_with_the_weight(weight):
    scale, offset = weight_params(weight, SYM)
    np.testing.assert_array_equal(
        quantize_weight(-weight, scale, offset, SYM), -quantize_weight(weight, scale, offset, SYM)
    )


@given(weights, st.integers(-4, 8))
def test_powers_of_two_scale_through(weight, exponent):
    assume(np.abs(weight).max(axis=1).min() > 1e-2)
    factor = F32(2.0**exponent)
    for kind in (SYM, ASYM):
        one, many = weight_params(weight, kind), weight_params(weight * factor, kind)
        np.testing.assert_array_equal(one[0] * factor, many[0])
        np.testing.assert_array_equal(
            quantize_weight(weight, *one, kind), quantize_weight(weight * factor, *many, kind)
        )


def test_zero_rows_are_exact():
    weight = np.zeros((2, 4), F32)
    for kind in WEIGHT_SCHEMES:
        scale, offset = weight_params(weight, kind)
        codes = quantize_weight(weight, scale, offset, kind)
        np.testing.assert_array_equal(dequantize_weight(codes, scale, offset), weight)


@pytest.mark.parametrize(
    "kind", [SYM, scheme(Granularity.PER_TENSOR), scheme(Granularity.PER_GROUP, group=2)]
)
def test_symmetric_codes_leave_out_the_most_negative(kind):
    # With a scale smaller than that of min-max, as a search for a better one may choose.
    shape = {Granularity.PER_TENSOR: (1,), Granularity.PER_GROUP: (1, 2)}
    scale = np.full(shape.get(kind.granularity, (1, 1)), 0.5, F32)
    codes = quantize_weight(F32([[-1000, -63.9, 63.9, 1000]]), scale, np.zeros_like(scale), kind)
    assert codes.tolist() == [[-127, -127, 127, 127]]


@pytest.mark.parametrize(
    ("text", "low"),
    [
        ("w4a16", -8),
        ("w4a16_g128", -8),
        ("w4a16_asym", -8),
        ("w4a8_dynamic", -8),
        ("w4a4_dynamic", -8),
        ("w4a8_dynamic_g64", -7),  # whose codes are multiplied by up to 17 and must stay int8
        ("w8a16", -127),
        ("w8a8", -127),
        ("w8a8s", -127),
        ("w8a16_asym", -128),
    ],
)
def test_the_lowest_code_of_weights(text, low):
    kind = QuantScheme.parse(text).weight
    assert lowest_code(kind) == low
    if kind.granularity is Granularity.PER_CHANNEL:
        codes = quantize_weight(F32([[-1e9, 1e9]]), F32([[0.5]]), F32([[0.0]]), kind)
        assert codes.tolist() == [[low, kind.dtype.max]]


def test_types_with_a_table_have_no_lowest_code():
    with pytest.raises(InvalidTypeError, match="codes of nf4 are places in a table"):
        lowest_code(QuantScheme.parse("nf4").weight)


@pytest.mark.parametrize("kind", [k for k in WEIGHT_SCHEMES if k.symmetric], ids=str)
def test_the_full_range_divides_by_half_of_its_length(kind):
    weight = rng(7).standard_normal((6, 8)).astype(F32)
    scale, offset = weight_params(weight, kind, full_range=True)
    plain, _ = weight_params(weight, kind)
    half = F32((kind.dtype.max - kind.dtype.min) / 2)
    np.testing.assert_array_equal(offset, np.zeros_like(scale))
    np.testing.assert_allclose(scale * half, plain * F32(kind.dtype.max), rtol=1e-6)
    codes = quantize_weight(weight, scale, offset, kind, full_range=True)
    assert codes.min() == kind.dtype.min
    assert codes.max() <= kind.dtype.max
    # No weight is further from its level than half a step: the largest are there at both ends.
    error = np.abs(dequantize_weight(codes, scale, offset) - weight)
    assert np.all(error <= 0.500001 * np.max(scale))


def test_the_full_range_is_nothing_new_for_others():
    weight = rng(8).standard_normal((4, 32)).astype(F32)
    for text in ("w4a16_asym", "nf4", "w4a8_mxfp"):
        kind = QuantScheme.parse(text).weight
        if kind.granularity is not Granularity.PER_BLOCK:
            np.testing.assert_array_equal(
                weight_params(weight, kind, full_range=True)[0], weight_params(weight, kind)[0]
            )


def test_group_size_must_divide():
    kind = scheme(Granularity.PER_GROUP, group=3)
    with pytest.raises(FormatError, match="group size 3 does not divide 8 input channels"):
        weight_params(np.ones((2, 8), F32), kind)
    with pytest.raises(FormatError, match="does not divide"):
        quantize_weight(np.ones((2, 8), F32), np.ones((2, 2), F32), np.zeros((2, 2), F32), kind)


# --- per token ------------------------------------------------------------------------------------


def test_each_token_has_its_own_scale():
    x = rng(4).standard_normal((2, 3, 16)).astype(F32)
    x[0, 0] = 0
    codes, scale = quantize_per_token(x, INT8)
    assert codes.shape == x.shape
    assert scale.shape == (2, 3, 1)
    wanted = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / F32(127), F32(EPS))
    np.testing.assert_array_equal(scale, wanted)
    np.testing.assert_array_equal(codes, np.rint(x / wanted))
    assert codes[0, 0].tolist() == [0] * 16
    # A token is quantized alike whatever stands beside it.
    alone, _ = quantize_per_token(x[1, 2:3], INT8)
    np.testing.assert_array_equal(alone[0], codes[1, 2])


# --- folding --------------------------------------------------------------------------------------


def folded(rows=8, columns=32, *, bias=True, seed=5):
    random = rng(seed)
    weight = random.standard_normal((rows, columns)).astype(F32)
    x = (random.standard_normal((10, columns)) * 2 + 0.5).astype(F32)
    scale, offset = weight_params(weight, SYM)
    codes = quantize_weight(weight, scale, offset, SYM)
    s_x, z_x = affine_params(x.min().reshape(1), x.max().reshape(1), ASYM)
    b = random.standard_normal(rows).astype(F32) if bias else None
    return x, codes, scale, s_x, z_x, b


@pytest.mark.parametrize("bias", [True, False])
def test_folding_by_hand(bias):
    _, codes, scale, s_x, z_x, b = folded(bias=bias)
    deq_scale, quant_bias = fold_static(codes, scale, s_x, z_x, b)
    assert deq_scale.dtype == F32
    assert quant_bias.dtype == np.int32
    assert deq_scale.shape == quant_bias.shape == (8,)
    for row in range(8):
        assert deq_scale[row] == F32(s_x[0]) * F32(scale[row, 0])
        exact = -int(z_x[0]) * sum(int(code) for code in codes[row])
        if b is not None:
            exact += float(b[row]) / float(deq_scale[row])
        assert quant_bias[row] == half_even(exact)


@pytest.mark.parametrize("bias", [True, False])
def test_integer_pipeline_is_the_dequantized_product(bias):
    x, codes, scale, s_x, z_x, b = folded(bias=bias)
    deq_scale, quant_bias = fold_static(codes, scale, s_x, z_x, b)
    q_x = quantize(x, s_x, z_x, INT8).astype(np.int64)
    y = (q_x @ codes.T.astype(np.int64) + quant_bias) * deq_scale.astype(float)
    x_back = (q_x - float(z_x[0])) * float(s_x[0])
    w_back = codes * scale.astype(float)
    wanted = x_back @ w_back.T + (0 if b is None else b)
    # The integer bias is off by half a unit at most; without a bias it is exact.
    slack = 0.5 * deq_scale if bias else 0.0
    assert np.all(np.abs(y - wanted) <= slack + 1e-6 * np.abs(wanted) + 1e-9)


def test_integer_pipeline_is_near_the_float_layer():
    x, codes, scale, s_x, z_x, b = folded(64, 64)
    weight = codes * scale
    deq_scale, quant_bias = fold_static(codes, scale, s_x, z_x, b)
    q_x = quantize(x, s_x, z_x, INT8).astype(np.int64)
    y = (q_x @ codes.T.astype(np.int64) + quant_bias) * deq_scale
    wanted = x @ weight.T + b
    assert np.linalg.norm(y - wanted) / np.linalg.norm(wanted) < 0.02


def test_per_tensor_scale_gives_one_deq_scale():
    codes = np.full((3, 4), 2, np.int8)
    deq_scale, quant_bias = fold_static(codes, F32([0.5]), F32([0.25]), F32([-3.0]), None)
    assert deq_scale.tolist() == [0.125]
    assert quant_bias.tolist() == [24, 24, 24]


def test_long_rows_keep_every_digit():
    # 127 * 200003 has more digits than float32 holds.
    codes = np.full((1, 200_003), 127, np.int8)
    _, quant_bias = fold_static(codes, F32([[1.0]]), F32([1.0]), F32([-3.0]), F32([1.0]))
    assert quant_bias.tolist() == [3 * 127 * 200_003 + 1]


def test_many_rows_are_summed_part_by_part():
    rows = 7  # of more codes than are widened at a time, the last part smaller than the others
    codes = np.arange(rows * 400_000, dtype=np.int64).reshape(rows, -1) % 251 - 125
    found = fold_static(codes.astype(np.int8), F32([0.5]), F32([0.25]), F32([-3.0]), None)[1]
    assert found.tolist() == (3 * codes.sum(axis=1)).tolist()


def test_bias_beyond_int32_is_held_at_the_end():
    codes = np.zeros((2, 4), np.int8)
    _, quant_bias = fold_static(
        codes, F32([[EPS], [EPS]]), F32([1.0]), F32([0.0]), F32([1e9, -1e9])
    )
    assert quant_bias.tolist() == [2**31 - 1, -(2**31)]


# --- finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_what_is_not_finite_is_named(bad, dtype):
    x = np.ones((3, 4), dtype)
    x[1, 2] = bad
    x[0, 0] = -x[1, 2]
    with pytest.raises(
        NumericalError, match=r"weight of a\.b has 2 NaN or infinite elements of 12"
    ):
        check_finite("a.b", "weight", x)


def test_large_finite_values_pass():
    check_finite("a", "weight", np.full(4, np.finfo(F32).max, F32))
    check_finite("a", "weight", np.full(100_000, 60000, np.float16))
    check_finite("a", "weight", np.zeros((0, 3), F32))
    check_finite("a", "codes", np.ones(3, np.int8))
