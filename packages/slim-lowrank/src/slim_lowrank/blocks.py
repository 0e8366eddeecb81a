"""Find the chain of blocks of a model, and run it one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, module: nn.Module) -> Any:
        """Call the module."""
        return module(*self.args, **self.kwargs)


def calls_of(batches: Sequence[Any]) -> list[Call]:
    """Return the calls of the whole model that batches stand for."""
    calls = []
    for batch in batches:
        if isinstance(batch, Mapping):
            calls.append(Call((), dict(batch)))
        else:
            calls.append(Call(tuple(batch) if isinstance(batch, (list, tuple)) else (batch,), {}))
    return calls


@dataclass(frozen=True)
class Chain:
    """Blocks of which each takes the output of the one before as its first argument.

    Parameters
    ----------
    names : tuple of str
        Names of the blocks, in the order in which they run.
    """

    names: tuple[str, ...]

    def block_of(self, layer: str) -> int | None:
        """Return the index of the block that holds a layer."""
        for index, name in enumerate(self.names):
            if layer.startswith(f"{name}."):
                return index
        return None

    def capture(self, model: nn.Module, calls: Sequence[Call]) -> list[list[Call]]:
        """Return, for every call of the model, the calls of its blocks.

        Only the activations of the first block are kept; :meth:`advance` fills in the others.
        """
        captured = []
        for call in calls:
            seen: list[Call] = []
            with _noting(model, self.names, seen), without_cache(model):
                call.run(model)
            captured.append(
                [seen[0], *(replace(each, args=(None, *each.args[1:])) for each in seen[1:])]
            )
        return captured

    def advance(self, model: nn.Module, calls: Sequence[list[Call]], index: int) -> None:
        """Run a block and hand its outputs to the next one."""
        block = model.get_submodule(self.names[index])
        for blocks in calls:
            hidden = _hidden(blocks[index].run(block))
            blocks[index] = Call((), {})
            if index + 1 < len(blocks):
                following = blocks[index + 1]
                blocks[index + 1] = replace(following, args=(hidden, *following.args[1:]))


def find_chain(model: nn.Module, names: Sequence[str], call: Call) -> Chain | None:
    """Return the ModuleList that holds most of the layers if its blocks run as a plain chain."""
    best: tuple[str, ...] = ()
    most = 1
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            blocks = tuple(f"{name}.{index}" for index in range(len(module)))
            count = sum(name_in.startswith(f"{name}.") for name_in in names)
            if count > most:
                best, most = blocks, count
    return Chain(best) if best and _is_plain(model, best, call) else None


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a transformers model from filling a key-value cache that later calls would reuse."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]


@contextmanager
def _noting(model: nn.Module, names: Sequence[str], seen: list[Call]) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(model: nn.Module, names: Sequence[str], call: Call) -> bool:
    """Whether each block runs once, in order, on the very tensor that the one before returned."""
    seen: list[Call] = []
    outputs: list[Any] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output: outputs.append(_hidden(output))
        )
        for name in names
    ]
    try:
        with _noting(model, names, seen), without_cache(model):
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(names) or not all(each.args for each in seen):
        return False
    inputs = [each.args[0] for each in seen[1:]]
    return all(isinstance(x, Tensor) and x is y for x, y in zip(inputs, outputs, strict=False))


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
