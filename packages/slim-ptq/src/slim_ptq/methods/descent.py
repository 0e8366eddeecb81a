"""Coordinate descent on the objective of GPTQ: scales and offsets, then codes.

Each code is set to the best one given all others, as in QuantEase (arXiv:2309.01885), group by
group; before that, scale and offset of the group to the best ones given its codes.
"""

from __future__ import annotations

import torch

from slim_core.dtypes import IntType
from slim_core.numerics import EPS
from slim_ptq.methods.columns import INNER, ColumnRounding, half_way, put, take
from slim_ptq.methods.grid import Grid


def descend(state: ColumnRounding, *, refit: bool) -> bool:
    """Go once over all groups of the weights; returns whether any code changed.

    Parameters
    ----------
    state : ColumnRounding
        With all codes chosen; its codes, errors, scales and offsets are changed.
    refit : bool
        Move scales and offsets too.
    """
    batch, count = state.scale.shape[:2]
    members = state.groups.argsort(dim=1, stable=True).reshape(batch, count, -1)
    changed = False
    for group in range(count):
        # A weight of one group is left where it lies.
        one = _Group(state, group, None if count == 1 else members[:, group])
        if refit:
            one.move_scale()
            one.move_offset()
        changed |= one.sweep()
    return changed


class _Group:
    """The columns of one group: their Hessian, and the slope of the objective there."""

    def __init__(self, state: ColumnRounding, group: int, places: torch.Tensor | None) -> None:
        self._state = state
        self._group = group
        self._places = places
        hessian = state.feedback.hessian
        rows = hessian if places is None else take(hessian, places)
        self._slope = rows @ state.error
        self._hessian = rows
        if places is not None:
            self._hessian = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))
        self._levels = state.levels(places, group)
        self._softness = 1 / self._hessian.diagonal(dim1=1, dim2=2)[..., None]

    def move_scale(self) -> None:
        """Set the scales to the best ones given all codes, where these can be stored."""
        grid = self._state.group_grid(self._group)
        levels = self._levels
        product = self._hessian @ levels
        pull = _shared(_dots(levels, self._slope), grid)
        stiffness = _shared(_dots(levels, product), grid)
        other = grid.moved(grid.scale + pull / stiffness.clamp(min=EPS**2), grid.offset)
        step = other.scale - grid.scale
        better = stiffness * step.square() < 2 * pull * step
        step = torch.where(better, step, torch.zeros_like(step))
        self._slope.addcmul_(product, step[:, None], value=-1)
        self._state.scale[:, self._group] += step

    def move_offset(self) -> None:
        """Set the offsets to the best whole ones given all codes."""
        grid = self._state.group_grid(self._group)
        dtype = grid.scheme.dtype
        if grid.scheme.symmetric or not isinstance(dtype, IntType):
            return
        squares = grid.scale.square().expand_as(self._slope[:, 0])
        stiffness = _shared(self._hessian.sum(dim=(1, 2))[:, None] * squares, grid)
        pull = _shared(grid.scale * self._slope.sum(dim=1), grid)
        offset = grid.offset - pull / stiffness.clamp(min=EPS**2)
        step = offset.round().clamp(dtype.min, dtype.max) - grid.offset
        better = stiffness * step.square() < -2 * pull * step
        step = torch.where(better, step, torch.zeros_like(step))
        self._levels -= step[:, None]
        told = self._hessian.sum(dim=2, keepdim=True)
        self._slope.addcmul_(told, (step * grid.scale)[:, None])
        self._state.offset[:, self._group] += step

    def sweep(self) -> bool:
        """Set each code to the best one given all others; returns whether any code changed.

        All is counted in steps, which the columns of a group share.
        """
        state, places = self._state, self._places
        scale, offset = state.scale[:, self._group, None], state.offset[:, self._group, None]
        slope = self._slope.div_(scale)
        moves = torch.empty_like(slope)
        self._move(0, slope.shape[1], moves, offset[:, 0])
        self._levels -= moves
        changed = bool(moves.any())
        target = state.target if places is None else take(state.target, places)
        error = torch.addcmul(target, self._levels, scale, value=-1)
        if places is None:
            state.error.copy_(error)
            state.codes.copy_(state.codes_of(self._levels, offset))
        else:
            put(state.error, places, error)
            put(state.codes, places, state.codes_of(self._levels, offset))
        return changed

    def _move(self, start: int, stop: int, moves: torch.Tensor, offset: torch.Tensor) -> None:
        """Write how far the codes of columns move down, given the moves of those before them.

        The second half is told of the first one by a product, as in :mod:`columns`.
        """
        if stop - start > INNER:
            middle = half_way(start, stop, INNER)
            self._move(start, middle, moves, offset)
            told = self._hessian[:, middle:stop, start:middle]
            self._slope[:, middle:stop].baddbmm_(told, moves[:, start:middle])
            self._move(middle, stop, moves, offset)
            return
        part = slice(start, stop)
        slopes, told = self._slope[:, part], self._hessian[:, part, part, None]
        columns = (self._levels[:, part], slopes, told, self._softness[:, part], moves[:, part])
        rows = zip(*(item.unbind(1) for item in columns), strict=True)
        for column, (level, slope, shares, softness, move) in enumerate(rows, start=1):
            place = torch.addcmul(level, slope, softness)
            self._state.round_levels(place, offset)
            torch.sub(level, place, out=move)
            if column < slopes.shape[1]:
                slopes[:, column:].addcmul_(shares[:, column:], move[:, None])


def _dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the sum of products down each column."""
    return (left * right).sum(dim=1)


def _shared(sums: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return sums of all rows if they share one scale."""
    return sums.sum(dim=1, keepdim=True) if grid.scale.shape[1] == 1 else sums
