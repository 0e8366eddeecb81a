"""numpy and torch go through the same formulas and give the same numbers, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.dtypes import INT8, IntType
from slim_core.errors import FormatError, NumericalError
from slim_core.formats import FORMATS, to_numpy
from slim_core.layers import QuantizedLinear
from slim_core.numerics import (
    affine_params,
    check_finite,
    dequantize_weight,
    fold_static,
    quantize,
    quantize_per_token,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import Granularity, QuantScheme, TensorScheme

F32 = np.float32

# Floats of any size that is not absurd, with many exact halves for the rounding.
elements = st.one_of(
    st.floats(-1e6, 1e6, width=32),
    st.integers(-512, 512).map(lambda i: float(i) / 2),
    st.sampled_from([0.0, -0.0, 1e-9, -1e-9, 1e-38, 3e4]),
)
weights = arrays(F32, st.tuples(st.integers(1, 6), st.sampled_from([8, 16])), elements=elements)
schemes = st.builds(
    lambda bits, shape, symmetric: TensorScheme(IntType(bits), shape[0], symmetric, shape[1]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(
        [
            (Granularity.PER_TENSOR, 0),
            (Granularity.PER_CHANNEL, 0),
            (Granularity.PER_GROUP, 4),
            (Granularity.PER_GROUP, 8),
        ]
    ),
    st.booleans(),
)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def assert_same(ours, theirs):
    """Require equal dtype, shape and bits."""
    theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)


@given(arrays(F32, 16, elements=elements), arrays(F32, 16, elements=elements), schemes)
def test_affine_params(one, two, scheme):
    low, high = np.minimum(one, two), np.maximum(one, two)
    for ours, theirs in zip(
        affine_params(low, high, scheme),
        affine_params(tensor(low), tensor(high), scheme),
        strict=True,
    ):
        assert_same(ours, theirs)


@given(weights, schemes)
def test_weights(weight, scheme):
    ours, theirs = weight_params(weight, scheme), weight_params(tensor(weight), scheme)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
    codes = quantize_weight(weight, *ours, scheme)
    torch_codes = quantize_weight(tensor(weight), *theirs, scheme)
    assert_same(codes, torch_codes)
    assert_same(dequantize_weight(codes, *ours), dequantize_weight(torch_codes, *theirs))


@given(weights, st.floats(0.001953125, 64, width=32), st.integers(-128, 127))
def test_activations(x, scale, offset):
    s, z = F32([scale]), F32([offset])
    assert_same(quantize(x, s, z, INT8), quantize(tensor(x), tensor(s), tensor(z), INT8))
    for ours, theirs in zip(
        quantize_per_token(x, INT8), quantize_per_token(tensor(x), INT8), strict=True
    ):
        assert_same(ours, theirs)


@given(
    arrays(np.int8, (5, 24)),
    arrays(F32, (5, 1), elements=st.floats(2**-20, 4, width=32)),
    st.floats(2**-20, 4, width=32),
    st.integers(-128, 127),
    st.none() | arrays(F32, 5, elements=st.floats(-1e3, 1e3, width=32)),
)
def test_folding(codes, scale, input_scale, offset, bias):
    ours = (codes, scale, F32([input_scale]), F32([offset]), bias)
    theirs = [None if array is None else tensor(array) for array in ours]
    for a, b in zip(fold_static(*ours), fold_static(*theirs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("size", [(256, 1024), (1000, 352)])
def test_many_codes(size):
    random = np.random.default_rng(0)
    weight = random.standard_normal(size).astype(F32)
    for symmetric in (True, False):
        scheme = TensorScheme(INT8, Granularity.PER_CHANNEL, symmetric)
        params, torch_params = weight_params(weight, scheme), weight_params(tensor(weight), scheme)
        assert_same(
            quantize_weight(weight, *params, scheme),
            quantize_weight(tensor(weight), *torch_params, scheme),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite_names_the_layer(dtype):
    x = torch.full((4, 4), 3e4, dtype=dtype)
    check_finite("a", "activation", x)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    with pytest.raises(NumericalError, match="activation of a has 2 NaN or infinite elements"):
        check_finite("a", "activation", x)


def test_group_size_must_divide():
    scheme = TensorScheme(INT8, Granularity.PER_GROUP, True, 3)
    with pytest.raises(FormatError, match="group size 3 does not divide 8 input channels"):
        weight_params(torch.ones(2, 8), scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["w8a8", "w8a8_dynamic", "w8a16_g8", "w8a16_asym"])
@pytest.mark.parametrize("form", list(FORMATS))
def test_formats_write_the_same_bytes_for_torch_and_numpy(form, text, dtype):
    scheme = QuantScheme.parse(text)
    if FORMATS[form].unsupported(scheme, (8, 16)):
        pytest.skip("the format does not hold the scheme")
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 8).to(dtype)
    scale, offset = weight_params(weight, scheme.weight)
    static = {}
    if scheme.is_static:
        static = {"input_scale": torch.tensor([0.05]), "input_offset": torch.tensor([7.0])}
    codes = quantize_weight(weight, scale, offset, scheme.weight)
    arrays_ = {"codes": codes, "weight_scale": scale, "weight_offset": offset, "bias": bias}
    name = str(dtype).removeprefix("torch.")
    ours = QuantizedLinear("a", scheme, model_dtype=name, **arrays_, **static)
    theirs = QuantizedLinear(
        "a",
        scheme,
        model_dtype=name,
        **{key: to_numpy(value) for key, value in (arrays_ | static).items()},
    )
    one, two = FORMATS[form].encode(ours), FORMATS[form].encode(theirs)
    assert list(one) == list(two)
    for key, array in one.items():
        assert array.dtype == two[key].dtype
        assert array.tobytes() == two[key].tobytes()
    assert str(one["bias"].dtype) == name
