"""The layer that stands for a quantized linear layer in a PyTorch model.

It computes what the engine computes, with the stored integers and scales, in floating point: a
model that holds these layers has the quality of the deployed one, on any device.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from slim_core.dtypes import INT8
from slim_core.layers import LAYER_TENSORS, QuantizedLinear
from slim_core.numerics import dequantize_weight, quantize, quantize_per_token


class FakeQuantLinear(nn.Module):
    """Linear layer on integer codes.

    * static activations: ``y = (q_x @ codes.T + quant_bias) * deq_scale``, the integer sums held
      in float32 (exact up to 2**24, beyond that to its rounding)
    * per-token activations: ``y = (q_x @ codes.T) * s_x * s_w + bias``
    * float activations: ``y = x @ ((codes - z_w) * s_w).T + bias``

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
        self._code_type = INT8 if layer.scheme.activation is None else layer.scheme.activation.dtype
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
        weight: torch.Tensor = dequantize_weight(self.codes, self.weight_scale, self.weight_offset)
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
        if self.scheme.is_static:
            return self._static(x)
        if self.scheme.is_dynamic:
            return self._dynamic(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Return sizes and scheme for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )

    def _static(self, x: torch.Tensor) -> torch.Tensor:
        codes = quantize(x.float(), self.input_scale, self.input_offset, self._code_type)
        products = functional.linear(codes.float(), self.codes.float())
        y: torch.Tensor = (products + self.quant_bias) * self.deq_scale
        return y.to(x.dtype)

    def _dynamic(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = quantize_per_token(x.float(), self._code_type)
        products = functional.linear(codes.float(), self.codes.float())
        y: torch.Tensor = products * scale * self.weight_scale.reshape(-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def on_device(layer: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """Return the layer with all its tensors on a device."""
    return layer.map_tensors(lambda tensor: tensor.to(device))
