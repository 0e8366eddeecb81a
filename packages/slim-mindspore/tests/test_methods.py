import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.dtypes import INT4, INT8
from slim_core.errors import FormatError, NumericalError
from slim_core.numerics import dequantize_weight, quantize_weight, weight_params
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore.algorithm_args import AwqArgs, GptqArgs
from slim_mindspore.methods.awq import awq, awq_scales
from slim_mindspore.methods.gptq import gptq
from slim_mindspore.methods.rounding import find_params, round_to_nearest, round_weight
from slim_mindspore.methods.smooth import smooth_scales

CHANNEL8 = TensorScheme(INT8, Granularity.PER_CHANNEL)
GROUP4 = TensorScheme(INT4, Granularity.PER_GROUP, group_size=16)
ASYM4 = TensorScheme(INT4, Granularity.PER_GROUP, symmetric=False, group_size=16)


@pytest.fixture
def layer():
    """A weight and correlated inputs with a few large channels."""
    random = np.random.default_rng(0)
    mix = random.standard_normal((64, 64)) / 8
    inputs = random.standard_normal((600, 64)) @ (np.eye(64) + mix)
    inputs[:, ::13] *= 12
    return random.standard_normal((24, 64)).astype(np.float32), inputs.astype(np.float32)


def output_error(weight, restored, inputs):
    return float(np.sum((inputs @ (restored - weight).T.astype(np.float64)) ** 2))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-8, 20))
def test_golden_stick_formula(seed, exponent):
    weight = np.random.default_rng(seed).standard_normal((5, 32)).astype(np.float32)
    weight *= np.float32(2.0) ** exponent
    codes, scale, offset = round_to_nearest("w", weight, CHANNEL8, "golden_stick")
    expected = np.float32(2) * np.abs(weight).max(axis=1) / np.float32(255)
    np.testing.assert_array_equal(scale[:, 0], expected)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / scale), -128, 127))
    assert not offset.any()
    assert (scale > 0).all()
    # The largest magnitude lies at 127.5 scales: up to half a code is cut off there.
    assert np.abs(codes * scale - weight).max() <= 0.5001 * scale.max()


def test_the_symmetric_convention_is_that_of_slim_core():
    weight = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
    for scheme in (CHANNEL8, GROUP4, ASYM4):
        codes, scale, offset = round_to_nearest("w", weight, scheme, "symmetric")
        theirs = weight_params(weight, scheme)
        np.testing.assert_array_equal(scale, theirs[0])
        np.testing.assert_array_equal(offset, theirs[1])
        np.testing.assert_array_equal(codes, quantize_weight(weight, *theirs, scheme))


def test_int4_groups():
    weight = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    scale, offset = find_params(weight, GROUP4, "golden_stick")
    codes = round_weight(weight, scale, offset, GROUP4, "golden_stick")
    for row in range(3):
        for group in range(2):
            part = weight[row, 16 * group : 16 * group + 16]
            step = np.float32(2) * np.abs(part).max() / np.float32(15)
            assert scale[row, group] == step
            expected = np.clip(np.rint(part / step), -8, 7)
            np.testing.assert_array_equal(codes[row, 16 * group : 16 * group + 16], expected)
    with pytest.raises(FormatError, match="group size 16 does not divide 24"):
        find_params(weight[:, :24], GROUP4, "golden_stick")


def test_zeros_and_nan():
    codes, scale, _ = round_to_nearest("w", np.zeros((2, 16), np.float32), GROUP4, "golden_stick")
    assert not codes.any()
    assert (scale > 0).all()
    with pytest.raises(NumericalError, match="weight of w has 1 NaN"):
        round_to_nearest("w", np.full((1, 1), np.nan, np.float32), CHANNEL8, "symmetric")


def test_smoothing_formula_and_identity(layer):
    weight, inputs = layer
    inputs[:, 3] = 0
    weight[:, 5] = 0
    peak = np.abs(inputs).max(axis=0)
    scales = smooth_scales(peak, weight, 0.5)
    expected = np.sqrt(peak / np.where(np.abs(weight).max(axis=0) > 0, np.abs(weight).max(0), 1))
    used = np.ones(64, bool)
    used[[3, 5]] = False
    np.testing.assert_allclose(scales[used], expected[used], rtol=1e-6)
    assert (scales[[3, 5]] == 1).all()
    before = inputs @ weight.T
    after = (inputs / scales) @ (weight * scales).T
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    np.testing.assert_array_equal(smooth_scales(peak, weight, 0.0)[5], 1)
    assert smooth_scales(np.full(1, 1e-30), np.ones((1, 1)), 1.0)[0] == np.float32(1e-5)


