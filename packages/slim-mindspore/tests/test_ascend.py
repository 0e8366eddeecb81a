"""The calls of fused operators, with stand-ins that compute what the operators are documented to.

They check which operator is called with what; nothing here runs on Ascend.
"""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from slim_core.dtypes import INT8
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore import ascend
from slim_mindspore.cells import quant_cell
from slim_mindspore.quantized_layer import SmoothedLinear

STATIC = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
TOKEN = TensorScheme(INT8, Granularity.PER_TOKEN)


def f32(x):
    return ops.cast(x, ms.float32)


class WeightQuantBatchMatmul(nn.Cell):
    def __init__(self, transpose_x, transpose_weight, antiquant_group_size):
        super().__init__()
        assert (transpose_x, transpose_weight, antiquant_group_size) == (False, True, 0)

    def construct(self, x, weight, scale, offset, quant_scale, quant_offset, bias):
        assert [t.dtype for t in (x, weight, scale, offset)] == [
            ms.float16,
            ms.int8,
            ms.float16,
            ms.float16,
        ]
        assert quant_scale is quant_offset is bias is None
        restored = (f32(weight) + f32(offset)[:, None]) * f32(scale)[:, None]
        return ops.cast(ops.matmul(f32(x), restored.T), ms.float16)


class QuantV2(nn.Cell):
    def construct(self, x, scale, offset, sqrt_mode, rounding_mode, dst_type):
        assert (x.dtype, scale.dtype, offset.dtype) == (ms.float16, ms.float16, ms.int8)
        assert (sqrt_mode, rounding_mode, dst_type) == (False, "ROUND", ms.int8)
        codes = ops.clamp(ops.round(f32(x) / f32(scale) + f32(offset)), -128, 127)
        return ops.cast(codes, ms.int8)


class DynamicQuantExt(nn.Cell):
    def construct(self, x, smooth_scales):
        assert x.dtype == ms.float16
        assert smooth_scales is None or smooth_scales.dtype == ms.float16
        x = f32(x) if smooth_scales is None else f32(x) * f32(smooth_scales)
        scale = ops.amax(ops.abs(x), -1) / 127.0
        return ops.cast(ops.round(x / scale[..., None]), ms.int8), scale


class QuantBatchMatmul(nn.Cell):
    def __init__(self, transpose_x1, transpose_x2, dtype):
        super().__init__()
        assert (transpose_x1, transpose_x2, dtype) == (False, True, ms.float16)

    def construct(self, x1, x2, scale, offset, bias, per_token):
        assert (x1.dtype, x2.dtype, offset) == (ms.int8, ms.int8, None)
        total = ops.matmul(f32(x1), f32(x2).T)
        if per_token is None:
            assert (scale.dtype, bias.dtype) == (ms.int64, ms.int32)
            scale = ms.Tensor(scale.asnumpy().astype(np.uint32).view(np.float32))
            return ops.cast((total + f32(bias)) * scale, ms.float16)
        assert (scale.dtype, per_token.dtype, bias) == (ms.float32, ms.float32, None)
        return ops.cast(total * scale * per_token[..., None], ms.float16)


@pytest.fixture
def on_ascend(monkeypatch):
    fakes = SimpleNamespace(
        WeightQuantBatchMatmul=WeightQuantBatchMatmul,
        QuantV2=QuantV2,
        DynamicQuantExt=DynamicQuantExt,
        QuantBatchMatmul=QuantBatchMatmul,
    )
    monkeypatch.setattr(ascend, "operators", lambda: fakes)
    monkeypatch.setattr("slim_mindspore.cells.on_ascend", lambda: True)


@pytest.mark.parametrize("activation", [None, STATIC, TOKEN])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_fused_cells_compute_the_same(monkeypatch, on_ascend, make_layer, activation, smoothed):
    smooth = np.linspace(0.5, 2, 64).astype(np.float32) if smoothed else None
    result = SmoothedLinear(make_layer(64, activation), smooth)
    x = ms.Tensor(np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32))
    fused = quant_cell(result)
    assert fused.kernel is not None
    found = fused(x)
    monkeypatch.setattr("slim_mindspore.cells.on_ascend", lambda: False)
    plain = quant_cell(result)
    assert plain.kernel is None
    expected = plain(x).asnumpy()
    assert found.dtype == ms.float32
    assert np.linalg.norm(found.asnumpy() - expected) <= 0.01 * np.linalg.norm(expected)


def test_groups_are_dequantized_on_ascend_too(on_ascend, make_layer):
    groups = TensorScheme(INT8, Granularity.PER_GROUP, group_size=32)
    assert quant_cell(SmoothedLinear(make_layer(64, weight=groups))).kernel is None


def test_the_operators_have_these_names():
    for name in ("WeightQuantBatchMatmul", "QuantV2", "DynamicQuantExt", "QuantBatchMatmul"):
        assert hasattr(ascend.operators(), name)
    assert not ascend.on_ascend()
