"""The layer that stands for a quantized linear layer in a PyTorch model.

It computes what the engine computes, with the stored integers and scales, in floating point: a
model that holds these layers has the quality of the deployed one, on any device.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from slim_core.dtypes import CodeType, IntType, TableType
from slim_core.kronecker import transform_input
from slim_core.layers import LAYER_TENSORS, QuantizedLinear
from slim_core.microscaling import round_groups
from slim_core.numerics import quantize, quantize_per_token
from slim_core.scheme import Granularity, Variant
from slim_core.tables import decode_table
from slim_core.two_stage import SECOND_SCALE, two_stage_integers
from slim_ptq.emulate import working
from slim_ptq.tensors import from_numpy


class FakeQuantLinear(nn.Module):
    """Linear layer on integer codes.

    * static activations: ``y = (q_x @ codes.T + quant_bias) * deq_scale``, the integer sums held
      in float32 (exact up to 2**24, beyond that to its rounding)
    * per-token activations: ``y = (q_x @ codes.T) * s_x * s_w + bias``; the codes of two-stage
      weights are multiplied by the integers of their groups first, those of FP8 stand for levels
    * W8A8_MIX: per-token for sequences, static for the single token of a decode step
    * activations in groups: ``y = x_q @ W_q.T + bias``
    * float activations: ``y = x @ W_q.T + bias``

    FlatQuant transforms ``x`` before it is quantized.  Inputs of float64 are computed in float64,
    on the scales as they are stored.

    Parameters
    ----------
    layer : QuantizedLinear
        Of torch tensors.
    dtype : torch.dtype
        In which the layer takes and gives activations of float weight-only products.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_offset: torch.Tensor
    input_scale: torch.Tensor | None
    input_offset: torch.Tensor | None
    bias: torch.Tensor | None
    deq_scale: torch.Tensor
    quant_bias: torch.Tensor

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = layer.scheme
        self.model_dtype = layer.model_dtype
        self.out_features, self.in_features = layer.codes.shape
        self._dtype = dtype
        for name in LAYER_TENSORS:
            self.register_buffer(name, getattr(layer, name))
        self._extras = tuple(layer.extras)
        for name, tensor in layer.extras.items():
            self.register_buffer(name, tensor)
        deq_scale, quant_bias = layer.folded() if layer.scheme.is_static else (None, None)
        self.register_buffer("deq_scale", deq_scale)
        self.register_buffer("quant_bias", quant_bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, shape (out, in), in the dtype of the model."""
        weight: torch.Tensor = self.layer("").dequantized()
        return weight.to(self._dtype)

    def layer(self, name: str) -> QuantizedLinear:
        """Return the quantized layer under a name."""
        return QuantizedLinear(
            name,
            self.scheme,
            self.codes,
            self.weight_scale,
            self.weight_offset,
            self.input_scale,
            self.input_offset,
            self.bias,
            self.model_dtype,
            extras={extra: self.get_buffer(extra) for extra in self._extras},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for ``x`` of shape (..., in), in the dtype of ``x``."""
        activation = self.scheme.activation
        if activation is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            exact = x.dtype == torch.float64
            weight = self._in_float64().dequantized() if exact else self.weight.to(x.dtype)
            return functional.linear(x, weight, bias)
        if activation.granularity is Granularity.PER_GROUP:
            values = round_groups(self._transformed(x), activation)
            layer = self._in_float64() if x.dtype == torch.float64 else self.layer("")
            y = functional.linear(values, layer.multiplied())
            return self._with_bias(y).to(x.dtype)
        is_sequence = x.ndim > 1 and x.shape[-2] > 1
        if self.scheme.is_static and not (self.scheme.variant is Variant.MIX and is_sequence):
            assert isinstance(activation.dtype, IntType)  # narrowing: fixed ranges are of integers
            return self._static(x, activation.dtype)
        return self._per_token(x, activation.dtype)

    def extra_repr(self) -> str:
        """Return sizes and scheme for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )

    def _static(self, x: torch.Tensor, dtype: IntType) -> torch.Tensor:
        exact = working(x)
        codes = quantize(exact, self.input_scale, self.input_offset, dtype)
        products = functional.linear(codes.to(exact.dtype), self.codes.to(exact.dtype))
        y: torch.Tensor = (products + self.quant_bias) * self.deq_scale
        return y.to(x.dtype)

    def _per_token(self, x: torch.Tensor, dtype: CodeType) -> torch.Tensor:
        flat = self.scheme.variant is Variant.FLATQUANT
        clip_ratio = (self.get_buffer("clip_ratio"),) if flat else ()
        moved = self._transformed(x)
        codes, scale = quantize_per_token(moved, dtype, *clip_ratio)
        if SECOND_SCALE in self._extras:
            weight = two_stage_integers(self.codes, self.get_buffer(SECOND_SCALE))
        else:
            assert self.scheme.weight is not None  # narrowing
            weight = _levels(self.codes, self.scheme.weight.dtype)
        levels = _levels(codes, dtype).to(moved.dtype)
        products = functional.linear(levels, weight.to(moved.dtype))
        y: torch.Tensor = products * scale * self.weight_scale.reshape(-1)
        return self._with_bias(y).to(x.dtype)

    def _transformed(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input as it is quantized, in the dtype of :func:`working`."""
        x = working(x)
        if self.scheme.variant is not Variant.FLATQUANT:
            return x
        factors = self.get_buffer("left_trans"), self.get_buffer("right_trans")
        moved: torch.Tensor = transform_input(x, *(factor.to(x.dtype) for factor in factors))
        return moved

    def _in_float64(self) -> QuantizedLinear:
        """Return the layer with its scales in float64, so that its weight is formed there."""
        return self.layer("").map_tensors(lambda t: t.double() if t.is_floating_point() else t)

    def _with_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias


def as_torch(layer: QuantizedLinear) -> QuantizedLinear:
    """Return the layer with torch tensors in the place of arrays."""
    return layer.map_tensors(from_numpy)


def _levels(codes: torch.Tensor, dtype: CodeType) -> torch.Tensor:
    """Return the numbers that codes stand for before they are scaled, float32."""
    if not isinstance(dtype, TableType):
        return codes.float()
    levels: torch.Tensor = decode_table(codes, dtype)
    return levels


def on_device(layer: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """Return the layer with all its tensors on a device."""
    return layer.map_tensors(lambda tensor: tensor.to(device))
