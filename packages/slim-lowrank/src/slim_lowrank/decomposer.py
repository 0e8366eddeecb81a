"""Data-aware decomposition of any torch model: statistics, rank choice, and a plan to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError, PlanError
from slim_core.files import PathLike
from slim_core.logging import get_logger
from slim_core.matching import match, match_all
from slim_core.progress import track
from slim_core.validate import check_choice, check_float, check_int, check_type
from slim_lowrank.allocate import Option, allocate
from slim_lowrank.budget import Budget
from slim_lowrank.calibrate import Loss, collect, read_batches
from slim_lowrank.candidates import Candidates
from slim_lowrank.layers import ALL_KINDS, Kind, Layer, find_layers
from slim_lowrank.plan import Plan
from slim_lowrank.rank_requests import parse_request
from slim_lowrank.ranks import check_ratio
from slim_lowrank.solve import Statistics, flat_weight
from slim_lowrank.surgery import check_table, drop_broken_ties
from slim_lowrank.table import CONV_FORMS, MATRIX_FORMS, Form, LayerRanks, load_table

if TYPE_CHECKING:
    from typing_extensions import Self

logger = get_logger("lowrank")

Method = Literal["plain", "output", "loss"]


class Decomposer:
    """Choose ranks for the layers of a model from their weights and their data.

    ::

        decomposer = Decomposer(model, exclude=["lm_head"]).calibrate(batches, loss=output_loss)
        small, report = decomposer.budget(Budget(params=0.6)).apply()

    Parameters
    ----------
    model : Module
        Never changed by this class.
    include : sequence of str, optional
        Globs of the layers to take; all by default.
    exclude : sequence of str
        Globs of the layers to leave dense.
    kinds : sequence of str, optional
        Kinds of layers to take, of :data:`slim_lowrank.layers.ALL_KINDS`.
    divisor : int
        Ranks are multiples of it (cut to the channel counts).
    storage : str
        ``factors``, or ``pivot``, which stores rank r in ``r^2`` fewer weights.
    conv : str
        ``auto`` compares ``out``, ``in``, ``spatial`` and ``tucker2`` by predicted error for each
        kernel; or one of these.
    bias : str
        ``keep`` corrects the mean error where there is a bias; ``add`` gives one to every Linear
        and convolution.
    protect_ends : bool
        Leave the first and the last layer dense.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        An argument is wrong; a pattern that matches nothing is a PatternError.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        kinds: Sequence[Kind] = ALL_KINDS,
        divisor: int = 64,
        storage: Literal["factors", "pivot"] = "factors",
        conv: str = "auto",
        bias: Literal["keep", "add"] = "keep",
        protect_ends: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        for kind in kinds:
            check_choice("kinds", kind, ALL_KINDS)
        self.model = model
        self.divisor = check_int("divisor", divisor, low=1)
        self.storage: Form = check_choice("storage", storage, MATRIX_FORMS)
        self.conv = check_choice("conv", conv, ("auto", *CONV_FORMS))
        self.bias = check_choice("bias", bias, ("keep", "add"))
        self.layers = find_layers(model, kinds)
        self.skipped = {
            name: layer.skip for name, layer in self.layers.items() if layer.skip is not None
        }
        self._select(include, exclude, check_type("protect_ends", protect_ends, bool))
        self.method: Method = "plain"
        self.statistics: dict[str, Statistics] = {}
        self.notes: tuple[str, ...] = ()
        self.batches: list[Any] = []

    def calibrate(
        self,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        method: Literal["auto", "output", "loss"] = "auto",
        max_batches: int | None = None,
        shrinkage: float | Literal["auto"] = "auto",
    ) -> Self:
        """Run the model over data, so that outputs (with ``loss``: the loss) are kept, not weights.

        Parameters
        ----------
        batches : iterable
            Dicts, lists or tuples, or single tensors.
        loss : callable, optional
            ``loss(output, batch)`` gives the scalar loss of a batch, for example
            :func:`slim_lowrank.output_loss`.
        method : str
            What the factors keep: ``output``, or ``loss``, which needs one; ``auto`` takes ``loss``
            where there is one.  With ``output``, a loss still serves to spread a budget.
        max_batches : int, optional
            Stop after so many.
        shrinkage : float or "auto"
            Share of the mean input energy of a layer that is added to every input, at most 1e6.
            The more, the less is lost on data unlike the calibration.  "auto": as much as costs
            little on the second half of the batches when the first half is fitted, layer by
            layer (:func:`slim_lowrank.trust.trusted_shrinkage`); this takes four eigenvalue
            problems of at most 1024 outputs a layer and half as much memory again.  1e-4 trusts the
            calibration and
            guards against singular moments only.  Layers whose outputs are watched instead of
            inputs have none.

        Raises
        ------
        CalibrationError, InvalidTypeError, NumericalError
            As :func:`slim_lowrank.calibrate.collect`.
        """
        if check_choice("method", method, ("auto", "output", "loss")) == "loss" and loss is None:
            raise InvalidValueError("method 'loss' needs a loss", hint="calibrate(..., loss=...)")
        if max_batches is not None:
            check_int("max_batches", max_batches, low=1)
        if shrinkage != "auto":
            check_float("shrinkage", shrinkage, low=0.0, high=1e6)
        self.batches = read_batches(batches, max_batches)
        names = [group[0].name for group in self.groups()]
        halves = shrinkage == "auto"
        self.statistics = collect(self.model, names, self.batches, loss=loss, halves=halves)
        self._set_shrinkage(shrinkage)
        seen = any(entry.gradient > 0 for entry in self.statistics.values())
        self.method = "loss" if seen and method != "output" else "output"
        if loss is not None and not seen:
            self.notes += ("no gradients reached the layers: the loss method became 'output'",)
            logger.warning(self.notes[-1])
        if self.method == "output":
            for entry in self.statistics.values():
                entry.gamma = None
        self._warn_few()
        return self

    def groups(self) -> list[list[Layer]]:
        """Return the layers taken, tied ones together; a Linear leads its embedding."""
        taken = [layer for name, layer in self.layers.items() if name not in self.skipped]
        groups, seen = [], set[str]()
        for layer in taken:
            if layer.name not in seen:
                group = [layer, *(self.layers[name] for name in layer.tied)]
                groups.append(sorted(group, key=lambda each: each.kind == "embedding"))
                seen.update(each.name for each in group)
        return groups

    def ratio(self, share: float) -> Plan:
        """Keep the same share of the weights of every layer."""
        return self._each(lambda _: check_ratio("share", share))

    def fixed(self, rank: int) -> Plan:
        """Give every layer one rank."""
        check_int("rank", rank, low=1)
        return self._each(lambda _: rank)

    def vbmf(self) -> Plan:
        """Estimate every rank from the weight (:func:`slim_lowrank.vbmf.vbmf_rank`)."""
        return self._each(lambda _: "vbmf")

    def mapping(self, requests: Mapping[str, Any]) -> Plan:
        """Choose by name: globs to a share, a rank, a pair ``(out, in)`` or ``"vbmf"``.

        The first glob that matches decides; layers that none matches stay dense.

        Raises
        ------
        PatternError
            A glob matches no layer.
        """
        check_type("requests", requests, dict)
        parsed = {key: parse_request(key, value) for key, value in requests.items()}
        match_all("requests", list(parsed), list(self.layers))

        def choose(name: str) -> Any:
            return next((value for key, value in parsed.items() if match(key, [name])), None)

        return self._each(choose)

    def energy(self, share: float) -> Plan:
        """Keep at least a share of every layer's output energy (plain: of its weight)."""
        check_ratio("share", share)
        chosen = {}
        for leader, candidates in self._candidates():
            options = candidates.options(_params(leader), 1.0)
            limit = (1 - share) * candidates.total
            good = [option for option in options if option.loss <= limit]
            chosen[leader.name] = min(good, key=lambda option: option.cost).ranks
        return self._plan(chosen)

    def budget(self, budget: Budget | float) -> Plan:
        """Spread one budget over all layers so that the predicted harm is least.

        Parameters
        ----------
        budget : Budget or float
            A float is ``Budget(params=...)``.

        Raises
        ------
        PlanError
            The budget cannot be met, or the sensitivity was not measured.
        """
        if not isinstance(budget, Budget):
            budget = Budget(params=check_float("budget", budget))
        sensitivity = self._sensitivity(budget)
        options, dense = {}, 0.0
        for leader, candidates in self._candidates():
            cost = self._cost(budget.unit, leader, candidates)
            scale = self._scale(sensitivity, candidates)
            options[leader.name] = _above_floor(candidates.options(cost, scale), budget.floor)
            dense += cost(None)
        chosen = allocate(options, budget.share * dense)
        return self._plan({name: option.ranks for name, option in chosen.items()})

    def load(self, path: PathLike) -> Plan:
        """Read a rank table that :meth:`slim_lowrank.plan.Plan.save` wrote, for this model."""
        table = load_table(path)
        check_table(self.model, table)
        return Plan(self, table, self._reasons(table))

    def _select(self, include: Any, exclude: Any, protect_ends: bool) -> None:
        names = list(self.layers)
        if include is not None:
            taken = match_all("include", _patterns("include", include), names)
            for name in set(names) - {hit for hits in taken.values() for hit in hits}:
                self.skipped.setdefault(name, "not included")
        left = match_all("exclude", _patterns("exclude", exclude), names)
        for hits in left.values():
            self.skipped.update((name, "excluded") for name in hits if name not in self.skipped)
        open_names = [name for name in names if name not in self.skipped]
        if protect_ends and open_names:
            for name in (open_names[0], open_names[-1]):
                self.skipped[name] = "first or last layer"
        chosen = {name: None for name in names if name not in self.skipped}
        self.skipped.update(drop_broken_ties(self.layers, chosen))
        if len(self.skipped) == len(self.layers):
            raise PlanError(
                [f"layer {name!r}: {reason}" for name, reason in self.skipped.items()]
                or ["the model has no layer of the kinds asked for"]
            )

    def _candidates(self) -> Iterator[tuple[Layer, Candidates]]:
        """One after the other: each holds eigenvectors as large as its layer."""
        for group in track(self.groups(), "choosing ranks"):
            layer = group[0]
            yield (
                layer,
                Candidates(
                    layer,
                    self.statistics.get(layer.name),
                    divisor=self.divisor,
                    storage=self.storage,
                    conv=self.conv,
                    bias=self.has_bias(layer),
                ),
            )

    def has_bias(self, layer: Layer) -> bool:
        """Whether the decomposed layer gets a bias."""
        added = self.bias == "add" and layer.kind != "embedding" and not layer.tied
        return added or getattr(layer.module, "bias", None) is not None

    def _each(self, choose: Callable[[str], Any]) -> Plan:
        chosen = {}
        for leader, candidates in self._candidates():
            request = choose(leader.name)
            chosen[leader.name] = None if request is None else candidates.at(request)
        return self._plan(chosen)

    def _plan(self, chosen: Mapping[str, LayerRanks | None]) -> Plan:
        table = {}
        for group in self.groups():
            ranks = chosen[group[0].name]
            if ranks is not None:
                for layer in group:
                    table[layer.name] = LayerRanks(
                        layer.name,
                        layer.kind,
                        layer.shape,
                        ranks.form,
                        ranks.ranks,
                        self.has_bias(layer),
                    )
        ordered = {name: table[name] for name in self.layers if name in table}
        return Plan(self, ordered, self._reasons(ordered))

    def _reasons(self, table: Mapping[str, LayerRanks]) -> dict[str, str]:
        return {
            name: self.skipped.get(name, "dense is the better use of the budget")
            for name in self.layers
            if name not in table
        }

    def _sensitivity(self, budget: Budget) -> str:
        gradients = any(entry.gradient > 0 for entry in self.statistics.values())
        natural = "loss" if self.method == "loss" else "gradient" if gradients else "energy"
        if budget.sensitivity not in ("auto", "energy", natural):
            raise PlanError(
                [f"sensitivity {budget.sensitivity!r} does not go with what was calibrated"],
                hint="calibrate(batches, loss=..., method='output') for 'gradient', else 'loss'",
            )
        return natural if budget.sensitivity == "auto" else budget.sensitivity

    def _scale(self, sensitivity: str, candidates: Candidates) -> float:
        if sensitivity == "energy":
            return 1.0 / candidates.total if candidates.total > 0 else 0.0
        entry = candidates.statistics
        return 1.0 if entry is None or entry.gamma is not None else entry.gradient

    def _cost(
        self, unit: str, layer: Layer, candidates: Candidates
    ) -> Callable[[LayerRanks | None], float]:
        if unit == "flops":
            if not self.statistics and not layer.is_matrix:
                raise PlanError(
                    [f"layer {layer.name!r}: its image size is not known"],
                    hint="calibrate(...) before asking for a budget of flops",
                )
            return candidates.flops
        weight: Any = layer.module.weight
        return _params(layer, float(weight.element_size()) if unit == "bytes" else 1.0)

    def _set_shrinkage(self, shrinkage: float | Literal["auto"]) -> None:
        for name, entry in self.statistics.items():
            if shrinkage != "auto":
                entry.shrinkage = shrinkage
            else:
                entry.find_shrinkage(flat_weight(self.layers[name]))

    def _warn_few(self) -> None:
        for name, entry in self.statistics.items():
            second = entry.input_second if entry.input_second is not None else entry.output_second
            if second is not None and entry.rows < 4 * len(second):
                logger.warning(
                    "layer %r saw %d positions for %d channels; 4 per channel are advised",
                    name,
                    entry.rows,
                    len(second),
                )


def _params(layer: Layer, scale: float = 1.0) -> Callable[[LayerRanks | None], float]:
    dense = float(np.prod(layer.shape))
    return lambda ranks: scale * (dense if ranks is None else ranks.params)


def _above_floor(options: list[Option], floor: float) -> list[Option]:
    dense = max(option.cost for option in options)
    return [option for option in options if option.cost >= floor * dense or option.ranks is None]


def _patterns(name: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidTypeError(f"{name} must be a list of str, not {type(value).__name__}")
    return [check_type(f"{name}[{index}]", item, str) for index, item in enumerate(value)]
