"""Arithmetic that the modules which emulate an engine share."""

from __future__ import annotations

import torch

from slim_core.dtypes import INT8
from slim_core.numerics import dequantize, quantize


def working(x: torch.Tensor) -> torch.Tensor:
    """Return activations in the dtype in which they are quantized: float64 as it is, or float32."""
    return x if x.dtype == torch.float64 else x.float()


def through_int8(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x`` rounded to int8 codes and back, in its dtype.

    Parameters
    ----------
    x : torch.Tensor
    scale, offset : torch.Tensor, float32
        Broadcast against ``x``; moved to its device.
    """
    exact = working(x)
    scale = scale.to(exact)
    offset = None if offset is None else offset.to(exact)
    rounded: torch.Tensor = dequantize(quantize(exact, scale, offset, INT8), scale, offset)
    return rounded.to(x.dtype)
