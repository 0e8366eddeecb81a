"""GPTQ: round column by column, and let the next columns make up for the error of each.

Frantar et al., arXiv:2210.17323.  Beyond the paper: ranges are searched before rounding, rows that
plain rounding serves better keep it, and sweeps of coordinate descent on the same objective (as in
QuantEase, arXiv:2309.01885) follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from slim_core.errors import InvalidValueError
from slim_core.scheme import QuantScheme, TensorScheme
from slim_core.validate import check_float, check_int, check_type
from slim_ptq.methods.base import BatchInputs, LayerInputs, Needs, Parts
from slim_ptq.methods.choices import (
    check_enum,
    finite_weight,
    required_hessian,
    unsupported_grid,
)
from slim_ptq.methods.columns import ColumnRounding
from slim_ptq.methods.descent import descend
from slim_ptq.methods.feedback import Feedback, factorize
from slim_ptq.methods.grid import Fit, fit_weight, keep_minmax
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
    and offset belong together.  With ``keep_nearest`` the result never has a larger error than
    rounding to nearest on the grid that was chosen first, measured on the objective
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
        ``refit``) and then over all codes; they end early when no code changes, of none of the
        weights that are quantized together.
    refit : bool
    keep_nearest : bool
        Round to nearest the rows that it serves better, before the sweeps.  The paper does not;
        to find them takes at most as many products as to feed errors back.

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
    keep_nearest: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "damp", check_float("damp", self.damp, low=0, high=1))
        object.__setattr__(self, "order", check_enum("order", self.order, Order))
        object.__setattr__(self, "range", check_enum("range", self.range, Range))
        check_type("static_groups", self.static_groups, bool)
        check_int("sweeps", self.sweeps, low=0, high=100)
        check_type("refit", self.refit, bool)
        check_type("keep_nearest", self.keep_nearest, bool)
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
        return self.quantize_batch([name], [weight], scheme, BatchInputs((inputs,), inputs.memo))[0]

    def quantize_batch(
        self,
        names: Sequence[str],
        weights: Sequence[torch.Tensor],
        scheme: TensorScheme,
        inputs: BatchInputs,
    ) -> list[Parts]:
        """Quantize weights (:meth:`slim_ptq.methods.base.BatchMethod.quantize_batch`)."""
        values = [finite_weight(*one) for one in zip(names, weights, strict=True)]
        fit = _FITS[self.range]
        in_turn = bool(scheme.group_size) and not self.static_groups
        searched = self.range is Range.SEARCH
        grids = [
            fit_weight(
                value,
                scheme,
                keep_minmax if in_turn else fit,  # which is replaced
                own.moments if searched else None,
            )
            for value, own in zip(values, inputs.layers, strict=True)
        ]
        feedback = self._feedback(names, scheme, inputs)
        rounding = ColumnRounding(values, grids, feedback)
        rounding.forward(fit if in_turn else None)
        if self.keep_nearest:
            rounding.keep_nearest()
        for _ in range(self.sweeps):
            if not descend(rounding, refit=self.refit):
                break
        found = zip(rounding.grids(), rounding.natural_codes(), feedback.notes, strict=True)
        return [grid.parts(codes, notes) for grid, codes, notes in found]

    def _feedback(
        self, names: Sequence[str], scheme: TensorScheme, inputs: BatchInputs
    ) -> Feedback:
        """Return the factorized Hessians, which layers with the same inputs share."""
        size = scheme.group_size if self.order is Order.GROUP else 0
        key = (self.name, self.damp, self.order, size)
        if key not in inputs.memo:
            hessians = [
                required_hessian(self.name, *one) for one in zip(names, inputs.layers, strict=True)
            ]
            orders = [_channel_order(one.diagonal(), self.order, size) for one in hessians]
            inputs.memo[key] = factorize(names, hessians, self.damp, orders)
        found: Feedback = inputs.memo[key]
        return found


def _channel_order(moments: torch.Tensor, order: Order, size: int) -> torch.Tensor | None:
    if order is Order.NATURAL:
        return None
    if not size:
        return moments.argsort(descending=True, stable=True)
    groups = moments.reshape(-1, size)
    first = groups.amax(dim=1).argsort(descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    return (first[:, None] * size + within[first]).reshape(-1)
