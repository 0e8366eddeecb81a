"""GPTQ: round column by column, and let the next columns make up for the error of each.

Frantar et al., arXiv:2210.17323.  Beyond the paper: ranges are searched before rounding, rows that
plain rounding serves better keep it, and sweeps of coordinate descent on the same objective (as in
QuantEase, arXiv:2309.01885) follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from slim_core.dtypes import IntType, TableType
from slim_core.errors import InvalidValueError
from slim_core.numerics import EPS
from slim_core.scheme import QuantScheme, TensorScheme
from slim_core.validate import check_float, check_int, check_type
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import (
    check_enum,
    finite_weight,
    required_hessian,
    unsupported_grid,
)
from slim_ptq.methods.feedback import Feedback, factorize
from slim_ptq.methods.grid import Fit, Grid, WeightGrid, fit_weight, keep_minmax, minmax_grid
from slim_ptq.methods.search import shrink_range


class Order(str, Enum):
    """In which order input channels are quantized."""

    NATURAL = "natural"
    ACTIVATION = "activation"  # largest input first, known as act-order or desc_act
    GROUP = "group"  # groups by their largest input, channels in a group by theirs


class Range(str, Enum):
    """How the grid of a row or group is chosen."""

    MINMAX = "minmax"
    SEARCH = "search"  # the range that loses least, weighted by the inputs


_FITS: dict[Range, Fit] = {Range.MINMAX: keep_minmax, Range.SEARCH: shrink_range}


@dataclass(frozen=True)
class GPTQ:
    """Minimize the output error of a layer on the calibration data.

    The grid is frozen while codes are chosen, and moved only as long as codes are: codes, scale
    and offset belong together.  The result never has a larger error than rounding to nearest on
    the grid that was chosen first, measured on the objective
    ``tr((W - W_q) (H + damp) (W - W_q)ᵀ)``.

    Parameters
    ----------
    damp : float
        Share of the mean of the diagonal of ``H`` that is added to it, in [0, 1].
    order : Order
    range : Range
    static_groups : bool
        Choose the scales of all groups before any rounding; False chooses that of a group when
        its turn comes, from weights that make up for the errors so far.  The order of activations
        needs static groups, since groups are stored as they lie.
    sweeps : int
        Passes of coordinate descent afterwards, in [0, 100], each over all scales and offsets (if
        ``refit``) and then over all codes; they end early when no code changes.
    refit : bool
    block : int
        Columns between two updates of the whole weight: decides speed, not results.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[Needs] = Needs.HESSIAN

    damp: float = 0.01
    order: Order = Order.ACTIVATION
    range: Range = Range.SEARCH
    static_groups: bool = True
    sweeps: int = 2
    refit: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "damp", check_float("damp", self.damp, low=0, high=1))
        object.__setattr__(self, "order", check_enum("order", self.order, Order))
        object.__setattr__(self, "range", check_enum("range", self.range, Range))
        check_type("static_groups", self.static_groups, bool)
        check_int("sweeps", self.sweeps, low=0, high=100)
        check_type("refit", self.refit, bool)
        check_int("block", self.block, low=1)
        if self.order is Order.ACTIVATION and not self.static_groups:
            raise InvalidValueError(
                "static_groups must be True with order 'activation'",
                hint="order 'group' keeps the channels of a group together",
            )

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why there is no grid to round to, None if there is one."""
        return unsupported_grid(scheme)

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`)."""
        required_hessian(self.name, name, inputs)
        assert inputs is not None  # narrowing
        values = finite_weight(name, weight)
        fit = _FITS[self.range]
        grid = fit_weight(values, scheme, fit, inputs.moments)
        feedback = self._feedback(name, scheme, inputs)
        rounding = _Rounding(values, grid, feedback, self.block)
        if scheme.group_size and not self.static_groups:
            rounding.choose_grids(fit)
        else:
            rounding.forward()
        rounding.keep_nearest()
        for _ in range(self.sweeps):
            if self.refit:
                rounding.move_grids()
            if not rounding.sweep():
                break
        return rounding.grid.parts(rounding.codes(), feedback.notes)

    def _feedback(self, name: str, scheme: TensorScheme, inputs: LayerInputs) -> Feedback:
        """Return the factorized Hessian, which layers with the same inputs share."""
        assert inputs.hessian is not None
        size = scheme.group_size if self.order is Order.GROUP else 0
        key = (self.name, self.damp, self.order, size)
        if key not in inputs.memo:
            order = _channel_order(inputs.hessian.diagonal(), self.order, size)
            inputs.memo[key] = factorize(name, inputs.hessian, self.damp, order)
        found: Feedback = inputs.memo[key]
        return found


