"""Outlier suppression of a whole model in memory, in place."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_core.numerics import check_finite
from slim_core.progress import track
from slim_core.scheme import QuantScheme
from slim_ptq.calibration.samples import Sample, feed, shortest
from slim_ptq.offload import resident
from slim_ptq.structure import (
    BlockTrace,
    Link,
    find_blocks,
    find_linears,
    trace_block,
    unfuse_experts,
    weight_of,
)
from slim_ptq.transforms import (
    LinkStatistics,
    ScaleMethod,
    SkippedLink,
    SuppressedLink,
    choose_links,
    suppress_block,
)


@dataclass(frozen=True)
class AntiOutlierResult:
    """What outlier suppression did; names are those of the model."""

    scaled: tuple[SuppressedLink, ...] = field(default=(), repr=False)
    skipped: tuple[SkippedLink, ...] = ()


def suppress_model(
    model: nn.Module,
    samples: Sequence[Sample],
    method: ScaleMethod,
    scheme_of: Callable[[str], QuantScheme],
    barred: Mapping[str, str],
) -> AntiOutlierResult:
    """Find the links of all blocks, measure their activations on all samples, move the scales.

    Parameters
    ----------
    model : nn.Module
        In floating point and evaluation mode; fused experts are taken apart.
    samples : sequence of list or dict
        At least one.
    method : ScaleMethod
    scheme_of : callable
        How a linear layer will be quantized, by its name in the model.
    barred : mapping
        Names of modules whose links are left alone, with the reason.

    Raises
    ------
    StructureError
        The model has no decoder blocks.
    NumericalError
        A weight or an activation has NaN or infinity; names the layer.
    """
    blocks = find_blocks(model)
    unfuse_experts(model)
    barred = {**_shared_parameters(model), **barred}
    scaled: list[SuppressedLink] = []
    skipped: list[SkippedLink] = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        chosen: dict[str, tuple[tuple[Link, ...], LinkStatistics]] = {}
        for name, trace in _traces(model, blocks, samples):
            links, left = choose_links(trace, method.kinds, _local(barred, name))
            skipped.extend(link.under(name) for link in left)
            block = model.get_submodule(name)
            statistics = LinkStatistics(block, links, tokens=method.tokens, prefix=name)
            chosen[name] = links, stack.enter_context(statistics)
        for _ in feed(model, samples, "Measuring activations"):
            pass
        stack.close()
        for name in track(blocks, "Suppressing outliers"):
            links, statistics = chosen.pop(name)
            block = model.get_submodule(name)
            schemes = {local: scheme_of(f"{name}.{local}") for local in find_linears(block)}
            with resident(block, changed=True):
                done, others = suppress_block(
                    block, links, statistics, method, schemes, prefix=name
                )
            scaled.extend(link.under(name) for link in done)
            skipped.extend(link.under(name) for link in others)
    return AntiOutlierResult(tuple(scaled), tuple(skipped))


def _traces(
    model: nn.Module, blocks: Sequence[str], samples: Sequence[Sample]
) -> Iterator[tuple[str, BlockTrace]]:
    """Yield the trace of each block on what the shortest sample gives it."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, kwargs))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(catch(name), with_kwargs=True)
        for name in blocks
    ]
    try:
        for _ in feed(model, [shortest(samples)[1]], "Running one sample"):
            pass
    finally:
        for handle in handles:
            handle.remove()
    for name in track(blocks, "Proving links"):
        block = model.get_submodule(name)
        with resident(block):
            for local, linear in find_linears(block).items():  # attention kernels may hide NaN
                check_finite(f"{name}.{local}", "weight", weight_of(linear))
            try:
                trace = trace_block(block, *calls.pop(name))
            except NumericalError as error:
                raise NumericalError(f"{name}: {error.message}", hint=error.hint) from error
        yield name, trace


def _local(barred: Mapping[str, str], block: str) -> dict[str, str]:
    prefix = f"{block}."
    return {
        name.removeprefix(prefix): reason
        for name, reason in barred.items()
        if name.startswith(prefix)
    }


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Return the modules with a parameter that another module holds too, each with the reason."""
    holders = [
        (name, id(parameter))
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    ]
    counts = Counter(identity for _, identity in holders)
    return {
        name: f"another module shares the weight of {name}"
        for name, identity in holders
        if counts[identity] > 1
    }
