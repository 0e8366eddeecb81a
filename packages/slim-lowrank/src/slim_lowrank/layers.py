"""Find the layers of a torch model that can be decomposed, and say why others cannot.

A layer is identified by its module object: one module under several names is one layer, and
modules that share a weight are decomposed together or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slim_core.errors import StructureError
from slim_lowrank.factorize import Array

Kind = Literal[
    "linear",
    "hf_conv1d",
    "embedding",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
_CLASSES: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
COMPATIBLE_KINDS: tuple[Kind, ...] = ("linear", "embedding", "conv2d")
ALL_KINDS: tuple[Kind, ...] = (*_CLASSES.values(), "hf_conv1d")


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Parameters
    ----------
    names : tuple of str
        Every ``named_modules`` name of the module, the first being its own.
    module : Module
        The module itself.
    kind : str
        What it is.
    shape : tuple of int
        ``(out, in, *kernel)``; for an embedding ``(entries, width)``.
    skip : str or None
        Why it cannot be decomposed.
    tied : tuple of str
        First names of the other layers that hold the same weight.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: Kind
    shape: tuple[int, ...]
    skip: str | None = None
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """First name."""
        return self.names[0]

    @property
    def is_matrix(self) -> bool:
        """Whether the layer is a plain matrix product per position, or a table."""
        return self.kind in ("linear", "hf_conv1d", "embedding")


def find_layers(model: nn.Module, kinds: Iterable[Kind] = ALL_KINDS) -> dict[str, Layer]:
    """Return the layers of these kinds by first name, in the order of the model.

    Layers that cannot be decomposed are there too, with ``skip`` set.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    parents = dict(model.named_modules(remove_duplicate=False))
    wanted, layers = set(kinds), {}
    owners = _weight_owners(modules.values())
    for key, module in modules.items():
        kind = kind_of(module)
        if kind is None or kind not in wanted:
            continue
        parent = parents.get(names[key][0].rpartition(".")[0]) if names[key][0] else None
        skip = _skip_reason(module, kind, parent)
        tied: tuple[str, ...] = ()
        if skip is None:
            others = [m for m in owners[id(module.weight)] if m is not module]
            tied = tuple(names[id(other)][0] for other in others)
            skip = _tie_reason(module, others, names)
        shape = () if skip and not isinstance(module.weight, Tensor) else _shape(module, kind)
        layers[names[key][0]] = Layer(tuple(names[key]), module, kind, shape, skip, tied)
    return layers


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module, subclasses included, or None."""
    for cls, kind in _CLASSES.items():
        if isinstance(module, cls):
            return kind
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return "hf_conv1d" if conv1d is not None and isinstance(module, conv1d) else None


def oriented(kind: Kind, weight: Tensor) -> Tensor:
    """View a weight as ``(out, in, *kernel)``; an embedding stays ``(entries, width)``.

    The function is its own inverse.
    """
    if kind == "hf_conv1d":
        return weight.T
    return weight.transpose(0, 1) if kind.startswith("conv_transpose") else weight


def weight_array(layer: Layer) -> Array:
    """Return the weight as float64, oriented as ``layer.shape``.

    Raises
    ------
    StructureError
        The weight is on the meta device, so it has no values.
    """
    weight = layer.module.weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        raise StructureError(f"layer {layer.name!r} has no weight values (meta device)")
    return to_array(oriented(layer.kind, weight))


def to_array(tensor: Tensor) -> Array:
    """Return a tensor of any float dtype and device as a float64 array."""
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def _shape(module: nn.Module, kind: Kind) -> tuple[int, ...]:
    weight: Any = module.weight
    return tuple(oriented(kind, weight).shape)


def _weight_owners(modules: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _skip_reason(module: nn.Module, kind: Kind, parent: nn.Module | None) -> str | None:
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized (weight norm, adapter, ...)"
    if type(module).forward is not _base_class(module).forward:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (offloading, wrappers)"
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight directly"
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks are registered on it, which a replacement would drop"
    weight = module._parameters["weight"]
    if weight is None or not weight.is_floating_point():
        return "its weight is not floating point"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm limits whole entries, which factors cannot"
    if getattr(module, "groups", 1) != 1:
        return "a grouped convolution is block-sparse already"
    return None


def _base_class(module: nn.Module) -> type[nn.Module]:
    for cls in type(module).__mro__:
        if cls in _CLASSES or cls.__module__ == "transformers.pytorch_utils":
            return cls
    return type(module)


def _tie_reason(
    module: nn.Module, others: list[nn.Module], names: dict[int, list[str]]
) -> str | None:
    """Ties of Linear layers among themselves or with one Embedding can be kept, others not."""
    group = [module, *others]
    for other in others:
        if kind_of(other) not in ("linear", "embedding") or kind_of(module) not in (
            "linear",
            "embedding",
        ):
            return f"its weight is also used by {names[id(other)][0]!r}"
    if sum(isinstance(member, nn.Embedding) for member in group) > 1:
        return "several embeddings share its weight"
    if others and any(_skip_reason(other, "linear", None) for other in others):
        return f"its weight is shared with {names[id(others[0])][0]!r}, which is skipped"
    return None
