"""Weights are quantized in chunks of rows; the result is that of the whole weight at once."""

from __future__ import annotations

import pytest
import torch

from slim_core.numerics import dequantize_weight, quantize_weight, weight_params
from slim_core.scheme import QuantScheme
from slim_ptq.methods import minmax


@pytest.mark.parametrize("text", ["w8a16", "w8a16_asym", "w8a16_g32", "w8a8_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_show(text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = QuantScheme.parse(text).weight
    assert scheme is not None
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    monkeypatch.setattr(minmax, "_CHUNK", 5 * 64)
    parts = minmax.quantize_minmax("a", weight, scheme)
    error = minmax.relative_error(weight, parts)
    assert torch.equal(weight, before)

    scale, offset = weight_params(before.float(), scheme)
    whole = (quantize_weight(before.float(), scale, offset, scheme), scale, offset)
    for chunked, expected in zip(parts, whole, strict=True):
        assert torch.equal(chunked, expected)
    difference = before.float() - dequantize_weight(*whole)
    assert error == pytest.approx(float(difference.norm() / before.float().norm()), rel=1e-5)
