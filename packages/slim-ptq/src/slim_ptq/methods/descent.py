"""Coordinate descent on the objective of GPTQ: scales and offsets, then codes.

Each code is set to the best one given all others, as in QuantEase (arXiv:2309.01885), group by
group; before that, scale and offset of the group to the best ones given its codes.
"""

from __future__ import annotations

import torch

from slim_core.dtypes import IntType
from slim_core.numerics import EPS
from slim_ptq.methods.columns import INNER, ColumnRounding, half_way
from slim_ptq.methods.grid import Grid


def descend(state: ColumnRounding, *, refit: bool) -> bool:
    """Go once over all groups of a weight; returns whether any code changed.

    Parameters
    ----------
    state : ColumnRounding
        With all codes chosen; its codes, errors, scales and offsets are changed.
    refit : bool
        Move scales and offsets too.
    """
    members = state.groups.argsort(stable=True).reshape(len(state.scale), -1)
    hessian = state.feedback.hessian
    changed = False
    for group, places in enumerate(members):
        # A slice leaves a weight of one group where it lies.
        part = slice(None) if len(members) == 1 else places
        rows = hessian[part]
        one = _Group(state, group, part, rows[:, part], rows @ state.error)
        if refit:
            one.move_scale()
            one.move_offset()
        changed |= one.sweep()
    return changed


class _Group:
    """The columns of one group: their Hessian, and the slope of the objective there."""

    def __init__(
        self,
        state: ColumnRounding,
        group: int,
        part: slice | torch.Tensor,
        hessian: torch.Tensor,
        slope: torch.Tensor,
    ) -> None:
        self._state = state
        self._group = group
        self._part = part
        self._hessian = hessian
        self._slope = slope
        self._levels = state.levels(part, group)
        self._softness: list[float] = (1 / hessian.diagonal()).tolist()

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
        self._slope.addcmul_(product, step, value=-1)
        self._state.scale[self._group] += step

    def move_offset(self) -> None:
        """Set the offsets to the best whole ones given all codes."""
        grid = self._state.group_grid(self._group)
        dtype = grid.scheme.dtype
        if grid.scheme.symmetric or not isinstance(dtype, IntType):
            return
        squares = grid.scale.square().expand_as(self._slope[0])
        stiffness = _shared(self._hessian.sum() * squares, grid)
        pull = _shared(grid.scale * self._slope.sum(dim=0), grid)
        offset = grid.offset - pull / stiffness.clamp(min=EPS**2)
        step = offset.round().clamp(dtype.min, dtype.max) - grid.offset
        better = stiffness * step.square() < -2 * pull * step
        step = torch.where(better, step, torch.zeros_like(step))
        self._levels -= step
        self._slope.addcmul_(self._hessian.sum(dim=1, keepdim=True), step * grid.scale)
        self._state.offset[self._group] += step

    def sweep(self) -> bool:
        """Set each code to the best one given all others; returns whether any code changed.

        All is counted in steps, which the columns of a group share.
        """
        state, part = self._state, self._part
        scale, offset = state.scale[self._group], state.offset[self._group]
        slope = self._slope.div_(scale)
        moves = torch.empty_like(slope)
        self._move(0, len(slope), moves, offset)
        self._levels -= moves
        changed = bool(moves.any())
        if changed:
            state.codes[part] = state.codes_of(self._levels, offset)
        state.error[part] = torch.addcmul(state.target[part], self._levels, scale, value=-1)
        return changed

    def _move(self, start: int, stop: int, moves: torch.Tensor, offset: torch.Tensor) -> None:
        """Write how far the codes of columns move down, given the moves of those before them.

        The second half is told of the first one by a product, as in :mod:`columns`.
        """
        if stop - start > INNER:
            middle = half_way(start, stop, INNER)
            self._move(start, middle, moves, offset)
            told = self._hessian[middle:stop, start:middle]
            self._slope[middle:stop].addmm_(told, moves[start:middle])
            self._move(middle, stop, moves, offset)
            return
        part = slice(start, stop)
        levels, slopes, own = self._levels[part].unbind(), self._slope[part].unbind(), moves[part]
        within = self._hessian[part, part]
        place = torch.empty_like(own[0])
        for row, move in enumerate(own.unbind()):
            if row:
                slopes[row].addmv_(own[:row].T, within[row, :row])
            torch.add(levels[row], slopes[row], alpha=self._softness[start + row], out=place)
            self._state.round_levels(place, offset)
            torch.sub(levels[row], place, out=move)


def _dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the sum of products down each column."""
    return (left * right).sum(dim=0)


def _shared(sums: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return sums of all rows if they share one scale."""
    return sums.sum(dim=0, keepdim=True) if len(grid.scale) == 1 else sums
