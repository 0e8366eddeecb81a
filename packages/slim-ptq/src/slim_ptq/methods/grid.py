"""The values that quantized weights can take: scales and offsets, and how they are chosen.

Weights that share a scale are a set: shape (sets, k), the rows of a weight or their groups.  What
choices minimize is ``sum_k h_k (w_k - q_k)**2``, where ``h`` is the mean square of the input
channels if it is known (the output error, if channels were uncorrelated), and 1 if not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from slim_core.dtypes import TableType
from slim_core.numerics import EPS, affine_params, lowest_code, split_groups
from slim_core.scheme import Granularity, ScaleKind, TensorScheme
from slim_core.tables import decode_table, encode_table
from slim_core.two_stage import LARGEST_GROUP_SCALE, SECOND_SCALE, two_stage_scales
from slim_ptq.methods.base import Parts

_CHUNK = 1 << 18  # elements of a set of temporaries that stays in the cache of a core


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scale and offset of every set.

    Parameters
    ----------
    scheme : TensorScheme
    scale, offset : torch.Tensor
        float32, shape (sets, 1).
    unit : torch.Tensor, optional
        Of two-stage scales: the scale of the row, shape (sets, 1), of which ``scale`` is a
        multiple.
    """

    scheme: TensorScheme
    scale: torch.Tensor
    offset: torch.Tensor
    unit: torch.Tensor | None = None

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of weights, shape (sets, k), as float32, or int8 for tables."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            codes: torch.Tensor = encode_table(weight / self.scale, dtype)
            return codes
        return round_places(weight / self.scale, self.offset, self.scheme)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what codes stand for, float32."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            levels: torch.Tensor = decode_table(codes, dtype)
            return levels * self.scale
        return (codes - self.offset) * self.scale

    def error(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted squared error of each set, shape (sets, 1)."""
        places = weight / self.scale  # in steps, which saves a product for each weight
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            miss = decode_table(encode_table(places, dtype), dtype).sub_(places)
        else:
            if not self.scheme.symmetric:
                places += self.offset
            miss = places.round().clamp_(lowest_code(self.scheme), dtype.max).sub_(places)
        square = miss.square_() if importance is None else miss.square_().mul_(importance)
        total: torch.Tensor = square.sum(dim=1, keepdim=True) * self.scale.square()
        return total

    def moved(self, scale: torch.Tensor, offset: torch.Tensor) -> Grid:
        """Return the grid with another scale, the nearest that can be stored, and offset."""
        return replace(self, scale=self._storable(scale), offset=offset)

    def where(self, better: torch.Tensor, other: Grid) -> Grid:
        """Return the other grid for the sets where it is ``better``, this one elsewhere."""
        return replace(
            self,
            scale=torch.where(better, other.scale, self.scale),
            offset=torch.where(better, other.offset, self.offset),
        )

    def _storable(self, scale: torch.Tensor) -> torch.Tensor:
        if self.unit is not None:
            return (scale / self.unit).round().clamp(1, LARGEST_GROUP_SCALE) * self.unit
        if self.scheme.scales is ScaleKind.E8M0:
            return torch.exp2(scale.log2().round().clamp(-126, 127))
        return scale.clamp(min=EPS)


def round_places(places: torch.Tensor, offset: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Round weights in steps to the codes of an integer type, in place."""
    if not scheme.symmetric:
        places += offset
    return places.round_().clamp_(lowest_code(scheme), scheme.dtype.max)


Fit = Callable[[torch.Tensor, Grid, torch.Tensor | None], Grid]
"""A choice of grid: weights (sets, k), the min-max grid, importance (sets, k) or None."""


def minmax_grid(
    weight: torch.Tensor, scheme: TensorScheme, unit: torch.Tensor | None = None
) -> Grid:
    """Return the grid between the extremes of each set."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    grid = Grid(scheme, *affine_params(low, high, scheme), unit=unit)
    return grid if unit is None else grid.moved(grid.scale, grid.offset)


def keep_minmax(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Grid:
    """Return the min-max grid as it is."""
    return grid


@dataclass(frozen=True, slots=True, eq=False)
class WeightGrid:
    """The grid of a whole weight: one entry for each row and group.

    Parameters
    ----------
    scheme : TensorScheme
    scale, offset : torch.Tensor
        float32, shape (out, groups), (out, 1) or (1, 1).
    unit : torch.Tensor, optional
        Scale of the rows of two-stage weights, shape (out, 1).
    """

    scheme: TensorScheme
    scale: torch.Tensor
    offset: torch.Tensor
    unit: torch.Tensor | None = None

    def columns(self, group: int) -> Grid:
        """Return the grid of the rows in one group of input channels."""
        part = slice(group, group + 1)
        return Grid(self.scheme, self.scale[:, part], self.offset[:, part], self.unit)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of a weight, int8, shape (out, in)."""
        size = weight.shape[1] // self.scale.shape[1]
        parts = [
            self.columns(group).codes(part).to(torch.int8)
            for group, part in enumerate(torch.split(weight, size, dim=1))
        ]
        return torch.cat(parts, dim=1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the float32 weight that codes stand for."""
        size = codes.shape[1] // self.scale.shape[1]
        parts = [
            self.columns(group).values(part)
            for group, part in enumerate(torch.split(codes, size, dim=1))
        ]
        return torch.cat(parts, dim=1)

    def parts(self, codes: torch.Tensor, notes: tuple[str, ...] = ()) -> Parts:
        """Return codes with their scales, shaped as methods give them."""
        codes = codes.to(torch.int8).contiguous()
        if self.unit is not None:
            second = {SECOND_SCALE: (self.scale / self.unit).round()}
            return Parts(codes, self.unit, torch.zeros_like(self.unit), second, notes)
        scale, offset = self.scale, self.offset
        if self.scheme.granularity in (Granularity.PER_TENSOR, Granularity.PER_BLOCK):
            scale, offset = scale.reshape(-1), offset.reshape(-1)
        return Parts(codes, scale.contiguous(), offset.contiguous(), notes=notes)


def fit_weight(
    weight: torch.Tensor,
    scheme: TensorScheme,
    fit: Fit = keep_minmax,
    moments: torch.Tensor | None = None,
) -> WeightGrid:
    """Return the grid of a weight.

    Parameters
    ----------
    weight : torch.Tensor
        float32, shape (out, in).
    moments : torch.Tensor, optional
        Shape (in,): mean square of the input channels.

    Raises
    ------
    FormatError
        The size of a group or block does not divide ``in``.
    """
    rows, columns = weight.shape
    if scheme.group_size:
        split_groups(weight, scheme.group_size)  # which raises
    whole = scheme.granularity is Granularity.PER_TENSOR
    shape = (1, 1, -1) if whole else (rows, -1, scheme.group_size or columns)
    unit = None
    if scheme.scales is ScaleKind.TWO_STAGE:
        unit = two_stage_scales(weight, scheme.group_size)[0]
    importance = None
    if moments is not None:
        importance = moments.to(weight).expand_as(weight).reshape(shape)
    scale, offset = fit_sets(weight.reshape(shape), scheme, fit, importance, unit)
    return WeightGrid(scheme, scale, offset, unit)


def fit_sets(
    weight: torch.Tensor,
    scheme: TensorScheme,
    fit: Fit,
    importance: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and offset of sets, shape (rows, sets), fitted for a few rows at a time.

    Parameters
    ----------
    weight : torch.Tensor
        float32, shape (rows, sets, k).
    importance : torch.Tensor, optional
        Shape (rows, sets, k).
    unit : torch.Tensor, optional
        Shape (rows, 1), of two-stage scales.
    """
    count, size = weight.shape[1:]
    step = max(1, _CHUNK // (count * size))
    found = []
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        sets = weight[part].reshape(-1, size)
        own = None if unit is None else unit[part].expand(-1, count).reshape(-1, 1)
        spread = None if importance is None else importance[part].reshape(-1, size)
        found.append(fit(sets, minmax_grid(sets, scheme, own), spread))
    scale = torch.cat([grid.scale for grid in found])
    offset = torch.cat([grid.offset for grid in found])
    return scale.reshape(-1, count), offset.reshape(-1, count)
