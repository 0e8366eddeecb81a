"""What the decoder blocks of a model are called with, found without running them.

Every block is replaced by one that hands its input on unchanged and notes its further arguments
(masks, positions), so a single cheap pass gives the arguments of all blocks.  Only what lies before
the first block is computed, and only that needs its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True, eq=False)
class BlockCalls:
    """The arguments of all blocks for one batch, beside the hidden states.

    Parameters
    ----------
    args : list of tuple
        Further positional arguments, a block.
    kwargs : list of dict
        Keyword arguments, a block.
    """

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that a block gives for these, (rows, tokens, channels)."""
        return first_tensor(block(hidden, *self.args[index], **self.kwargs[index]))


def capture_calls(
    model: nn.Module, blocks: Sequence[str], ids: torch.Tensor, like: Any
) -> tuple[torch.Tensor, BlockCalls]:
    """Return the input of the first block for a batch of token ids, and the further arguments.

    Parameters
    ----------
    ids : torch.Tensor
        int64, shape (rows, tokens), on the device of the model.
    like : object
        What a block returns (:func:`output_form`).
    """
    return capture_run(model, blocks, lambda: model(ids, use_cache=False), like)


def capture_run(
    model: nn.Module, blocks: Sequence[str], run: Callable[[], object], like: Any
) -> tuple[torch.Tensor, BlockCalls]:
    """Return the input of the first block, and the further arguments of all, when ``run`` runs.

    ``run`` calls the model; for the rest see :func:`capture_calls`.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    start: list[torch.Tensor] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        if not start:
            start.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Stop
        return hidden if like is None else (hidden, *like)

    with _forward_replaced(model, blocks, note), contextlib.suppress(_Stop), torch.no_grad():
        run()
    return start[0], BlockCalls([args for args, _ in calls], [kwargs for _, kwargs in calls])


def first_call(
    model: nn.Module, block: str, ids: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the first block, with the hidden states as the first of them."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        found.append(((hidden, *args), kwargs))
        raise _Stop

    with _forward_replaced(model, [block], note), contextlib.suppress(_Stop), torch.no_grad():
        model(ids, use_cache=False)
    return found[0]


def output_form(output: Any) -> tuple[None, ...] | None:
    """Return what must follow the hidden states so that a model takes them for a block's output.

    Blocks return the hidden states alone (None) or first in a tuple.
    """
    return None if isinstance(output, torch.Tensor) else (None,) * (len(output) - 1)


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states of a block's output."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


class _Stop(Exception):
    """Ends a forward pass once everything is known."""


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


@contextlib.contextmanager
def _forward_replaced(
    model: nn.Module, blocks: Sequence[str], forward: Callable[..., Any]
) -> Iterator[None]:
    modules = [model.get_submodule(block) for block in blocks]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
