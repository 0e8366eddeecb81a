"""Weights are quantized in chunks of rows; the result is that of the whole weight at once."""

from __future__ import annotations

import pytest
import torch

from slim_core.numerics import dequantize_weight, quantize_weight, weight_params
from slim_core.scheme import QuantScheme
from slim_core.two_stage import SECOND_SCALE, quantize_two_stage, two_stage_scales
from slim_ptq.methods import minmax


@pytest.mark.parametrize(
    "text", ["w8a16", "w8a16_asym", "w8a16_g32", "w8a8_tensor", "w4a16_g32", "nf4"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_show(text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = QuantScheme.parse(text)
    scheme = parsed.weight
    assert scheme is not None
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    monkeypatch.setattr(minmax, "_CHUNK", 5 * 64)
    made = minmax.MinMax().quantize("a", weight, scheme)
    error = minmax.relative_error(weight, made.layer("a", parsed, None, "float32"))
    assert torch.equal(weight, before)

    scale, offset = weight_params(before.float(), scheme)
    whole = (quantize_weight(before.float(), scale, offset, scheme), scale, offset)
    for chunked, expected in zip((made.codes, made.scale, made.offset), whole, strict=True):
        assert torch.equal(chunked, expected)
    difference = before.float() - dequantize_weight(*whole, scheme.dtype)
    assert error == pytest.approx(float(difference.norm() / before.float().norm()), rel=1e-5)


def test_chunks_of_two_stages_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = QuantScheme.parse("w4a8_dynamic_g32")
    assert parsed.weight is not None
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
    rows, groups = two_stage_scales(weight, 32)
    codes = quantize_two_stage(weight, rows, groups)
    monkeypatch.setattr(minmax, "_CHUNK", 5 * 64)
    made = minmax.MinMax().quantize("a", weight, parsed.weight)
    assert torch.equal(made.codes, codes)
    assert torch.equal(made.scale, rows)
    assert torch.equal(made.extras[SECOND_SCALE], groups)
    layer = made.layer("a", parsed, None, "float32")
    difference = weight - layer.dequantized()
    expected = float(difference.norm() / weight.norm())
    assert minmax.relative_error(weight, layer) == pytest.approx(expected, rel=1e-5)
