"""Experts that are fused into 3-D parameters, made into linear layers.

transformers 5 keeps the experts of a layer in two parameters ``gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]`` (or their transposes); engines and checkpoints want one linear layer an
expert.  Which layout, order of gate and up, and form of routing weights a module uses is read
from its shapes and then proved: the replacement must compute the same as the original.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slim_core.logging import get_logger

Combine = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

logger = get_logger("ptq.structure")


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


class Expert(nn.Module):
    """One feed-forward expert made of linear layers."""

    def __init__(self, linears: dict[str, nn.Linear], combine: Combine) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.combine = combine

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map ``[tokens, H]`` to ``[tokens, H]``."""
        linears = dict(self.named_children())
        gate = linears["gate_proj"](hidden_states) if "gate_proj" in linears else None
        up = linears["up_proj"](hidden_states)
        out: torch.Tensor = linears["down_proj"](self.combine(up, gate))
        return out


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer as a list of :class:`Expert`, called like the module it replaces.

    Experts that no token is routed to are not called.
    """

    def __init__(
        self, experts: list[Expert], layout: FusedLayout, signature: inspect.Signature
    ) -> None:
        super().__init__(experts)
        self.layout = layout
        self.signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the sum of the experts' outputs, weighted as routed, shaped as the input."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        hidden, index, weights = (arguments[name] for name in self.layout.roles)
        states = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(states)
        for number, expert in enumerate(self):
            token, position = torch.where(index == number)
            if token.numel():
                column = number if self.layout.dense else position
                weighted = expert(states[token]) * weights[token, column, None]
                out.index_add_(0, token, weighted.to(out.dtype))
        return out.reshape(hidden.shape)


def unfuse_experts(root: nn.Module) -> tuple[str, ...]:
    """Replace every fused experts module below ``root`` by a list of linear layers.

    The new layers ``<experts>.<number>.gate_proj``, ``up_proj`` and ``down_proj`` share memory with
    the parameters they replace.  Each replacement is proved on random tokens routed to all experts;
    a module that is not reproduced stays as it is, with a warning, and is listed by
    :func:`find_fused_experts`.

    Returns
    -------
    tuple of str
        Names of the modules that were replaced.
    """
    replaced = []
    for name in find_fused_experts(root):
        module = root.get_submodule(name)
        equivalent = _equivalent(module)
        if equivalent is None:
            logger.warning(
                "%s: fused experts of class %s stay in floating point: how they compute is not "
                "understood",
                name,
                type(module).__name__,
            )
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, equivalent)
        replaced.append(name)
    return tuple(replaced)


def find_fused_experts(root: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that hold several experts in one 3-D parameter."""
    return tuple(
        name
        for name, module in root.named_modules()
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        and name
        and "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    )


def _equivalent(module: nn.Module) -> UnfusedExperts | None:
    """Return the proved replacement of a fused experts module, or None."""
    signature = inspect.signature(module.forward)
    named = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    shapes = _shapes(named, transposed_first=getattr(module, "is_transposed", False))
    roles = _roles(list(signature.parameters))
    computes = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
    if shapes is None or roles is None or not computes:
        return None
    first, down, transposed, gated = shapes
    proof = None if named[first].is_meta else _Proof(module, roles, named[down], transposed)
    stated = not getattr(module, "is_concatenated", True)  # a gate function hides the order
    for interleaved, dense in itertools.product((stated, not stated), (False, True)):
        layout = FusedLayout(first, down, transposed, gated, interleaved, dense, roles)
        candidate = _unfuse(module, layout, signature)
        if proof is None or proof.accepts(candidate):
            return candidate
    return None


def _shapes(
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


def _roles(names: list[str]) -> tuple[str, str, str] | None:
    """Tell the states, expert numbers and routing weights apart among argument names."""
    index = [name for name in names if "ind" in name]
    weights = [name for name in names if "weight" in name or "score" in name]
    hidden = [name for name in names if "hidden" in name or name in ("x", "inputs")]
    if len(names) == 3 and len(index) == len(weights) == len(hidden) == 1:
        return hidden[0], index[0], weights[0]
    return None


def _unfuse(module: nn.Module, layout: FusedLayout, signature: inspect.Signature) -> UnfusedExperts:
    first, down = getattr(module, layout.first), getattr(module, layout.down)
    first_bias = getattr(module, f"{layout.first}_bias", None)
    down_bias = getattr(module, f"{layout.down}_bias", None)
    combine = _combine(module, layout)
    experts = []
    for number in range(first.shape[0]):
        weights = [_rows(t, number, layout.transposed) for t in (first, down)]
        biases = [None if t is None else t.detach()[number] for t in (first_bias, down_bias)]
        linears = {"up_proj": _linear(weights[0], biases[0])}
        if layout.gated:
            parts = _halves(weights[0].shape[0], layout.interleaved)
            linears = {
                name: _linear(weights[0][part], None if biases[0] is None else biases[0][part])
                for name, part in zip(("gate_proj", "up_proj"), parts, strict=True)
            }
        linears["down_proj"] = _linear(weights[1], biases[1])
        experts.append(Expert(linears, combine).train(module.training))
    return UnfusedExperts(experts, layout, signature).train(module.training)


def _rows(stacked: torch.Tensor, number: int, transposed: bool) -> torch.Tensor:
    weight = stacked.detach()[number]
    return weight.T if transposed else weight


def _halves(rows: int, interleaved: bool) -> tuple[slice, slice]:
    if interleaved:
        return slice(0, rows, 2), slice(1, rows, 2)
    return slice(0, rows // 2), slice(rows // 2, rows)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _combine(module: nn.Module, layout: FusedLayout) -> Combine:
    """Return what turns the outputs of up and gate into the input of down."""
    own: Any = getattr(type(module), "_apply_gate", None)
    if layout.gated and own is not None and own.__name__ == "_apply_gate":
        shell = copy.copy(module)
        shell._parameters = {}
        return _OwnGate(own, shell, layout.interleaved)
    return _Activation(module.act_fn)  # type: ignore[arg-type]


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


class _Proof:
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

    def accepts(self, candidate: UnfusedExperts) -> bool:
        """Tell whether the candidate gives the same output to rounding."""
        with torch.no_grad():
            found = candidate(**self.arguments).float()
        return float((found - self.expected).abs().max()) <= self.tolerance
