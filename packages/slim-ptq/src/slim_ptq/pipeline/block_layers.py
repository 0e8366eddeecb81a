"""Make the quantized layers of one decoder block: in threads, in batches, shared by processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slim_core.plan import LayerPlan
from slim_ptq.methods import LearnedTransform, Needs, Parts, make_method
from slim_ptq.parallel import Team
from slim_ptq.pipeline.ahead import work_ahead
from slim_ptq.pipeline.batches import portions, quantize_batches
from slim_ptq.pipeline.quantizing import Made, made_layer, output_error, quantize_layer
from slim_ptq.pipeline.statistics import InputStatistics
from slim_ptq.structure import bias_of, weight_of

_PASSES = 3300  # channels that products have in the time of the passes (benchmarks: scale.py)


@dataclass(frozen=True)
class BlockLayers:
    """The layers of a block that are quantized, by their local names, and what is known of them.

    Parameters
    ----------
    block : nn.Module
    plans : mapping
    statistics : mapping
        Whose moments are freed with the last layer that needs them.
    learned : mapping
        What was trained with the whole block, of the layers that have that.
    model_dtype : str
        Of the checkpoint.
    as_stored : callable
        Returns a tensor, whose name comes first, in the dtype that it has in the checkpoint.
    """

    block: nn.Module
    plans: Mapping[str, LayerPlan]
    statistics: Mapping[str, InputStatistics]
    learned: Mapping[str, LearnedTransform | Parts]
    model_dtype: str
    as_stored: Callable[[str, torch.Tensor], torch.Tensor]

    def made(self, team: Team) -> Iterable[tuple[str, Made]]:
        """Quantize the layers that fall to this process; returns those of all, in order.

        Alone, each is made when it is asked for.
        """
        mine = self._share(team)
        made: Iterable[tuple[str, Made]]
        if self._in_threads():
            costs = {local: self._weight(local).nbytes for local in mine}
            several = work_ahead(self._make, [*mine], costs.__getitem__, sum(costs.values()) // 2)
            made = zip(mine, several, strict=True)
        else:
            made = self._in_portions(mine)
        if team.size == 1:
            return made
        found = {local: item for part in team.collect(dict(made)) for local, item in part.items()}
        return [(local, found[local]) for local in self.plans if local in found]

    def _share(self, team: Team) -> dict[str, LayerPlan]:
        """Return the layers that fall to this process.

        Those whose method works on the same second moments stay together, as they share what it
        computes of these.
        """
        leaders: dict[int, str] = {}
        units: dict[str, list[str]] = {}
        for local, plan in self.plans.items():
            leader = local
            if Needs.HESSIAN in make_method(plan.method).needs:
                leader = leaders.setdefault(id(self.statistics[local]), local)
            units.setdefault(leader, []).append(local)
        own = team.share({leader: self._cost(unit) for leader, unit in units.items()})
        mine = {local for leader in own for local in units[leader]}
        return {local: plan for local, plan in self.plans.items() if local in mine}

    def _cost(self, unit: Sequence[str]) -> int:
        """Return how much work layers of one input are, in multiplications or weights."""
        plans = [self.plans[local] for local in unit]
        rows, columns = sum(plan.shape[0] for plan in plans), plans[0].shape[1]
        if Needs.HESSIAN in make_method(plans[0].method).needs:
            # To pass over the weight and to feed errors back, and to factorize.
            return columns * (rows * (columns + _PASSES) + columns**2 // 3)
        return rows * columns

    def _in_threads(self) -> bool:
        """Whether the layers are made a few at a time, each by its share of the cores.

        That is good for methods that pass over the weight again and again, as torch would divide
        each of their many short steps among all cores.  Others are made of matrix products, which
        use the cores better; a device has its own.
        """
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.block.parameters())
        return on_cpu and not any(make_method(plan.method).needs for plan in self.plans.values())

    def _in_portions(self, plans: Mapping[str, LayerPlan]) -> Iterator[tuple[str, Made]]:
        last = {id(self.statistics[local]): local for local in plans}
        for statistics in self.statistics.values():
            if id(statistics) not in last:  # that of another process
                statistics.forget_inputs()
        for portion in portions(plans, self.statistics):
            done = quantize_batches(portion, self.statistics, self._weight)
            for local in portion:
                item = self._make(local, *done.pop(local, ()))
                statistics = self.statistics[local]
                if last[id(statistics)] == local:
                    statistics.forget_inputs()
                yield local, item

    def _weight(self, local: str) -> torch.Tensor:
        return weight_of(self.block.get_submodule(local))

    def _make(self, local: str, parts: Parts | None = None, seconds: float = 0.0) -> Made:
        """Quantize a layer, or finish one of which ``parts`` were made in ``seconds``."""
        started = time.perf_counter() - seconds
        plan, statistics = self.plans[local], self.statistics[local]
        weight, bias = self._weight(local), bias_of(self.block.get_submodule(local))
        params = None
        if plan.scheme.is_static and statistics.observer is not None:
            assert plan.scheme.activation is not None  # narrowing
            storage: torch.dtype = getattr(torch, self.model_dtype)
            params = statistics.observer.params(plan.scheme.activation, storage)
        inputs = statistics.inputs()
        if local in self.learned:
            inputs = replace(inputs, learned=self.learned[local])
        layer, error = quantize_layer(
            plan,
            weight,
            None if bias is None else self.as_stored(f"{plan.name}.bias", bias),
            model_dtype=self.model_dtype,
            inputs=inputs,
            input_params=params,
            parts=parts,
        )
        seen = statistics.tokens
        worse = None if seen is None else output_error(layer, weight, seen)
        return made_layer(layer, error, worse, started)
