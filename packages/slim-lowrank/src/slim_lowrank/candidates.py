"""The decomposed forms one layer can take, with their costs and predicted losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np

from slim_core.errors import CalibrationError
from slim_core.logging import get_logger
from slim_lowrank import conv_forms
from slim_lowrank.allocate import Option
from slim_lowrank.factorize import Array
from slim_lowrank.layers import Layer
from slim_lowrank.rank_requests import Request
from slim_lowrank.ranks import clamp_conv_ranks, conv_rank, form_params, round_to
from slim_lowrank.solve import Statistics, flat_weight, matrix_problem
from slim_lowrank.table import Form, LayerRanks, rank_limits
from slim_lowrank.tucker import unfold
from slim_lowrank.vbmf import vbmf_rank
from slim_lowrank.whitening import MatrixProblem

logger = get_logger("lowrank")

COARSE_STEPS = 12
"""How many ranks of a form are tried when each needs a solve of its own."""


class Candidates:
    """All forms and ranks of one layer.

    Parameters
    ----------
    layer : Layer
        Not skipped.
    statistics : Statistics or None
        None predicts the error of the weight itself.
    divisor : int
        Grid of the ranks.
    storage : str
        ``factors`` or ``pivot``, for matrices.
    conv : str
        ``auto`` or one form, for kernels.
    bias : bool
        Whether the decomposed layer has a bias.
    """

    def __init__(
        self,
        layer: Layer,
        statistics: Statistics | None,
        *,
        divisor: int,
        storage: Form,
        conv: str,
        bias: bool,
    ) -> None:
        self.layer, self.statistics, self.divisor, self.bias = layer, statistics, divisor, bias
        self.forms = _forms(layer, statistics, storage, conv)
        self._losses: dict[tuple[str, tuple[int, ...]], float] = {}

    @cached_property
    def problem(self) -> MatrixProblem:
        """The layer, flattened, in its metric."""
        if self.statistics is None:
            return MatrixProblem(flat_weight(self.layer), name=f"layer {self.layer.name!r}")
        return matrix_problem(self.layer, self.statistics, centred=self.bias)

    @property
    def total(self) -> float:
        """Loss of leaving the layer out."""
        return float(self.problem.losses[0])

    def loss(self, ranks: LayerRanks) -> float:
        """Return the predicted loss."""
        if ranks.form in ("factors", "pivot", "out"):
            return float(self.problem.losses[ranks.ranks[0]])
        key = ranks.form, ranks.ranks
        if key not in self._losses:
            self._losses[key] = self._chain_loss(ranks)
        return self._losses[key]

    def at(self, request: Request) -> LayerRanks | None:
        """Return the form and ranks for a share, a rank, a pair or ``"vbmf"``; None if no gain."""
        fitting = [found for form in self.forms if (found := self._at(form, request)) is not None]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        if isinstance(request, float):
            limit = max(request * fitting[0].dense_params, min(each.params for each in fitting))
            fitting = [each for each in fitting if each.params <= limit]
        return min(fitting, key=self.loss)

    def options(self, cost: Callable[[LayerRanks | None], float], scale: float) -> list[Option]:
        """Return every option cheaper than dense, and dense; losses times ``scale``."""
        dense = Option(cost(None), 0.0, None)
        found = [dense]
        for form in self.forms:
            for ranks in self._grid(form):
                price = cost(ranks)
                if price < dense.cost:
                    found.append(Option(price, scale * self.loss(ranks), ranks))
        return found

    def flops(self, ranks: LayerRanks | None) -> float:
        """Return the multiply-adds of a batch: weights times the positions they act on."""
        before, halfway, after = (1, 1, 1) if self.statistics is None else self.statistics.positions
        shape, kind = self.layer.shape, self.layer.kind
        out, inp, taps = shape[0], shape[1], math.prod(shape[2:])
        full = before if kind.startswith("conv_transpose") else after
        if kind == "embedding":
            return 0.0 if ranks is None else float(ranks.ranks[0] * shape[1] * after)
        if ranks is None:
            return float(math.prod(shape) * full)
        rank = ranks.ranks[0]
        if ranks.form == "in":
            return float(inp * rank * before + rank * out * taps * after)
        if ranks.form == "spatial":
            return float(inp * rank * shape[2] * halfway + rank * out * shape[3] * after)
        if ranks.form == "tucker2":
            inner = ranks.ranks[1]
            return float(inp * inner * before + (inner * taps + out) * rank * after)
        saved = rank * rank if ranks.form == "pivot" else 0
        return float(rank * inp * taps * full + (rank * out - saved) * after)

    def _chain_loss(self, ranks: LayerRanks) -> float:
        kernel: Array = self.problem.weight.reshape(self.layer.shape)
        second, gamma = self.problem.second, self.problem.gamma
        kernels = conv_forms.fit(ranks.form, kernel, ranks.ranks, second=second, gamma=gamma)
        difference = kernel - conv_forms.compose(ranks.form, kernels)
        flat = difference.reshape(kernel.shape[0], -1)
        moved = flat if second is None else flat @ second
        return float(np.sum((moved if gamma is None else gamma @ moved) * flat))

    def _make(self, form: Form, wanted: Iterable[float]) -> LayerRanks | None:
        """Round and cut ranks, and refuse those that save nothing."""
        limits = rank_limits(form, self.layer.shape)
        ranks = tuple(
            min(round_to(max(rank, 1), self.divisor), limit)
            for rank, limit in zip(wanted, limits, strict=True)
        )
        layer = self.layer
        made = LayerRanks(layer.name, layer.kind, layer.shape, form, ranks, self.bias)
        if made.params >= made.dense_params:
            return None
        self._check_rows(ranks[0])
        return made

    def _at(self, form: Form, request: Request) -> LayerRanks | None:
        shape, two = self.layer.shape, form == "tucker2"
        if isinstance(request, tuple):
            return self._make(form, request if two else (max(request),))
        if isinstance(request, str):
            return self._make(form, self._vbmf(form))
        if isinstance(request, int):
            return self._make(form, (request,) * (2 if two else 1))
        if two:
            return self._make(form, (conv_rank(request, shape),) * 2)
        dense: int = math.prod(shape)
        per_rank = form_params(form, (1,), shape)
        if form == "pivot":
            both = shape[0] + shape[1]
            return self._make(form, ((both - math.sqrt(both**2 - 4 * request * dense)) // 2,))
        return self._make(form, (int(request * dense / per_rank),))

    def _vbmf(self, form: Form) -> tuple[int, ...]:
        kernel = self.problem.weight
        if form in ("factors", "pivot", "out"):
            return (vbmf_rank(kernel),)
        tensor = kernel.reshape(self.layer.shape)
        sides = vbmf_rank(unfold(tensor, 0)), vbmf_rank(unfold(tensor, 1))
        return clamp_conv_ranks(sides, self.layer.shape) if form == "tucker2" else (max(sides),)

    def _grid(self, form: Form) -> list[LayerRanks]:
        """All ranks of the grid where one decomposition serves them all, else a coarse choice."""
        shape, rows = self.layer.shape, self._rows()
        limits = rank_limits(form, shape)
        if form in ("factors", "pivot", "out"):
            wanted = [(rank,) for rank in _multiples(self.divisor, min(limits[0], rows - 1))]
        else:
            shares = np.arange(1, COARSE_STEPS + 1) / COARSE_STEPS
            wanted = [tuple(max(1.0, share * limit) for limit in limits) for share in shares]
        made = {found.ranks: found for each in wanted if (found := self._make(form, each))}
        return list(made.values())

    def _rows(self) -> int:
        """Positions seen; a table or a weight on its own has no such limit."""
        if self.statistics is None or self.layer.kind == "embedding":
            return max(self.layer.shape) * math.prod(self.layer.shape) + 2
        return self.statistics.rows

    def _check_rows(self, rank: int) -> None:
        if self._rows() <= rank:
            raise CalibrationError(
                f"layer {self.layer.name!r} saw {self._rows()} positions, too few for rank {rank}",
                hint=f"calibrate with more than {rank} positions, better 4 per channel",
            )


def _multiples(divisor: int, limit: int) -> list[int]:
    """Return the multiples up to a limit, and the limit itself where none fits."""
    return list(range(divisor, limit + 1, divisor)) or [limit]


def _forms(
    layer: Layer, statistics: Statistics | None, storage: Form, conv: str
) -> tuple[Form, ...]:
    if layer.is_matrix:
        return (storage if layer.kind == "linear" and not layer.tied else "factors",)
    kernel = layer.shape[2:]
    watched = statistics is not None and statistics.input_second is None
    if math.prod(kernel) == 1 or watched or layer.kind.startswith("conv_transpose"):
        return ("out",)
    possible: list[Form] = ["out", "in", "tucker2"]
    if len(kernel) == 2 and min(kernel) > 1:
        possible.append("spatial")
    if conv == "auto":
        return tuple(possible)
    return tuple(form for form in possible if form == conv) or ("out",)
