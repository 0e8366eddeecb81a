"""Quantize small layers of one shape, the experts of a block, together.

To choose codes column by column costs a few short operations for each column, which take hardly
longer for several layers than for one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from slim_core.plan import LayerPlan
from slim_ptq.methods import BatchInputs, BatchMethod, Parts, make_method
from slim_ptq.pipeline.statistics import InputStatistics

_MOST_BYTES = 1 << 28  # of the weights and Hessians, in float32, that are worked on at a time


def portions(
    layers: Mapping[str, LayerPlan], statistics: Mapping[str, InputStatistics]
) -> Iterator[dict[str, LayerPlan]]:
    """Yield the layers, in order, as many at a time as may be quantized together.

    Layers that follow each other and have the same inputs are not parted.
    """
    portion: dict[str, LayerPlan] = {}
    spent = 0
    for _, names in itertools.groupby(layers, lambda name: id(statistics[name])):
        group = {name: layers[name] for name in names}
        cost = sum(map(_cost, group.values()))
        if portion and spent + cost > _MOST_BYTES:
            yield portion
            portion, spent = {}, 0
        portion |= group
        spent += cost
    if portion:
        yield portion


def _cost(plan: LayerPlan) -> int:
    if not isinstance(make_method(plan.method), BatchMethod):
        return _MOST_BYTES
    rows, columns = plan.shape
    return 4 * columns * (rows + columns)


def quantize_batches(
    portion: Mapping[str, LayerPlan],
    statistics: Mapping[str, InputStatistics],
    weight: Callable[[str], torch.Tensor],
) -> dict[str, tuple[Parts, float]]:
    """Quantize the layers of a portion of which several are alike.

    Parameters
    ----------
    weight : callable
        Returns the weight of a layer, shape (out, in).

    Returns
    -------
    dict
        What became of them, and the share of each in the seconds that this took.  Other layers
        are left out.
    """
    found: dict[str, tuple[Parts, float]] = {}
    for batches in _batches(portion, statistics):
        # What is computed of the inputs alone is kept for the batches that share them.
        inputs = BatchInputs(tuple(statistics[name].inputs() for name in batches[0]))
        for names in batches:
            plan = portion[names[0]]
            method = make_method(plan.method)
            assert isinstance(method, BatchMethod)  # narrowing
            assert plan.scheme.weight is not None
            started = time.perf_counter()
            parts = method.quantize_batch(
                [portion[name].name for name in names],
                [weight(name) for name in names],
                plan.scheme.weight,
                inputs,
            )
            seconds = (time.perf_counter() - started) / len(names)
            found |= {name: (part, seconds) for name, part in zip(names, parts, strict=True)}
    return found


def _batches(
    portion: Mapping[str, LayerPlan], statistics: Mapping[str, InputStatistics]
) -> list[list[Sequence[str]]]:
    """Return layers of several inputs that are alike in shape, scheme and method.

    Each list has batches with the same inputs in the same order, as those of the gates of some
    experts and of what stands beside them.  Inputs are taken together only if all their layers are
    alike, so that nothing is computed of them for a batch and once more for a layer alone.
    """
    by_inputs: dict[int, list[str]] = {}
    for name, plan in portion.items():
        inputs = statistics[name]
        if isinstance(make_method(plan.method), BatchMethod) and inputs.inputs().count:
            by_inputs.setdefault(id(inputs), []).append(name)
    alike: dict[object, list[list[str]]] = {}
    for names in by_inputs.values():
        plans = [portion[name] for name in names]
        kind = tuple((plan.shape, str(plan.scheme), str(plan.method)) for plan in plans)
        alike.setdefault(kind, []).append(names)
    return [list(zip(*members, strict=True)) for members in alike.values() if len(members) > 1]
