"""Turn decomposed layers back into dense ones."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim_lowrank import conv_forms
from slim_lowrank.build import type_of_conv
from slim_lowrank.factorize import Array
from slim_lowrank.layers import to_array
from slim_lowrank.modules import (
    FactoredConv,
    FactoredEmbedding,
    FactoredHFConv1D,
    FactoredLinear,
    PivotLinear,
    TiedLinear,
)
from slim_lowrank.surgery import replace

_DECOMPOSED = (FactoredLinear, FactoredEmbedding, FactoredConv, TiedLinear, PivotLinear)


def merge(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the model with every decomposed layer multiplied out.

    The outputs stay the same up to rounding; shared modules stay shared and ties tied.

    Parameters
    ----------
    model : Module
        With layers that this package made.
    inplace : bool
        Change the model itself instead of a copy.
    """
    model = model if inplace else copy.deepcopy(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _DECOMPOSED):
            names.setdefault(module, []).append(name)
    weights: dict[int, nn.Parameter] = {}
    for module in sorted(names, key=lambda each: isinstance(each, TiedLinear)):
        model = replace(model, tuple(names[module]), dense_module(module, weights))
    return model


@torch.no_grad()
def dense_module(module: nn.Module, weights: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """Return the dense layer that a decomposed module stands for.

    Parameters
    ----------
    module : Module
        One of :mod:`slim_lowrank.modules`.
    weights : dict, optional
        Dense weights made so far by the id of the largest factor, so that ties survive.
    """
    if isinstance(module, FactoredConv):
        return _dense_conv(module)
    parts: list[Any] = list(module.children())
    last: Any = module.rest if isinstance(module, PivotLinear) else parts[-1]
    key = id(parts[0].weight if isinstance(module, FactoredEmbedding) else last.weight)
    known = {} if weights is None else weights
    if key not in known:
        known[key] = _product(module, last.weight)
    weight = known[key]
    dense: nn.Module
    if isinstance(module, FactoredEmbedding):
        table = cast(nn.Embedding, module[0])
        dense = nn.Embedding(
            weight.shape[0],
            weight.shape[1],
            padding_idx=table.padding_idx,
            scale_grad_by_freq=table.scale_grad_by_freq,
            sparse=table.sparse,
            _weight=weight,
        )
        dense.weight = weight
        return dense.train(module.training)
    if isinstance(module, FactoredHFConv1D):
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(1, 1)  # type: ignore[no-untyped-call]
        dense.nf, dense.nx = weight.shape
        dense.weight = nn.Parameter(weight.T.contiguous(), requires_grad=weight.requires_grad)
    else:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = weight
    dense.bias = cast(Any, module).bias
    return dense.train(module.training)


def _product(module: nn.Module, like: nn.Parameter) -> nn.Parameter:
    """Multiply the factors in float64 and round once."""
    if isinstance(module, PivotLinear):
        pivot = module.pivot.weight.double()
        product = torch.cat([pivot, module.rest.weight.double() @ pivot])[module.order]
    elif isinstance(module, FactoredEmbedding):
        product = _double(module[0]) @ _double(module[1]).T
    elif isinstance(module, TiedLinear):
        product = _double(module[1]) @ _double(module[0]).T
    else:
        first, last = cast(nn.Sequential, module).children()
        product = _double(last) @ _double(first)
    return nn.Parameter(product.to(like.dtype), requires_grad=like.requires_grad)


def _double(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).double()


def _dense_conv(module: FactoredConv) -> nn.Module:
    parts: list[Any] = list(module.children())
    kernels = [_oriented(part) for part in parts]
    form = _form(parts)
    weight, source, last = conv_forms.compose(form, kernels), _kernel_part(form, parts), parts[-1]
    geometry: dict[str, Any] = {
        name: getattr(source, name)
        for name in ("kernel_size", "stride", "padding", "padding_mode", "dilation")
    }
    if form == "spatial":
        geometry |= {
            name: tuple(getattr(part, name)[axis] for axis, part in enumerate(parts))
            for name in ("kernel_size", "stride", "dilation")
        }
        if not isinstance(source.padding, str):
            geometry["padding"] = (parts[0].padding[0], parts[1].padding[1])
    transposed = isinstance(source, nn.modules.conv._ConvTransposeNd)
    if transposed:
        geometry["output_padding"] = source.output_padding
    cls: type[Any] = type_of_conv(source) if transposed else type(source)
    dense = cls(
        weight.shape[1],
        weight.shape[0],
        bias=last.bias is not None,
        device=last.weight.device,
        dtype=last.weight.dtype,
        **geometry,
    )
    value = torch.from_numpy(weight)
    dense.weight.copy_(value.transpose(0, 1) if transposed else value)
    dense.weight.requires_grad_(last.weight.requires_grad)
    if last.bias is not None:
        dense.bias = last.bias
    return cast(nn.Module, dense.train(module.training))


def _oriented(part: Any) -> Array:
    weight = to_array(part.weight)
    return weight.swapaxes(0, 1) if isinstance(part, nn.modules.conv._ConvTransposeNd) else weight


def _form(parts: list[Any]) -> str:
    if len(parts) == 3:
        return "tucker2"
    first, last = (part.kernel_size for part in parts)
    if max(last) == 1:
        return "out"
    return "in" if max(first) == 1 else "spatial"


def _kernel_part(form: str, parts: list[Any]) -> Any:
    return parts[{"tucker2": 1, "in": 1}.get(form, 0)]
