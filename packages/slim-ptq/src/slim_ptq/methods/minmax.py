"""Round to nearest on the grid of the extreme weights: the base line, and enough for 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from slim_core.dtypes import IntType
from slim_core.errors import InvalidValueError
from slim_core.layers import QuantizedLinear
from slim_core.numerics import (
    affine_params,
    check_finite,
    quantize_weight,
    split_groups,
    weight_params,
)
from slim_core.scheme import Granularity, QuantScheme, ScaleKind, TensorScheme, Variant
from slim_core.two_stage import SECOND_SCALE, quantize_two_stage, two_stage_scales
from slim_core.validate import check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts

_CHUNK = 1 << 18  # elements

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MinMax:
    """:func:`quantize_minmax` as a method of recipes.

    Parameters
    ----------
    full_range : bool
        Of symmetric integers: let the codes span the range, the most negative one too, as
        llm-compressor does (:func:`slim_core.numerics.affine_params`).  Other tools for Ascend
        leave it out.

    Raises
    ------
    InvalidTypeError
        ``full_range`` is no bool.
    """

    name: ClassVar[str] = "minmax"
    needs: ClassVar[Needs] = Needs.NONE

    full_range: bool = False

    def __post_init__(self) -> None:
        check_type("full_range", self.full_range, bool)

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why a scheme is more than a grid between the extreme weights."""
        if scheme.variant is Variant.SPARSE:
            return "its outliers need method sparse"
        return self._range_problem(scheme.weight)

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`).

        Raises also an InvalidValueError where ``full_range`` is not possible.
        """
        problem = self._range_problem(scheme)
        if problem is not None:
            raise InvalidValueError(f"{name} cannot be quantized by {self.name}: {problem}")
        if scheme.scales is ScaleKind.TWO_STAGE:
            return _two_stage(name, weight, scheme)
        return Parts(*quantize_minmax(name, weight, scheme, full_range=self.full_range))

    def _range_problem(self, scheme: TensorScheme | None) -> str | None:
        """Return why codes cannot span the range if they are asked to."""
        if not self.full_range or scheme is None:
            return None
        if not scheme.symmetric:
            return "full_range must be False for asymmetric weights, whose codes span the range"
        if not isinstance(scheme.dtype, IntType):
            return f"full_range must be False for {scheme.dtype}, which has no code beyond the last"
        if scheme.scales is ScaleKind.TWO_STAGE:
            return "full_range must be False for two-stage scales, which would leave int8"
        return None


def quantize_minmax(
    name: str, weight: torch.Tensor, scheme: TensorScheme, *, full_range: bool = False
) -> Tensors:
    """Quantize a weight in one stage.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    weight : torch.Tensor, floating point, shape (out, in)
    full_range : bool
        See :class:`MinMax`.

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
    if scheme.granularity is Granularity.PER_BLOCK:
        blocks = _as_rows(values, scheme)
        in_rows = replace(scheme, granularity=Granularity.PER_CHANNEL, group_size=0)
        codes, scale, offset = quantize_minmax(name, blocks, in_rows, full_range=full_range)
        return codes.reshape(values.shape), scale.reshape(-1), offset.reshape(-1)
    per_tensor = scheme.granularity is Granularity.PER_TENSOR
    whole = _tensor_params(values, scheme, full_range=full_range) if per_tensor else None
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    params = []
    for rows, part in _finite_chunks(name, values):
        scale, offset = whole or weight_params(part, scheme, full_range=full_range)
        codes[rows] = quantize_weight(part, scale, offset, scheme, full_range=full_range)
        params.append((scale, offset))
    if whole is not None:
        return codes, *whole
    scales, offsets = zip(*params, strict=True)
    return codes, torch.cat(scales), torch.cat(offsets)


def relative_error(weight: torch.Tensor, layer: QuantizedLinear) -> float:
    """Return ``||W - W_q|| / ||W||`` (Frobenius), 0 for a weight of zeros."""
    values = weight.detach()
    scheme = layer.scheme.weight
    if scheme is not None and scheme.granularity is Granularity.PER_BLOCK:
        values = _as_rows(values, scheme)
        scale, offset = layer.weight_scale[:, None], layer.weight_offset[:, None]
        codes = _as_rows(layer.codes, scheme)
        layer = replace(layer, codes=codes, weight_scale=scale, weight_offset=offset, bias=None)
    norm = error = 0.0
    for rows in _row_chunks(values):
        part = values[rows].float()
        norm += float(torch.linalg.vector_norm(part)) ** 2
        error += float(torch.dist(layer.rows(rows).dequantized(), part)) ** 2
    return math.sqrt(error / norm) if norm else 0.0


def _as_rows(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Return a matrix of blocks that lie across rows as a matrix with a block in each row."""
    blocks: torch.Tensor = split_groups(weight.reshape(1, -1), scheme.group_size)[0]
    return blocks


def _two_stage(name: str, weight: torch.Tensor, scheme: TensorScheme) -> Parts:
    """Quantize a weight in two stages (:mod:`slim_core.two_stage`)."""
    values = weight.detach()
    made = []
    for _, part in _finite_chunks(name, values):
        row_scale, group_scale = two_stage_scales(part, scheme.group_size)
        made.append((quantize_two_stage(part, row_scale, group_scale), row_scale, group_scale))
    codes, row_scale, group_scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    extras = {SECOND_SCALE: group_scale}
    return Parts(codes, row_scale, torch.zeros_like(row_scale), extras)


def _tensor_params(
    weight: torch.Tensor, scheme: TensorScheme, *, full_range: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one scale and offset for all elements."""
    low, high = (end.float().reshape(1) for end in torch.aminmax(weight))
    scale, offset = affine_params(low, high, scheme, full_range=full_range)
    return scale, offset


def _finite_chunks(name: str, values: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows in float32, after a look at them."""
    for rows in _row_chunks(values):
        part = values[rows].float()
        if not bool(torch.isfinite(part.sum())):
            check_finite(name, "weight", values.float())  # which counts over the whole weight
        yield rows, part


def _row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows whose float32 copies stay in the cache of a core.

    The formulas make several passes; over a whole weight each would go through main memory.
    """
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
