"""The linear layers of a model, without the routers of its mixtures of experts.

Routers and gates are small, decisive, and never quantized.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from slim_ptq.structure.linears import is_linear


def find_linears(root: nn.Module, *, routers: bool = False) -> dict[str, nn.Module]:
    """Return the linear layers below ``root`` by dotted name, in order of registration.

    Parameters
    ----------
    root : nn.Module
        A model, a decoder block, or any part of one.
    routers : bool
        Also return the routers and gates of mixtures of experts, which are never quantized.
    """
    left_out = frozenset() if routers else find_routers(root)
    return {
        name: module
        for name, module in root.named_modules()
        if is_linear(module) and name not in left_out
    }


def find_routers(root: nn.Module) -> frozenset[str]:
    """Return the names of the modules below ``root`` that choose or weigh experts.

    A router stands beside a list (or fused module) of ``E`` experts and has a weight ``[E, in]``;
    the gate of a shared expert has ``[1, in]``.  A linear layer below a module called ``router`` is
    one too, however the experts are kept.
    """
    routers = {n for n, m in root.named_modules() if is_linear(m) and "router" in n.split(".")}
    for name, module in root.named_modules():
        count = _expert_count(module)
        if count is not None:
            for child_name, child in module.named_children():
                prefix = f"{name}.{child_name}" if name else child_name
                routers.update(_routers_in(prefix, child, count))
    return frozenset(routers)


def is_router(name: str, root: nn.Module) -> bool:
    """Tell whether the module ``name`` of ``root`` chooses or weighs experts."""
    return name in find_routers(root)


def _expert_count(module: nn.Module) -> int | None:
    """Return the number of experts that ``module`` directly holds, or None."""
    for name, child in module.named_children():
        if "expert" in f"{name} {type(child).__name__}".lower():
            if isinstance(child, nn.ModuleList) and len(child) and not is_linear(child[0]):
                return len(child)
            stacked = [p.shape[0] for p in child.parameters() if p.ndim == 3]
            if stacked:
                return int(stacked[0])
    return None


def _routers_in(prefix: str, child: nn.Module, count: int) -> Iterator[str]:
    """Yield the holders of a 2-D weight with ``count`` or 1 rows, if they stand alone."""
    weighted = [
        (f"{prefix}.{name}" if name else prefix, module)
        for name, module in child.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]
    if len(weighted) == 1 and weighted[0][1].weight.shape[0] in (1, count):
        yield weighted[0][0]
