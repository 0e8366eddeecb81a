"""Round to nearest on the grid of the extreme weights: the base line, and enough for 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from slim_core.numerics import (
    affine_params,
    check_finite,
    dequantize_weight,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import Granularity, QuantScheme, TensorScheme, Variant
from slim_ptq.methods.base import LayerInputs, Needs, Parts

_CHUNK = 1 << 18  # elements

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MinMax:
    """:func:`quantize_minmax` as a method of recipes."""

    name: ClassVar[str] = "minmax"
    needs: ClassVar[Needs] = Needs.NONE

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why a scheme is more than a grid between the extreme weights."""
        return "its outliers need method sparse" if scheme.variant is Variant.SPARSE else None

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`)."""
        return Parts(*quantize_minmax(name, weight, scheme))


def quantize_minmax(name: str, weight: torch.Tensor, scheme: TensorScheme) -> Tensors:
    """Quantize a weight.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    weight : torch.Tensor, floating point, shape (out, in)

    Returns
    -------
    codes : int8, shape (out, in)
    scale, offset : float32
        Shapes of :func:`slim_core.numerics.weight_params`.

    Raises
    ------
    NumericalError
        The weight has NaN or infinite elements.
    FormatError
        The group size does not divide the input channels.
    """
    values = weight.detach()
    per_tensor = scheme.granularity is Granularity.PER_TENSOR
    whole = _tensor_params(values, scheme) if per_tensor else None
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    params = []
    for rows in _row_chunks(values):
        part = values[rows].float()
        if not bool(torch.isfinite(part.sum())):
            check_finite(name, "weight", values.float())  # which counts over the whole weight
        scale, offset = whole or weight_params(part, scheme)
        codes[rows] = quantize_weight(part, scale, offset, scheme)
        params.append((scale, offset))
    if whole is not None:
        return codes, *whole
    scales, offsets = zip(*params, strict=True)
    return codes, torch.cat(scales), torch.cat(offsets)


def relative_error(weight: torch.Tensor, parts: Tensors) -> float:
    """Return ``||W - W_q|| / ||W||`` (Frobenius), 0 for a weight of zeros."""
    values = weight.detach()
    codes, scale, offset = parts
    norm = error = 0.0
    for rows in _row_chunks(values):
        part = values[rows].float()
        own = (scale, offset) if scale.ndim == 1 else (scale[rows], offset[rows])
        norm += float(torch.linalg.vector_norm(part)) ** 2
        error += float(torch.dist(dequantize_weight(codes[rows], *own), part)) ** 2
    return math.sqrt(error / norm) if norm else 0.0


def _tensor_params(weight: torch.Tensor, scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one scale and offset for all elements."""
    low, high = (end.float().reshape(1) for end in torch.aminmax(weight))
    scale, offset = affine_params(low, high, scheme)
    return scale, offset


def _row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows whose float32 copies stay in the cache of a core.

    The formulas make several passes; over a whole weight each would go through main memory.
    """
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
