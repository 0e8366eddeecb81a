"""The structure of one decoder block, read from the data flow of one forward pass."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_ptq.structure.flow import ChannelFlow, Reading
from slim_ptq.structure.linears import is_linear, weight_of
from slim_ptq.structure.links import Link, LinkKind, RejectedLink, Target
from slim_ptq.structure.norms import is_norm_like, norm_form
from slim_ptq.structure.proof import prove, run_block
from slim_ptq.structure.quantizable import find_linears
from slim_ptq.structure.siblings import Siblings


@dataclass(frozen=True, eq=False)
class BlockTrace:
    """What one decoder block is made of; all names are local to the block.

    Parameters
    ----------
    groups : tuple of tuple of str
        Quantizable linear layers that read the same tensor, in order of execution.  Layers that
        were not run (experts without a token) follow their siblings that were.
    links : tuple of Link
        Proved links.
    rejected : tuple of RejectedLink
        Candidates that failed, with the reason.
    """

    groups: tuple[tuple[str, ...], ...]
    links: tuple[Link, ...]
    rejected: tuple[RejectedLink, ...] = ()

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the group that a linear layer belongs to."""
        return next((group for group in self.groups if name in group), (name,))


def trace_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockTrace:
    """Run the block and find its groups and links.

    Parameters
    ----------
    block : nn.Module
        A decoder block in floating point; it is left as it was.
    args, kwargs
        What the model calls it with; they are not changed either.  A few tokens are enough: time
        and memory grow with their number.

    Raises
    ------
    NumericalError
        The block gives NaN or infinity.
    """
    with torch.inference_mode(False), torch.no_grad(), _evaluating(block):
        recorder = _Recorder(block)
        reference = recorder.run(args, kwargs)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in reference):
            raise NumericalError(f"the output of {type(block).__name__} has NaN or infinity")
        candidates, rejected = recorder.candidates()
        links, failed = prove(block, candidates, args, kwargs, reference)
    return BlockTrace(recorder.groups(), links, rejected + failed)


class _Recorder:
    """One traced forward pass and what follows from it."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        modules = dict(block.named_modules())
        self.linears = [name for name, module in modules.items() if is_linear(module)]
        self.norms = [name for name, module in modules.items() if is_norm_like(module)]
        self.quantizable = find_linears(block)
        self.siblings = Siblings(block)
        self.flow = ChannelFlow(block, set(self.linears))
        self._norm_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._norm_outputs: dict[str, tuple[Any, ...]] = {}
        self._inputs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        self._kept: list[torch.Tensor] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Run the block under observation and return its output."""
        handles = [
            self.block.get_submodule(name).register_forward_pre_hook(self._linear_hook(name))
            for name in self.quantizable
        ] + [
            self.block.get_submodule(name).register_forward_hook(
                self._norm_hook(name), with_kwargs=True
            )
            for name in self.norms
        ]
        try:
            with self.flow:
                return run_block(self.block, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _linear_hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            tensor = inputs[0]
            names = self._inputs[self._identity(tensor)]
            if tensor.numel() and name not in names:
                names.append(name)

        return hook

    def _norm_hook(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            size = module.weight.shape[0]
            if not isinstance(out, torch.Tensor) or out.shape[-1] != size or not out.numel():
                return
            self._norm_calls.setdefault(name, (args, kwargs))
            self._norm_outputs.setdefault(name, self._identity(out))
            self.flow.start(name, out)

        return hook

    def _identity(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Return what two tensors have in common that hold the same elements in memory."""
        self._kept.append(tensor)  # a freed tensor's memory would be taken for its successor
        start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        return start, tensor.numel(), tensor._version

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the linears by what they read; each linear once, under its first input."""
        seen: set[str] = set()
        found: list[tuple[str, ...]] = []
        for names in self._inputs.values():
            fresh = tuple(name for name in names if name not in seen)
            if fresh:
                found.append(fresh)
                seen.update(fresh)
        missing = [name for name in self.quantizable if name not in seen]
        return tuple(found) + self.siblings.mirror_groups(found, missing)

    def candidates(self) -> tuple[tuple[Link, ...], tuple[RejectedLink, ...]]:
        """Return the links that the data flow suggests, and those that cannot be proved."""
        readers: dict[str, list[tuple[Reading, torch.Tensor, bool]]] = defaultdict(list)
        for reading in self.flow.readings:
            for source, (index, mixed) in reading.carried.items():
                readers[source].append((reading, index, mixed))
        found = [self._link(source, found) for source, found in readers.items()]
        links = self.siblings.complete([link for link in found if link is not None])
        run = {reading.weight.module for reading in self.flow.readings}
        unknown = [n for n in self.linears if n not in run and not self.siblings.known(n, run)]
        reasons = {link.source: _unfit(link, unknown) for link in links}
        fit = tuple(link for link in links if reasons[link.source] is None)
        rejected = [RejectedLink(link, reasons[link.source] or "") for link in links]
        return fit, tuple(item for item in rejected if item.reason)

    def _link(self, source: str, readers: list[tuple[Reading, torch.Tensor, bool]]) -> Link | None:
        targets: dict[tuple[str, str], Target] = {}
        for reading, index, _ in readers:
            weight = reading.weight
            targets[weight.module, weight.parameter] = Target(
                weight.module, weight.parameter, reading.axis, index
            )
        module, order = self.block.get_submodule(source), tuple(targets.values())
        if source not in self._norm_calls:
            kind = LinkKind.V_O if any(mixed for _, _, mixed in readers) else LinkKind.UP_DOWN
            return Link(kind, source, order, weight_of(module).shape[0])
        form = norm_form(module, *self._norm_calls[source])
        if form is None:
            return None
        width = module.get_parameter("weight").shape[0]
        reads = self._inputs.get(self._norm_outputs[source], [])
        direct = all(target.name in reads for target in order)
        return Link(LinkKind.NORM_LINEAR, source, order, width, form, direct)


def _unfit(link: Link, unknown: list[str]) -> str | None:
    """Say why a candidate is not worth a proof, or None."""
    if unknown:
        return f"{unknown[0]} was not run, so what it reads is not known"
    first = link.targets[0].index
    if any(not torch.equal(first, target.index) for target in link.targets[1:]):
        return "its readers take its channels in different orders"
    if link.kind is LinkKind.NORM_LINEAR and first.tolist() != list(range(link.width)):
        return "its readers take only some of its channels, or in another order"
    return None


@contextlib.contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Switch off dropout and the like while the block is examined."""
    training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
