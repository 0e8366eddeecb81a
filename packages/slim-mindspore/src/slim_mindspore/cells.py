"""Linear cells that compute from integer weights, on any device.

They hold int8 codes and the scales as non-trainable parameters and work in float32 where a fused
kernel of Ascend would work in integers; sums of integers are exact, since they are formed in pieces
short enough for the 24 bits of float32 and added in int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.layers import QuantizedLinear
from slim_core.numerics import EPS
from slim_mindspore.framework import Parameter, Tensor, ms, nn, ops

# 1024 products of int8 by int8 stay within 2**24.
EXACT_COLUMNS = 1024


def quant_cell(
    layer: QuantizedLinear, smooth: np.ndarray | None = None, activation: Any = None
) -> Any:
    """Return the cell that computes a quantized layer.

    Parameters
    ----------
    layer : QuantizedLinear
    smooth : numpy.ndarray, float32, shape (in,), optional
        Divides the input; the codes stand for the weight times it.
    activation : Cell, optional
        Applied to the output, as in ``nn.Dense``.
    """
    if layer.scheme.is_static:
        return StaticLinear(layer, smooth, activation)
    if layer.scheme.is_dynamic:
        return DynamicLinear(layer, smooth, activation)
    return WeightOnlyLinear(layer, smooth, activation)


class _QuantLinear(nn.Cell):  # type: ignore[misc]
    """What the cells share: codes, smoothing, activation and sizes."""

    def __init__(self, layer: QuantizedLinear, smooth: np.ndarray | None, activation: Any) -> None:
        super().__init__()
        self.scheme_name = str(layer.scheme)
        self.out_features, self.in_features = layer.codes.shape
        self.weight = constant(np.asarray(layer.codes, np.int8), "weight")
        self.smoothed = smooth is not None
        if smooth is not None:
            self.smooth_scale = constant(np.asarray(smooth, np.float32), "smooth_scale")
        self.activation = activation
        self.activated = activation is not None

    def prepare(self, x: Any) -> Any:
        """Return the input in float32, divided by the smoothing scales."""
        x = ops.cast(x, ms.float32)
        return x / self.smooth_scale if self.smoothed else x

    def finish(self, y: Any) -> Any:
        """Apply the activation of the replaced cell."""
        return self.activation(y) if self.activated else y

    def integer_product(self, codes: Any) -> Any:
        """Return the exact int32 products of activation codes, held in float32, and the weight."""
        weight = ops.cast(self.weight, ms.float32)
        total = None
        for start in range(0, self.in_features, EXACT_COLUMNS):
            end = min(start + EXACT_COLUMNS, self.in_features)
            part = ops.matmul(codes[..., start:end], weight[:, start:end].T)
            part = ops.cast(part, ms.int32)
            total = part if total is None else total + part
        return total


class WeightOnlyLinear(_QuantLinear):
    """Dequantizes the weight and multiplies; scales per channel, per group or per tensor."""

    def __init__(
        self, layer: QuantizedLinear, smooth: np.ndarray | None = None, activation: Any = None
    ) -> None:
        super().__init__(layer, smooth, activation)
        scale = np.asarray(layer.weight_scale, np.float32)
        offset = np.asarray(layer.weight_offset, np.float32)
        scale, offset = (item.reshape(-1, item.shape[-1], 1) for item in (scale, offset))
        self.groups = scale.shape[1]
        self.weight_scale = constant(scale, "weight_scale")
        self.weight_offset = constant(offset, "weight_offset")
        self.biased = layer.bias is not None
        if layer.bias is not None:
            self.bias = constant(np.asarray(layer.bias).astype(np.float32), "bias")

    def construct(self, x: Any) -> Any:
        """Return float32 outputs of (..., in) inputs."""
        shape = (self.out_features, self.groups, self.in_features // self.groups)
        codes = ops.cast(self.weight, ms.float32).reshape(shape)
        weight = (codes - self.weight_offset) * self.weight_scale
        weight = weight.reshape(self.out_features, self.in_features)
        y = ops.matmul(self.prepare(x), weight.T)
        return self.finish(y + self.bias if self.biased else y)


class StaticLinear(_QuantLinear):
    """Quantizes its input with fixed parameters and multiplies integers."""

    def __init__(
        self, layer: QuantizedLinear, smooth: np.ndarray | None = None, activation: Any = None
    ) -> None:
        super().__init__(layer, smooth, activation)
        deq_scale, quant_bias = layer.folded()
        self.input_scale = constant(np.asarray(layer.input_scale, np.float32), "input_scale")
        self.input_offset = constant(np.asarray(layer.input_offset, np.float32), "input_offset")
        self.deq_scale = constant(np.asarray(deq_scale, np.float32), "deq_scale")
        self.quant_bias = constant(np.asarray(quant_bias, np.int32), "quant_bias")

    def construct(self, x: Any) -> Any:
        """Return float32 outputs of (..., in) inputs."""
        codes = ops.round(self.prepare(x) / self.input_scale + self.input_offset)
        total = self.integer_product(ops.clamp(codes, -128, 127)) + self.quant_bias
        return self.finish(ops.cast(total, ms.float32) * self.deq_scale)


class DynamicLinear(_QuantLinear):
    """Quantizes each token by its own largest magnitude and multiplies integers."""

    def __init__(
        self, layer: QuantizedLinear, smooth: np.ndarray | None = None, activation: Any = None
    ) -> None:
        super().__init__(layer, smooth, activation)
        scale = np.asarray(layer.weight_scale, np.float32).reshape(-1)
        self.weight_scale = constant(scale, "weight_scale")
        self.biased = layer.bias is not None
        if layer.bias is not None:
            self.bias = constant(np.asarray(layer.bias).astype(np.float32), "bias")

    def construct(self, x: Any) -> Any:
        """Return float32 outputs of (..., in) inputs."""
        x = self.prepare(x)
        peak = ops.amax(ops.abs(x), -1, True)
        scale = ops.maximum(peak / 127.0, EPS)
        total = self.integer_product(ops.clamp(ops.round(x / scale), -128, 127))
        y = ops.cast(total, ms.float32) * scale * self.weight_scale
        return self.finish(y + self.bias if self.biased else y)


def constant(array: np.ndarray, name: str) -> Any:
    """Return an array as a parameter that is not trained."""
    return Parameter(Tensor(np.ascontiguousarray(array)), name=name, requires_grad=False)


def activation_of(cell: Any) -> Any:
    """Return the activation that a linear cell applies, None if there is none."""
    return getattr(cell, "activation", None)
