"""Streaming moments of one layer, taken by hooks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from slim_core.errors import CalibrationError, NumericalError
from slim_lowrank.factorize import Array
from slim_lowrank.layers import Layer
from slim_lowrank.solve import Statistics

INPUT_LIMIT = 16384
"""Widest input whose second moment is kept (2 GiB in float64); beyond it outputs are watched."""
PATCH_LIMIT = 4608
"""Same for the patches of convolutions, which are copied out: 512 channels of 3x3."""
GRADIENT_LIMIT = 8192
"""Widest output whose gradient moment is kept; beyond it only the mean square is."""
_CHUNK = 1 << 24


class Moments:
    """Streaming first and second moments of rows: sums in float64 on the host.

    Each batch is multiplied in float32 (float64 for float64 data) on its device.
    """

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``(n, width)``."""
        rows = wide(rows)
        self.rows += rows.shape[0]
        self.total += rows.sum(0, dtype=torch.float64).cpu()
        self.products += (rows.T @ rows).cpu()

    def mean(self) -> Array:
        """Return the mean ``(width,)``."""
        return (self.total / self.rows).numpy()

    def second(self) -> Array:
        """Return ``E[x x^T]``."""
        return (self.products / self.rows).numpy()


class Watch:
    """Watches one layer during forward passes.

    The first pass is a trial that only records which tensors are read and how many positions
    there are; :meth:`start` then makes room for the moments.

    Parameters
    ----------
    layer : Layer
        The layer to watch.
    gradients : bool
        Whether to collect the gradients of the outputs, too.
    halves : bool
        Whether to keep the moments of the first half of the inputs, too.
    """

    def __init__(self, layer: Layer, *, gradients: bool, halves: bool = False) -> None:
        self.layer = layer
        self.width = feature_width(layer)
        self.outputs = int(layer.shape[1] if layer.kind == "embedding" else layer.shape[0])
        self.reads_features = layer.kind in ("linear", "hf_conv1d") and self.width is not None
        self.gradients = gradients
        self.gradient_energy = 0.0
        self.gamma = Moments(self.outputs) if gradients and self.outputs <= GRADIENT_LIMIT else None
        self.moments: Moments | None = None
        self.halves = halves
        self.first_half: Tensor | None = None
        self.first_rows = 0
        self._early = 1.0
        self.leader: Watch = self
        self.trial: list[Tensor] = []
        self.batches = 0
        self.positions = (1, 1, 1)
        self._started = False
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks."""
        module = self.layer.module
        self._handles = [
            module.register_forward_pre_hook(self._on_input),
            module.register_forward_hook(self._on_output),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.trial.clear()

    def start(self) -> None:
        """End the trial."""
        self._started = True
        self.trial.clear()
        if self.leader is self:
            self.moments = Moments(self.outputs if self.width is None else self.width)
            if self.halves and self.width is not None:
                self.first_half = torch.zeros(self.width, self.width)

    def begin(self, mask: Tensor | None, early: float = 1.0) -> None:
        """Announce a batch, which of its ``(batch, length)`` positions count, and its half.

        ``early`` is the share of the positions that belong to the first half.
        """
        self._mask, self._early = mask, early
        self.batches += 1

    def statistics(self) -> Statistics:
        """Return what was seen.

        Raises
        ------
        CalibrationError
            Nothing was seen.
        NumericalError
            NaN or infinity was seen.
        """
        moments, name = self.leader.moments, self.layer.name
        if moments is None or moments.rows == 0:
            raise CalibrationError(f"the calibration data never reached layer {name!r}")
        for part in (moments, self.gamma):
            if part is not None and not bool(torch.isfinite(part.products).all()):
                raise NumericalError(f"layer {name!r} saw NaN or infinity during calibration")
        result = Statistics(moments.rows, positions=self.positions)
        if self.width is None:
            result.output_mean, result.output_second = moments.mean(), moments.second()
        else:
            result.input_mean, result.input_second = moments.mean(), moments.second()
            if 0 < self.leader.first_rows < moments.rows:
                result.first_half = self.leader.first_half
                result.first_rows = self.leader.first_rows
        result.gradient = self.gradient_energy / self.outputs / max(self.batches, 1)
        if self.gamma is not None and self.gamma.rows:
            result.gamma = self.gamma.second() * (self.gamma.rows / self.batches)
        return result

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not self._started:
            self.trial.append(x)
        elif self.width is not None and self.moments is not None:
            for rows in input_rows(self.layer, x, self._mask):
                self.moments.add(rows)
                self._add_early(rows[: int(self._early * len(rows))])

    def _add_early(self, rows: Tensor) -> None:
        if self.first_half is not None and len(rows):
            rows = wide(rows)
            self.first_half += (rows.T @ rows).float().cpu()
            self.first_rows += len(rows)

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if not self._started:
            self.positions = positions(self.layer, args[0], y)
            return None
        if self.width is None and self.moments is not None:
            self.moments.add(output_rows(self.layer, y, self._mask))
        if not self.gradients or not torch.is_grad_enabled():
            return None
        # A fresh node of the graph: the parameters take no gradients, and what follows may
        # work in place.
        fresh = y.clone() if y.requires_grad else y.detach().requires_grad_().clone()
        mask = self._mask
        fresh.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._on_gradient(gradient, mask)
        )
        return fresh

    def _on_gradient(self, gradient: Tensor, mask: Tensor | None) -> None:
        rows = flat_rows(self.layer, gradient, mask)
        self.gradient_energy += float(rows.double().square().sum())
        if self.gamma is not None:
            self.gamma.add(rows)


def feature_width(layer: Layer) -> int | None:
    """Return the width of the input rows that are kept, or None if outputs are watched."""
    if layer.kind in ("linear", "hf_conv1d"):
        return layer.shape[1] if layer.shape[1] <= INPUT_LIMIT else None
    patch = math.prod(layer.shape[1:])
    return patch if layer.kind == "conv2d" and patch <= PATCH_LIMIT else None


def input_rows(layer: Layer, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return the inputs as chunks of rows ``(n, features)``; patches for a convolution."""
    if layer.kind != "conv2d":
        return [_masked(x, mask)]
    conv: Any = layer.module
    x = x if x.dim() == 4 else x[None]
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, padding_pairs(conv), mode=mode)
        padding: Any = 0
    else:
        padding = conv.padding
    per_image = x.shape[-1] * x.shape[-2] * math.prod(layer.shape[1:])
    chunks = torch.split(x, max(1, _CHUNK // per_image))
    return [
        F.unfold(chunk, conv.kernel_size, conv.dilation, padding, conv.stride)
        .transpose(1, 2)
        .flatten(0, 1)
        for chunk in chunks
    ]


def padding_pairs(conv: Any) -> list[int]:
    """Return the padding of a convolution in the order of ``F.pad``: last dimension first."""
    pairs: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pairs += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            pairs += [0, 0]
        else:
            pairs += [conv.padding[axis]] * 2
    return pairs


def output_rows(layer: Layer, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return the outputs without bias as rows ``(n, out)``."""
    rows = flat_rows(layer, y, mask)
    bias = getattr(layer.module, "bias", None)
    return rows if bias is None else wide(rows) - wide(bias)


def flat_rows(layer: Layer, y: Tensor, mask: Tensor | None) -> Tensor:
    """Lay outputs or their gradients out as rows ``(n, out)``."""
    if layer.is_matrix:
        return _masked(y, mask)
    batched = y.dim() == len(layer.shape)
    return y.movedim(1 if batched else 0, -1).flatten(0, -2)


def positions(layer: Layer, x: Tensor, y: Tensor) -> tuple[int, int, int]:
    """Return the number of positions at the input, halfway and at the output of a pass."""
    if layer.kind == "embedding":
        return (x.numel(),) * 3
    entering, leaving = x.numel() // layer.shape[1], y.numel() // layer.shape[0]
    if layer.kind != "conv2d":
        return entering, entering, leaving
    return entering, leaving // y.shape[-1] * x.shape[-1], leaving


def wide(tensor: Tensor) -> Tensor:
    """Return a detached tensor in float32, or float64 if it is that."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask]
    return x.flatten(0, -2) if x.dim() > 1 else x[None]
