"""Proving links: a scale moved over a link must leave the output of the block as it is.

The scales are powers of two, so that moving them is exact in every floating type and the outputs
must agree to the last rounding of float32, whatever the precision of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slim_ptq.structure.links import Link, RejectedLink

TOLERANCE = 4e-6  # 32 units of float32: reorderings inside matrix products


def run_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Run the block on copies of its arguments and return the float tensors that come out.

    Copies, because some blocks work in place, and no key-value cache, because it may have been
    filled since the arguments were caught.
    """
    with torch.no_grad():
        out = block(*(_fresh(arg) for arg in args), **{k: _fresh(v) for k, v in kwargs.items()})
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return [t for t in outs if isinstance(t, torch.Tensor) and t.is_floating_point()]


def prove(
    block: nn.Module,
    links: Sequence[Link],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: list[torch.Tensor],
) -> tuple[tuple[Link, ...], tuple[RejectedLink, ...]]:
    """Split candidates into proved links and rejected ones.

    All are tried at once; only when that fails are halves tried, down to the links at fault.

    Parameters
    ----------
    reference : list of torch.Tensor
        Output of the block as it is.
    """
    if not links:
        return (), ()
    with contextlib.ExitStack() as stack:
        for number, link in enumerate(links):
            stack.enter_context(_scaled(block, link, number))
        error = _error(run_block(block, args, kwargs), reference)
    if error <= TOLERANCE:
        return tuple(links), ()
    if len(links) == 1:
        reason = f"scaling it changes the output of the block by {error:.1e} of its largest value"
        return (), (RejectedLink(links[0], reason),)
    half = len(links) // 2
    proved, rejected = prove(block, links[:half], args, kwargs, reference)
    more, others = prove(block, links[half:], args, kwargs, reference)
    return proved + more, rejected + others


@contextlib.contextmanager
def _scaled(block: nn.Module, link: Link, seed: int) -> Iterator[None]:
    """Divide the output of the source by random powers of two; multiply the readers' columns."""
    source = block.get_submodule(link.source)
    parameters = [
        getattr(block.get_submodule(target.name), target.parameter) for target in link.targets
    ]
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(1, 4, (link.width,), generator=generator)
    scale = torch.ones(link.width)
    used = link.channels.cpu()
    scale[used] = 2.0 ** exponents[used]

    def divide(module: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out / scale.to(out.device, out.dtype)

    handle = source.register_forward_hook(divide)
    done: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for target, parameter in zip(link.targets, parameters, strict=True):
            factor = scale[target.index.cpu()].to(parameter.device, parameter.dtype)
            column = factor if target.axis == 1 else factor[:, None]
            parameter.data.mul_(column)
            done.append((parameter.data, column))
        yield
    finally:
        for data, column in done:
            data.div_(column)
        handle.remove()


def _error(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest value; infinite for a NaN."""
    worst = 0.0
    for mine, theirs in zip(found, reference, strict=True):
        size = float(theirs.abs().max().float())
        gap = float((mine.double() - theirs.double()).abs().max())
        worst = max(worst, gap / size if size else gap) if gap == gap else float("inf")
    return worst


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if hasattr(value, "get_seq_length"):
        return None
    if isinstance(value, (tuple, list)):
        return type(value)(_fresh(item) for item in value)
    return copy.deepcopy(value)