class _Rounding:
    """The codes of one weight while they are being chosen.

    Matrices are kept transposed, (in, out) in the order of the feedback, so that a column of the
    weight is contiguous.
    """

    def __init__(
        self, weight: torch.Tensor, grid: WeightGrid, feedback: Feedback, block: int
    ) -> None:
        self.grid = grid
        self._weight = weight
        self._feedback = feedback
        self._block = block
        self._target = weight.T[feedback.order].contiguous()
        self._error = torch.zeros_like(self._target)
        self._codes = torch.zeros_like(self._target, dtype=torch.int8)
        self._loss = weight.new_zeros(weight.shape[0])
        self._groups = feedback.order // (weight.shape[1] // grid.scale.shape[1])

    def codes(self) -> torch.Tensor:
        """Return the codes, int8, shape (out, in)."""
        codes = torch.empty_like(self._codes)
        codes[self._feedback.order] = self._codes
        return codes.T

    def forward(self) -> None:
        """Choose all codes on the grid as it is."""
        for start in range(0, len(self._target), self._block):
            self._columns(start, min(start + self._block, len(self._target)))

    def choose_grids(self, fit: Fit) -> None:
        """Choose the grid of each group when its turn comes, and its codes."""
        size = len(self._target) // self.grid.scale.shape[1]
        upper = self._feedback.upper
        for start in range(0, len(self._target), size):
            part = slice(start, start + size)
            made_up = upper[:start, part].T @ self._error[:start]
            # What is left of the optimum of the columns to come, given the errors so far.
            rest = torch.linalg.solve_triangular(upper[part, part].T, made_up, upper=False)
            sets = (self._target[part] + rest).T.contiguous()
            moments = self._feedback.hessian.diagonal()[part].expand_as(sets)
            grid = fit(sets, minmax_grid(sets, self.grid.scheme, self.grid.unit), moments)
            group = int(self._groups[start])
            self.grid.scale[:, group] = grid.scale[:, 0]
            self.grid.offset[:, group] = grid.offset[:, 0]
            self._columns(start, start + size)

    def keep_nearest(self) -> None:
        """Take back the rows whose error plain rounding makes smaller."""
        codes = self.grid.codes(self._weight)
        error = (self._weight - self.grid.values(codes)).T[self._feedback.order].contiguous()
        loss = torch.zeros_like(self._loss)
        upper, weights = self._feedback.upper, self._feedback.diagonal
        for start in range(0, len(error), self._block):
            part = slice(start, start + self._block)
            stop = min(start + self._block, len(error))
            loss += weights[part] @ (upper[:stop, part].T @ error[:stop]).square_()
        better = loss < self._loss
        self._codes = torch.where(better, codes.T[self._feedback.order], self._codes)
        self._error = torch.where(better, error, self._error)

    def move_grids(self) -> None:
        """Set scale and offset of each group to the best ones given all codes."""
        groups = self.grid.scale.shape[1]
        natural = torch.empty_like(self._feedback.order)
        natural[self._feedback.order] = torch.arange(len(natural), device=natural.device)
        scheme = self.grid.scheme
        fixed = scheme.symmetric or isinstance(scheme.dtype, TableType)
        for group, places in enumerate(natural.reshape(groups, -1)):
            rows = self._feedback.hessian[places]
            own = rows[:, places]
            self._move_scale(group, places, rows @ self._error, own)
            if not fixed:
                self._move_offset(group, places, rows @ self._error, own)

    def _move_scale(
        self, group: int, places: torch.Tensor, slope: torch.Tensor, own: torch.Tensor
    ) -> None:
        grid = self._group_grid(group)
        levels = grid.values(self._codes[places]) / grid.scale
        pull, stiffness = _sums(levels * slope, levels * (own @ levels), self.grid)
        other = grid.moved(grid.scale + pull / stiffness.clamp(min=EPS**2), grid.offset)
        step = other.scale - grid.scale
        better = stiffness * step.square() < 2 * pull * step
        step = torch.where(better, step, torch.zeros_like(step))
        self.grid.scale[:, group] += step
        self._error[places] -= step * levels

    def _move_offset(
        self, group: int, places: torch.Tensor, slope: torch.Tensor, own: torch.Tensor
    ) -> None:
        grid = self._group_grid(group)
        dtype = grid.scheme.dtype
        assert isinstance(dtype, IntType)  # narrowing: tables have no offset
        pull, stiffness = _sums(
            grid.scale * slope, (grid.scale**2 * own.sum()).expand_as(slope[:1]), self.grid
        )
        offset = grid.offset - pull / stiffness.clamp(min=EPS**2)
        step = offset.round().clamp(dtype.min, dtype.max) - grid.offset
        better = stiffness * step.square() < -2 * pull * step
        step = torch.where(better, step, torch.zeros_like(step))
        self.grid.offset[:, group] += step
        self._error[places] += step * grid.scale

    def sweep(self) -> bool:
        """Set each code to the best one given all others; returns whether any code changed."""
        hessian = self._feedback.hessian
        changed = False
        for start in range(0, len(self._target), self._block):
            stop = min(start + self._block, len(self._target))
            slope = hessian[start:stop] @ self._error
            moves = torch.zeros_like(slope)
            for row, column in enumerate(range(start, stop)):
                pull = slope[row]
                if row:
                    pull = pull + hessian[column, start:column] @ moves[:row]
                value = self._target[column] - self._error[column] + pull / hessian[column, column]
                changed |= self._choose(column, value, moves[row])
        return changed

    def _columns(self, start: int, stop: int) -> None:
        """Choose the codes of a block of columns."""
        upper, weights = self._feedback.upper, self._feedback.diagonal
        made_up = self._target[start:stop] + upper[:start, start:stop].T @ self._error[:start]
        for row, column in enumerate(range(start, stop)):
            value = made_up[row]
            if row:
                value = value + upper[start:column, column] @ self._error[start:column]
            grid = self._column_grid(column)
            codes = grid.codes(value)
            chosen = grid.values(codes)
            self._codes[column] = codes
            self._error[column] = self._target[column] - chosen
            self._loss += weights[column] * (value - chosen).square_()

    def _choose(self, column: int, value: torch.Tensor, move: torch.Tensor) -> bool:
        """Round a column to its grid; writes the change of its error into ``move``."""
        grid = self._column_grid(column)
        codes = grid.codes(value)
        error = self._target[column] - grid.values(codes)
        torch.sub(error, self._error[column], out=move)
        self._codes[column] = codes
        self._error[column] = error
        return bool(move.any())

    def _column_grid(self, column: int) -> Grid:
        return self._group_grid(int(self._groups[column]))

    def _group_grid(self, group: int) -> Grid:
        unit = None if self.grid.unit is None else self.grid.unit[:, 0]
        return Grid(self.grid.scheme, self.grid.scale[:, group], self.grid.offset[:, group], unit)


def _sums(
    pull: torch.Tensor, stiffness: torch.Tensor, grid: WeightGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums over the channels of a group, and over all rows if they share one scale."""
    sums = pull.sum(dim=0), stiffness.sum(dim=0)
    if len(grid.scale) == 1:
        return sums[0].sum(dim=0, keepdim=True), sums[1].sum(dim=0, keepdim=True)
    return sums


def _channel_order(moments: torch.Tensor, order: Order, size: int) -> torch.Tensor | None:
    if order is Order.NATURAL:
        return None
    if not size:
        return moments.argsort(descending=True, stable=True)
    groups = moments.reshape(-1, size)
    first = groups.amax(dim=1).argsort(descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    return (first[:, None] * size + within[first]).reshape(-1)
