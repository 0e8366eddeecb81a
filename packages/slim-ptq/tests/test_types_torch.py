"""numpy and torch give the same codes and scales of tables, powers of two and two stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.kronecker import transform_input
from slim_core.microscaling import round_groups
from slim_core.numerics import dequantize_weight, quantize_weight, unfold_scale, weight_params
from slim_core.scheme import QuantScheme
from slim_core.two_stage import quantize_two_stage, two_stage_scales

F32 = np.float32
weights = arrays(F32, (2, 64), elements=st.floats(-1e4, 1e4, width=32))


def same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Require equal dtype, shape and bits."""
    found = theirs.numpy()
    assert (ours.dtype, ours.shape) == (found.dtype, found.shape)
    assert ours.tobytes() == found.tobytes()


@pytest.mark.parametrize("text", ["nf4", "nf4_b32", "w8a8_mxfp8", "w4a4_mxfp4"])
@settings(max_examples=40)
@given(weight=weights)
def test_tables(text: str, weight: np.ndarray) -> None:
    scheme = QuantScheme.parse(text)
    assert scheme.weight is not None
    other = torch.from_numpy(weight)
    ours, theirs = weight_params(weight, scheme.weight), weight_params(other, scheme.weight)
    for one, two in zip(ours, theirs, strict=True):
        same(one, two)
    codes = quantize_weight(weight, *ours, scheme.weight)
    same(codes, quantize_weight(other, *theirs, scheme.weight))
    same(
        dequantize_weight(codes, *ours, scheme.weight.dtype),
        dequantize_weight(torch.from_numpy(codes), *theirs, scheme.weight.dtype),
    )
    if scheme.activation is not None:
        same(round_groups(weight, scheme.activation), round_groups(other, scheme.activation))


@settings(max_examples=40)
@given(weights)
def test_two_stages(weight: np.ndarray) -> None:
    ours, theirs = two_stage_scales(weight, 16), two_stage_scales(torch.from_numpy(weight), 16)
    for one, two in zip(ours, theirs, strict=True):
        same(one, two)
    same(quantize_two_stage(weight, *ours), quantize_two_stage(torch.from_numpy(weight), *theirs))


scales = st.floats(2.0**-20, 1, width=32)


@given(scales, arrays(F32, 4, elements=scales))
def test_a_scale_that_was_folded_is_found_again(step: float, scale: np.ndarray) -> None:
    step_array = F32([step])
    folded = step_array * scale
    found = unfold_scale(folded, step_array)
    assert (found * step_array).tobytes() == folded.tobytes()
    same(found, unfold_scale(torch.from_numpy(folded), torch.from_numpy(step_array)))


def test_folding_near_a_power_of_two() -> None:
    # The quotient alone misses the product by one place in about 3 % of these.
    step = np.random.default_rng(0).uniform(0.5, 1, 100_000).astype(F32)
    scale = (1 / step).astype(F32)
    for near in (np.nextafter(scale, F32(0)), scale, np.nextafter(scale, F32(9))):
        folded = step * near
        np.testing.assert_array_equal(unfold_scale(folded, step) * step, folded)


def test_transform() -> None:
    rng = np.random.default_rng(0)
    x, left, right = (
        rng.standard_normal(shape).astype(F32) for shape in ((2, 3, 32), (4, 4), (8, 8))
    )
    found = transform_input(*(torch.from_numpy(array) for array in (x, left, right)))
    np.testing.assert_allclose(found.numpy(), transform_input(x, left, right), rtol=1e-4, atol=1e-5)
