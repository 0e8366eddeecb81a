"""How a module that fuses experts keeps its weights, and the proof that it was understood."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Combine = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class FusedLayout:
    """How a fused experts module keeps its weights and is called.

    Parameters
    ----------
    first, down : str
        Names of the 3-D parameters of the first and the last projection.
    transposed : bool
        Weights are ``[E, in, out]`` rather than ``[E, out, in]``.
    gated : bool
        The first projection holds a gate and an up projection.
    interleaved : bool
        Its output channels are gate 0, up 0, gate 1, ... rather than all gates, then all ups.
    dense : bool
        Routing weights come as ``[tokens, E]`` rather than ``[tokens, top_k]``.
    roles : tuple of str
        Names of the arguments for the hidden states, the expert numbers and the routing weights.
    """

    first: str
    down: str
    transposed: bool
    gated: bool
    interleaved: bool
    dense: bool
    roles: tuple[str, str, str]


def weight_shapes(
    named: dict[str, nn.Parameter], *, transposed_first: bool
) -> tuple[str, str, bool, bool] | None:
    """Return (first, down, transposed, gated) of the two weights, or None if they do not fit.

    Without a gate both orientations fit; then the one that is tried first is taken.
    """
    for first, down in itertools.permutations(named, 2):
        if "down" not in down or len(named) != 2:
            continue
        (count, a, b), (count_down, c, d) = named[first].shape, named[down].shape
        orientations = [(False, (a, b), (c, d)), (True, (b, a), (d, c))]
        orientations.sort(key=lambda item: item[0] is not transposed_first)
        for transposed, (wide, into), (out, narrow) in orientations:
            if count == count_down and into == out and wide in (narrow, 2 * narrow):
                return first, down, transposed, wide == 2 * narrow
    return None


def argument_roles(names: list[str]) -> tuple[str, str, str] | None:
    """Tell the states, expert numbers and routing weights apart among argument names."""
    index = [name for name in names if "ind" in name]
    weights = [name for name in names if "weight" in name or "score" in name]
    hidden = [name for name in names if "hidden" in name or name in ("x", "inputs")]
    if len(names) == 3 and len(index) == len(weights) == len(hidden) == 1:
        return hidden[0], index[0], weights[0]
    return None


def gate_function(module: nn.Module, layout: FusedLayout) -> Combine | None:
    """Return what turns the outputs of up and gate into the input of down; None if unknown."""
    own: Any = getattr(type(module), "_apply_gate", None)
    if layout.gated and own is not None and own.__name__ == "_apply_gate":
        shell = copy.copy(module)
        shell._parameters = {}
        return _OwnGate(own, shell, layout.interleaved)
    act: Any = getattr(module, "act_fn", None)
    return None if act is None else _Activation(act)


@dataclass(frozen=True)
class _Activation:
    """The usual gate: ``act(gate) * up``, or ``act(up)`` where there is no gate."""

    act: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.act(up) if gate is None else self.act(gate) * up


@dataclass(frozen=True)
class _OwnGate:
    """The gate function that a fused module class defines, on the joined projections."""

    function: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    shell: nn.Module
    interleaved: bool

    def __call__(self, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        parts = [up] if gate is None else [gate, up]
        joined = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return self.function(self.shell, joined)


@contextlib.contextmanager
def _plainly(module: nn.Module) -> Iterator[None]:
    """Let the module use its own forward instead of a grouped kernel, which not all types have."""
    config, training = getattr(module, "config", None), module.training
    chosen = getattr(config, "_experts_implementation", None)
    if chosen is not None:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
    module.eval()
    try:
        yield
    finally:
        module.train(training)
        if chosen is not None:
            config._experts_implementation = chosen  # type: ignore[union-attr]


class Proof:
    """Outputs of the fused module on random tokens, each routed to all experts."""

    TOKENS = 4

    def __init__(
        self,
        module: nn.Module,
        roles: tuple[str, str, str],
        down: torch.Tensor,
        transposed: bool,
    ) -> None:
        count, width = down.shape[0], down.shape[2 if transposed else 1]
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator).to(down.device, down.dtype)

        order = torch.stack(
            [torch.randperm(count, generator=generator) for _ in range(self.TOKENS)]
        )
        states = random(1, self.TOKENS, width)[0] - 0.5
        self.arguments = dict(
            zip(roles, (states, order.to(down.device), random(self.TOKENS, count)), strict=True)
        )
        with torch.no_grad(), _plainly(module):
            self.expected = module(**self.arguments).float().reshape(self.TOKENS, width)
        relative = max(8 * torch.finfo(down.dtype).eps, 1e-5)
        self.tolerance = relative * float(self.expected.abs().max())

    def accepts(self, candidate: nn.Module) -> bool:
        """Tell whether the candidate gives the same output to rounding."""
        with torch.no_grad():
            found = candidate(**self.arguments).float()
        return float((found - self.expected).abs().max()) <= self.tolerance
