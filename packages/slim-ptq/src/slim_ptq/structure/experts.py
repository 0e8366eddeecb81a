"""Experts that are fused into 3-D parameters, made into linear layers.

transformers 5 keeps the experts of a layer in two parameters ``gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]`` (or their transposes); engines and checkpoints want one linear layer an
expert.  Which layout, order of gate and up, and form of routing weights a module uses is read
from its shapes and then proved: the replacement must compute the same as the original.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import nn

from slim_core.logging import get_logger
from slim_ptq.structure.fused import (
    Combine,
    FusedLayout,
    Proof,
    argument_roles,
    gate_function,
    weight_shapes,
)

logger = get_logger("ptq.structure")


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

    def fused(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights and biases in the layout of the module that was replaced."""
        layout = self.layout
        first = ["gate_proj", "up_proj"] if layout.gated else ["up_proj"]
        out = {}
        for name, linears in ((layout.first, first), (layout.down, ["down_proj"])):
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                if getattr(self[0].get_submodule(linears[0]), kind) is not None:
                    rows = [self._joined(expert, linears, kind) for expert in self]
                    stacked = torch.stack(rows)
                    swap = layout.transposed and kind == "weight"
                    out[name + suffix] = stacked.mT.contiguous() if swap else stacked
        return out

    def _joined(self, expert: nn.Module, linears: list[str], kind: str) -> torch.Tensor:
        parts = [expert.get_parameter(f"{linear}.{kind}").detach() for linear in linears]
        if self.layout.interleaved and len(parts) > 1:
            return torch.stack(parts, dim=1).flatten(0, 1)
        return torch.cat(parts)

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


def fused_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model as it would be without :func:`unfuse_experts`."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            state = {n: t for n, t in state.items() if not n.startswith(f"{path}.")}
            state.update({f"{path}.{name}": tensor for name, tensor in module.fused().items()})
    return state


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
    shapes = weight_shapes(named, transposed_first=getattr(module, "is_transposed", False))
    roles = argument_roles(list(signature.parameters))
    if shapes is None or roles is None:
        return None
    first, down, transposed, gated = shapes
    proof = None if named[first].is_meta else Proof(module, roles, named[down], transposed)
    stated = not getattr(module, "is_concatenated", True)  # a gate function hides the order
    for interleaved, dense in itertools.product((stated, not stated), (False, True)):
        layout = FusedLayout(first, down, transposed, gated, interleaved, dense, roles)
        combine = gate_function(module, layout)
        if combine is None:
            return None
        candidate = UnfusedExperts(_experts(module, layout, combine), layout, signature)
        candidate.train(module.training)
        if proof is None or proof.accepts(candidate):
            return candidate
    return None


def _experts(module: nn.Module, layout: FusedLayout, combine: Combine) -> list[Expert]:
    """Return linear layers over the memory of a fused module's weights."""
    first, down = getattr(module, layout.first), getattr(module, layout.down)
    first_bias = getattr(module, f"{layout.first}_bias", None)
    down_bias = getattr(module, f"{layout.down}_bias", None)
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
        experts.append(Expert(linears, combine))
    return experts


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
