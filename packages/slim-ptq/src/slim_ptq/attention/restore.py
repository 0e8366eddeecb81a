"""Emulating the caches and attention that a checkpoint describes, on a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from slim_core.attention_types import AFTER_ROTARY, Params, read_attention
from slim_core.errors import FormatError, StructureError
from slim_ptq.attention.hooking import hook
from slim_ptq.attention.install import (
    attention_modules,
    install_quantizers,
    reachable_attention,
)
from slim_ptq.attention.names import saved_module_name
from slim_ptq.kv import CacheQuantizer, RotatedKeys, attach, find_cache_sources
from slim_ptq.offload import input_device
from slim_ptq.tensors import from_numpy


def restore_attention(
    model: nn.Module,
    description: Mapping[str, Any],
    load: Callable[[str], np.ndarray],
    linears: Mapping[str, str],
    rename: Callable[[str], str],
) -> None:
    """Let a model compute with the int8 caches and attention of a checkpoint, if it has some.

    Parameters
    ----------
    model : torch.nn.Module
        With its weights; its linear layers may be quantized.
    load : callable
        Returns a tensor of the checkpoint by name; raises KeyError if it is not stored.
    linears : mapping
        Names of the linear layers in the model by their names in the checkpoint.
    rename : callable
        From names in the model to names in the checkpoint.

    Raises
    ------
    FormatError
        Tensors are missing or do not fit.
    StructureError
        The model has no such layer or attention.
    """
    stored = read_attention(description, load)
    if stored.caches:
        rotated = bool(description.get("metadata", {}).get(AFTER_ROTARY))
        _restore_caches(model, stored.caches, linears, rotated=rotated)
    if stored.attentions:
        _restore_heads(model, stored.attentions, rename)


def _restore_caches(
    model: nn.Module, caches: Mapping[str, Params], linears: Mapping[str, str], *, rotated: bool
) -> None:
    """Round what goes into the caches; ``rotated`` keys after the rotary embedding."""
    fused = {owner for owner in caches if owner not in linears}
    channels = _fused_channels(model, linears) if fused else {}
    for owner, params in caches.items():
        if owner in fused:
            linear, _, part = owner.rpartition(".")
            where = channels.get((linears.get(linear, ""), part))
            if where is None:
                raise StructureError(f"the model has no {owner}, whose cache is described")
            path, width = linears[linear], len(where)
        else:
            path, part, where = linears[owner], owner.rpartition(".")[2], None
            width = _width(model.get_submodule(path))
        scale, offset = (from_numpy(array) for array in params)
        if len(scale) not in (1, width):
            raise FormatError(
                f"{owner}.kv_cache_scale must have {width} elements, not {len(scale)}"
            )
        if rotated and part == "k_proj":
            hook(model.get_submodule(_home(model, path)), RotatedKeys(scale, offset))
        else:
            attach(model.get_submodule(path), CacheQuantizer(part, scale, offset, where))


def _home(model: nn.Module, linear: str) -> str:
    """Return the name of the attention module that a linear layer belongs to."""
    for name in reachable_attention(model, [""]):
        if linear.startswith(f"{name}."):
            return name
    raise StructureError(
        f"{linear} is in no attention module, and the cache of its keys is rotated"
    )


def _fused_channels(
    model: nn.Module, linears: Mapping[str, str]
) -> dict[tuple[str, str], torch.Tensor | None]:
    """Return the channels of keys and values of every fused layer, from a run on four tokens."""
    ids = torch.arange(4, device=input_device(model))[None]
    found = find_cache_sources(model, linears.values(), lambda: model(ids))
    return {(source.linear, source.part): source.channels for source in found}


def _restore_heads(
    model: nn.Module,
    attentions: Mapping[str, Mapping[str, Params]],
    rename: Callable[[str], str],
) -> None:
    modules = attention_modules(model, [""])
    names = {path: saved_module_name(model, path, rename) for path in modules}
    unknown = attentions.keys() - set(names.values())
    if unknown:
        raise StructureError(f"the model has no attention {min(unknown)}, which is described")
    others = [path for path, name in names.items() if name not in attentions]
    paths = reachable_attention(model, [""], others)
    for path, quantizer in install_quantizers(model, paths).items():
        scales = {
            part.removeprefix("fa_"): from_numpy(scale)
            for part, (scale, _) in attentions[names[path]].items()
        }
        quantizer.emulate(scales)


def _width(linear: nn.Module) -> int:
    """Return the number of output channels of a linear layer, quantized or not."""
    width = getattr(linear, "out_features", None) or getattr(linear, "nf", None)
    assert isinstance(width, int)  # nn.Linear, FakeQuantLinear and Conv1D have one of them
    return width
