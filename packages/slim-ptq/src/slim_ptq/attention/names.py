"""Names of attention tensors in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from slim_core.attention_types import C8, FA_QUANT
from slim_ptq.attention.fa_quantizer import STATES, FAQuantizer, Mode
from slim_ptq.kv import CacheQuantizer

Named = tuple[str, torch.Tensor, str]


def saved_module_name(root: nn.Module, path: str, rename: Callable[[str], str]) -> str:
    """Return the name in the checkpoint of a module that holds linear layers.

    Parameters
    ----------
    rename : callable
        From names below ``root`` to names in the checkpoint.
    """
    for local, child in root.get_submodule(path).named_modules():
        if hasattr(child, "weight"):
            inside = f".{local}.weight"
            name = rename(f"{path}{inside}")
            if name.endswith(inside):
                return name.removesuffix(inside)
    return path


def cache_tensors(linear: str, quantizer: CacheQuantizer) -> Iterator[Named]:
    """Yield name, tensor and type of what is stored of a cache.

    Parameters
    ----------
    linear : str
        Name of the linear layer in the checkpoint.
    """
    scale, offset = quantizer.tensor_names(linear)
    yield scale, quantizer.scale, C8
    yield offset, quantizer.offset, C8


def head_tensors(attention: str, quantizer: FAQuantizer) -> Iterator[Named]:
    """Yield name, tensor and type of what is stored of a quantized attention, if it is one.

    Parameters
    ----------
    attention : str
        Name of the attention module in the checkpoint.
    """
    if quantizer.mode is Mode.EMULATE:
        for part in STATES:
            yield from head_params(attention, part, quantizer.scale(part))


def head_params(attention: str, part: str, scale: torch.Tensor) -> Iterator[Named]:
    """Yield name, tensor and type of the scale and the offset of ``q``, ``k`` or ``v``."""
    offset = torch.zeros(scale.shape, dtype=torch.int8)
    yield f"{attention}.fa_{part}.scale", scale, FA_QUANT
    yield f"{attention}.fa_{part}.offset", offset, FA_QUANT


def attention_tensors(model: nn.Module, rename: Callable[[str], str]) -> Iterator[Named]:
    """Yield what is stored of every cache and attention of a model that is quantized.

    Parameters
    ----------
    rename : callable
        From names in the model to names in the checkpoint.
    """
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(module, CacheQuantizer):
            yield from cache_tensors(rename(f"{parent}.weight").removesuffix(".weight"), module)
        elif isinstance(module, FAQuantizer):
            yield from head_tensors(saved_module_name(model, parent, rename), module)