@pytest.mark.parametrize("scheme", [GROUP4, ASYM4, TensorScheme(INT4, Granularity.PER_CHANNEL)])
@pytest.mark.parametrize(
    "options",
    [
        GptqArgs(),
        GptqArgs(block_size=24),
        GptqArgs(block_size=0),
        GptqArgs(desc_act=True),
        GptqArgs(static_groups=True),
    ],
)
def test_gptq_beats_rounding(layer, scheme, options):
    weight, inputs = layer
    hessian = 2 * inputs.T.astype(np.float64) @ inputs / len(inputs)
    plain = round_to_nearest("w", weight, scheme, "golden_stick")
    found = gptq("w", weight, hessian, scheme, options, "golden_stick")
    assert found.codes.min() >= -8
    assert found.codes.max() <= 7
    errors = [
        output_error(weight, dequantize_weight(codes, scale, offset), inputs)
        for codes, scale, offset in (plain, (found.codes, found.scale, found.offset))
    ]
    assert errors[1] <= 0.9 * errors[0]


def test_gptq_does_not_depend_on_its_blocks(layer):
    weight, inputs = layer
    hessian = inputs.T.astype(np.float64) @ inputs
    results = [
        gptq("w", weight, hessian, GROUP4, GptqArgs(block_size=size), "symmetric")
        for size in (0, 16, 24, 128)
    ]
    for other in results[1:]:
        assert np.mean(other.codes != results[0].codes) <= 0.001
        np.testing.assert_allclose(other.scale, results[0].scale, rtol=1e-5)


def test_gptq_of_uncorrelated_inputs_is_rounding(layer):
    weight, _ = layer
    found = gptq("w", weight, np.eye(64), GROUP4, GptqArgs(), "golden_stick")
    codes, scale, _ = round_to_nearest("w", weight, GROUP4, "golden_stick")
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)


def test_gptq_of_dead_and_singular_inputs(layer):
    weight, inputs = layer
    inputs = inputs.copy()
    inputs[:, 7] = 0
    inputs[:, 9] = inputs[:, 8]
    hessian = inputs.T.astype(np.float64) @ inputs
    found = gptq("w", weight, hessian, GROUP4, GptqArgs(damp_percent=0.0), "golden_stick")
    assert not found.codes[:, 7].any()
    assert found.damp_percent > 0
    with pytest.raises(NumericalError, match="Hessian of the inputs of w has"):
        gptq("w", weight, hessian * np.nan, GROUP4, GptqArgs(), "golden_stick")
    with pytest.raises(NumericalError, match="Hessian of w cannot be inverted"):
        gptq("w", weight, -hessian - np.eye(64), GROUP4, GptqArgs(), "golden_stick")


@pytest.mark.parametrize("scheme", [GROUP4, ASYM4])
def test_awq_beats_rounding(layer, scheme):
    weight, inputs = layer
    mean = np.abs(inputs).mean(axis=0)
    plain = round_to_nearest("w", weight, scheme, "golden_stick")
    rounding = output_error(weight, dequantize_weight(*plain), inputs)
    found = awq("w", weight, inputs, mean, scheme, AwqArgs(), "golden_stick")
    restored = dequantize_weight(found.codes, found.scale, found.offset) / found.smooth
    assert output_error(weight, restored, inputs) <= 0.8 * rounding
    relative = np.sqrt(output_error(weight, restored, inputs) / np.sum((inputs @ weight.T) ** 2))
    assert found.error == pytest.approx(relative, rel=1e-3)
    unclipped = awq(
        "w", weight, inputs, mean, scheme, AwqArgs(weight_clip_ratio=1.0), "golden_stick"
    )
    assert found.error <= unclipped.error
    fixed = AwqArgs(smooth_alpha=0.0, weight_clip_ratio=1.0)
    none = awq("w", weight, inputs, mean, scheme, fixed, "golden_stick")
    assert unclipped.error <= none.error


def test_awq_scales():
    mean, weight_mean = np.array([1.0, 4.0, 0.0]), np.array([0.5, 0.25, 0.5])
    scales = awq_scales(mean, weight_mean, 0.5, duo_scaling=False)
    raw = np.array([1.0, 2.0, 1e-4])
    np.testing.assert_allclose(scales, raw / np.sqrt(2.0 * 1e-4), rtol=1e-6)
    duo = awq_scales(mean[:2], weight_mean[:2], 0.5, duo_scaling=True)
    raw = np.array([1 / (0.5**0.5 + 1e-4), 2 / (0.5 + 1e-4)])
    np.testing.assert_allclose(duo, raw / np.sqrt(raw.prod()), rtol=1e-6)
