"""The layer that stands for a linear layer while its input range is being found."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from slim_core.layers import QuantizedLinear
from slim_core.numerics import check_finite, dequantize, quantize
from slim_core.scheme import TensorScheme
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.observers import Observer


class ObservedLinear(nn.Module):
    """Linear layer with quantized weights that observes its input and passes it on quantized.

    Later layers so see the noise that they will see when deployed.

    Parameters
    ----------
    layer : QuantizedLinear
        Without input parameters.
    activation : TensorScheme
    observer : Observer
    dtype : torch.dtype
        Of the activations; the input scale is rounded to it.
    keep : float
        Probability that an element is passed on quantized, in [0, 1].
    generator : torch.Generator
        Source of that choice.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: QuantizedLinear,
        activation: TensorScheme,
        observer: Observer,
        *,
        dtype: torch.dtype,
        keep: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.observer = observer
        self._layer = layer
        self._activation = activation
        self._dtype = dtype
        self._keep = keep
        self._generator = generator
        self.register_buffer("weight", layer.dequantized().to(dtype))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe ``x`` of shape (..., in) and return the output of the quantized layer."""
        check_finite(self._layer.name, "input", x)
        self.observer.update(x)
        if x.numel():
            x = self._fake_quantize(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight, bias)

    def finish(self, observer: Observer | None = None) -> FakeQuantLinear:
        """Return the layer with its range fixed, that of another observer if one is given."""
        scale, offset = (observer or self.observer).params(self._activation, self._dtype)
        device = self._layer.codes.device
        layer = replace(self._layer, input_scale=scale.to(device), input_offset=offset.to(device))
        return FakeQuantLinear(layer, self._dtype)

    def _fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        scale, offset = (
            part.to(x.device) for part in self.observer.params(self._activation, self._dtype)
        )
        codes = quantize(x.float(), scale, offset, self._activation.dtype)
        quantized: torch.Tensor = dequantize(codes, scale, offset).to(x.dtype)
        if self._keep >= 1.0:
            return quantized
        chance = torch.rand(x.shape, generator=self._generator).to(x.device)
        return torch.where(chance < self._keep, quantized, x)
