"""Emulation in float64: nothing goes through float32 on the way."""

import numpy as np
import pytest
import torch

from slim_core.dtypes import INT8, IntType
from slim_core.errors import InvalidValueError
from slim_core.layers import QuantizedLinear
from slim_core.numerics import (
    dequantize_weight,
    quantize_per_token,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import QuantScheme
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.emulate import through_int8
from slim_ptq.modules import FakeQuantLinear, as_torch


def make_layer(text):
    random = np.random.default_rng(0)
    scheme = QuantScheme.parse(text)
    weight = random.standard_normal((24, 64), np.float32)
    scale, offset = weight_params(weight, scheme.weight)
    layer = QuantizedLinear(
        name="p",
        scheme=scheme,
        codes=quantize_weight(weight, scale, offset, scheme.weight),
        weight_scale=scale,
        weight_offset=offset,
        bias=random.standard_normal(24).astype(np.float32),
        input_scale=np.float32([0.02]) if scheme.is_static else None,
        input_offset=np.float32([-3]) if scheme.is_static else None,
    )
    return layer, FakeQuantLinear(as_torch(layer), torch.float32)


def expected_output(layer, x):
    """Return the output by the formulas, in float64 on the scales as they are."""
    codes = layer.codes.astype(np.float64)
    if layer.scheme.is_static:
        taken = np.clip(np.rint(x / layer.input_scale + layer.input_offset), -128, 127)
        deq_scale, quant_bias = layer.folded()
        return (taken @ codes.T + quant_bias) * deq_scale.astype(np.float64)
    if layer.scheme.is_dynamic:
        taken, scale = quantize_per_token(x, layer.scheme.activation.dtype)
        products = taken.astype(np.float64) @ codes.T
        return products * scale * layer.weight_scale[:, 0].astype(np.float64) + layer.bias
    scale, offset = layer.weight_scale.astype(np.float64), layer.weight_offset.astype(np.float64)
    weight = dequantize_weight(layer.codes, scale, offset, layer.scheme.weight.dtype)
    return x @ weight.T + layer.bias


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a8_dynamic", "w4a4_dynamic", "w8a16", "w4a16_g32", "w4a16_g32_asym"]
)
def test_layers(scheme):
    layer, module = make_layer(scheme)
    assert isinstance(layer.scheme.weight.dtype, IntType)
    x = np.random.default_rng(1).standard_normal((3, 5, 64))
    found = module(torch.from_numpy(x))
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected_output(layer, x)).max() <= 1e-12
    single = module(torch.from_numpy(x).float())
    assert single.dtype == torch.float32
    assert 1e-9 < np.abs(found.numpy() - single.numpy()).max() <= 1e-4


def test_microscaling():
    _, module = make_layer("w4a4_mxfp4")
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 64))).float()
    found = module(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), module(x))


def test_int8_and_back():
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 16)))
    scale = torch.full((16,), 0.01, dtype=torch.float32)
    found = through_int8(x, scale)
    step = scale.double()
    assert torch.equal(found, (x / step).round().clamp(INT8.min, INT8.max) * step)
    assert through_int8(x.bfloat16(), scale).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["float", "w8a8"])
def test_models(saved_model, tiny_calib, tmp_path, scheme):
    directory = saved_model("llama")
    if scheme != "float":
        windows = TokenWindows(tuple(ids for ids, _ in tiny_calib), "random tokens")
        quantize(directory, tmp_path / "out", scheme=scheme, calibration=windows)
        directory = tmp_path / "out"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = load_model(directory, dtype="float64")(ids).logits
        single = load_model(directory, dtype="float32")(ids).logits
    assert (found.dtype, single.dtype) == (torch.float64, torch.float32)
    assert 0 < (found - single).abs().max() <= 0.05 * found.abs().max()
    with pytest.raises(InvalidValueError, match="dtype must be one of 'float32', 'float64'"):
        load_model(directory, dtype="int8")
