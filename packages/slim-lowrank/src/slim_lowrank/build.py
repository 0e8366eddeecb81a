"""Build the modules of a decomposed layer, on the device and in the dtype of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from slim_lowrank.factorize import Array
from slim_lowrank.layers import Layer
from slim_lowrank.modules import (
    FactoredConv,
    FactoredEmbedding,
    FactoredHFConv1D,
    FactoredLinear,
    PivotLinear,
)
from slim_lowrank.table import LayerRanks

_CONVS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Factors:
    """Weights of a decomposed layer.

    Parameters
    ----------
    weights : tuple of array
        In the order of application, each ``(out, in, *kernel)``; for an embedding the table
        ``(entries, r)``, then ``(width, r)``; for a pivot layer the pivot rows ``(r, in)``, then
        the combinations ``(out - r, r)``.
    bias : array or None
        Bias of the last factor, ``(out,)``.
    order : array or None
        For a pivot layer: ``[pivot; rest][order]`` are the outputs in their own order.
    error : float or None
        Predicted relative error of the outputs, of the weight itself where there was no data.
    """

    weights: tuple[Array, ...]
    bias: Array | None = None
    order: Array | None = None
    error: float | None = None


def build(layer: Layer, ranks: LayerRanks) -> nn.Module:
    """Return the decomposed module with the framework's default initialisation.

    Device, dtype, ``requires_grad`` and the training flag are those of the layer.
    """
    source = layer.module
    weight = cast(Tensor, source.weight)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    module: nn.Module
    if ranks.form == "pivot":
        out, inp = ranks.shape
        module = PivotLinear(inp, out, ranks.ranks[0], bias=ranks.bias, **place)
    elif layer.kind == "embedding":
        module = _build_embedding(cast(nn.Embedding, source), ranks, place)
    elif layer.is_matrix:
        (rank,), (out, inp) = ranks.ranks, ranks.shape
        cls = FactoredHFConv1D if layer.kind == "hf_conv1d" else FactoredLinear
        module = cls(
            nn.Linear(inp, rank, bias=False, **place),
            nn.Linear(rank, out, bias=ranks.bias, **place),
        )
    else:
        module = FactoredConv(*_conv_chain(source, ranks, place))
    return Flags.of(source).put_on(module)


@dataclass(frozen=True)
class Flags:
    """Whether a layer trains: its mode, and which of its parameters take gradients."""

    training: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, source: nn.Module) -> Flags:
        """Return the flags of a dense layer."""
        weight, bias = cast(Tensor, source.weight), getattr(source, "bias", None)
        wanted = weight.requires_grad if bias is None else bias.requires_grad
        return cls(source.training, weight.requires_grad, wanted)

    def put_on(self, module: nn.Module) -> nn.Module:
        """Set them on what stands in for the layer."""
        module.requires_grad_(self.weight)
        if not isinstance(module, FactoredEmbedding) and _last_bias(module) is not None:
            _last_bias(module).requires_grad_(self.bias)
        return module.train(self.training)


@torch.no_grad()
def fill(module: nn.Module, factors: Factors) -> None:
    """Copy weights into a module made by :func:`build`, rounding to its dtype."""
    if isinstance(module, PivotLinear):
        parts: list[Any] = [module.pivot, module.rest]
        if factors.order is not None:
            module.order.copy_(torch.from_numpy(factors.order))
    else:
        parts = list(module.children())
    for part, weight in zip(parts, factors.weights, strict=True):
        value = torch.from_numpy(np.ascontiguousarray(weight))
        if isinstance(part, nn.modules.conv._ConvTransposeNd):
            value = value.transpose(0, 1)
        part.weight.copy_(value)
    if factors.bias is not None:
        _last_bias(module).copy_(torch.from_numpy(factors.bias))


def source_bias(layer: Layer) -> Tensor | None:
    """Return the bias of a layer, None for embeddings."""
    return cast("Tensor | None", getattr(layer.module, "bias", None))


def _last_bias(module: nn.Module) -> Tensor:
    owner = module if isinstance(module, PivotLinear) else list(module.children())[-1]
    return cast(Tensor, owner.bias)


def _build_embedding(
    source: nn.Embedding, ranks: LayerRanks, place: dict[str, Any]
) -> FactoredEmbedding:
    (rank,), (entries, width) = ranks.ranks, ranks.shape
    table = nn.Embedding(
        entries,
        rank,
        padding_idx=source.padding_idx,
        scale_grad_by_freq=source.scale_grad_by_freq,
        sparse=source.sparse,
        **place,
    )
    return FactoredEmbedding(table, nn.Linear(rank, width, bias=False, **place))


def _conv_chain(source: Any, ranks: LayerRanks, place: dict[str, Any]) -> list[nn.Module]:
    """Return the convolutions; the one with the kernel carries stride, padding and dilation."""
    out, inp, *kernel = ranks.shape
    dims = len(kernel)
    pointwise = _CONVS[dims]
    if ranks.form == "spatial":
        return _spatial_chain(source, ranks, place)
    geometry: dict[str, Any] = {
        name: getattr(source, name)
        for name in ("kernel_size", "stride", "padding", "padding_mode", "dilation")
    }
    if isinstance(source, nn.modules.conv._ConvTransposeNd):
        geometry["output_padding"] = source.output_padding
    transposed = isinstance(source, nn.modules.conv._ConvTransposeNd)
    full = type_of_conv(source) if transposed else pointwise
    if ranks.form == "out":
        (rank,) = ranks.ranks
        return [
            full(inp, rank, bias=False, **geometry, **place),
            pointwise(rank, out, 1, bias=ranks.bias, **place),
        ]
    if ranks.form == "in":
        (rank,) = ranks.ranks
        return [
            pointwise(inp, rank, 1, bias=False, **place),
            full(rank, out, bias=ranks.bias, **geometry, **place),
        ]
    rank_out, rank_in = ranks.ranks
    return [
        pointwise(inp, rank_in, 1, bias=False, **place),
        full(rank_in, rank_out, bias=False, **geometry, **place),
        pointwise(rank_out, out, 1, bias=ranks.bias, **place),
    ]


def type_of_conv(source: nn.Module) -> type[Any]:
    """Return the class of torch.nn that a transposed convolution derives from."""
    classes = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return next(cls for cls in classes if isinstance(source, cls))


def _spatial_chain(source: Any, ranks: LayerRanks, place: dict[str, Any]) -> list[nn.Module]:
    (rank,), (out, inp, height, width) = ranks.ranks, ranks.shape
    padding = source.padding
    vertical = padding if isinstance(padding, str) else (padding[0], 0)
    horizontal = padding if isinstance(padding, str) else (0, padding[1])
    mode = source.padding_mode
    return [
        nn.Conv2d(
            inp,
            rank,
            (height, 1),
            (source.stride[0], 1),
            vertical,
            (source.dilation[0], 1),
            bias=False,
            padding_mode=mode,
            **place,
        ),
        nn.Conv2d(
            rank,
            out,
            (1, width),
            (1, source.stride[1]),
            horizontal,
            (1, source.dilation[1]),
            bias=ranks.bias,
            padding_mode=mode,
            **place,
        ),
    ]
