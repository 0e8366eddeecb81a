"""Row-parallel layers as they will run on several devices (``QuantConfig.simulate_tp``).

Each device holds a slice of the input channels, with scales of its own, and the devices exchange
their products as int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from slim_core.dtypes import INT8
from slim_core.errors import InvalidValueError, StructureError
from slim_core.numerics import affine_params
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_core.tensor_parallel import (
    GATHER,
    REDUCE,
    TYPE,
    SlicedLinear,
    layer_of,
)
from slim_ptq.calibration.samples import Sample, feed
from slim_ptq.emulate import through_int8
from slim_ptq.modules import FakeQuantLinear, as_torch, on_device
from slim_ptq.structure import weight_of
from slim_ptq.tensors import from_numpy

# By what engines call the layers whose products they add up over devices.
ROW_PARALLEL = frozenset(
    ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "wo", "w2", "fc2")
)
_CHANNELS = TensorScheme(INT8, Granularity.PER_CHANNEL, True)

Watch = Callable[[Sequence[torch.Tensor], torch.Tensor], None]


class ParallelLinear(nn.Module):
    """Adds up the products of slices of the input channels.

    Parameters
    ----------
    slices : sequence of nn.Module
        Layers of equally many input channels.
    reduce_scale : torch.Tensor, optional
        float32, shape (slices, out) or (1, out): the products of each slice are rounded to int8.
    gather_scale : torch.Tensor, optional
        float32, shape (out,): their sum is.

    Attributes
    ----------
    watch : callable or None
        Is given the products and their sum, each shape (..., out), as they are handed on.
    """

    reduce_scale: torch.Tensor | None
    gather_scale: torch.Tensor | None

    def __init__(
        self,
        slices: Sequence[nn.Module],
        reduce_scale: torch.Tensor | None = None,
        gather_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tp_list = nn.ModuleList(slices)
        self.watch: Watch | None = None
        self.register_buffer(REDUCE, reduce_scale, persistent=False)
        self.register_buffer(GATHER, gather_scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum for ``x`` of shape (..., in)."""
        inputs = x.chunk(len(self.tp_list), dim=-1)
        parts = [layer(part) for layer, part in zip(self.tp_list, inputs, strict=True)]
        if self.reduce_scale is not None:
            scales = self.reduce_scale.expand(len(parts), -1)
            parts = [through_int8(part, scale) for part, scale in zip(parts, scales, strict=True)]
        total = torch.stack(parts).sum(0)
        if self.gather_scale is not None:
            total = through_int8(total, self.gather_scale)
        if self.watch is not None:
            self.watch(parts, total)
        return total


def sliced_layers(
    linears: Mapping[str, nn.Module], schemes: Mapping[str, QuantScheme], devices: int | None
) -> frozenset[str]:
    """Return the names of the layers that so many devices hold as slices; none for None.

    Raises
    ------
    InvalidValueError
        The number does not divide the input channels of such a layer.
    StructureError
        There is no such layer.
    """
    if devices is None:
        return frozenset()
    found = [
        name
        for name, scheme in schemes.items()
        if scheme.is_static and name.rpartition(".")[2] in ROW_PARALLEL
    ]
    if not found:
        raise StructureError(
            "tp_size: the model has no W8A8 layer that devices share by input channels; known "
            f"names are {', '.join(sorted(ROW_PARALLEL))}"
        )
    for name in found:
        columns = weight_of(linears[name]).shape[1]
        if columns % devices:
            raise InvalidValueError(
                f"tp_size {devices} does not divide the {columns} input channels of {name}"
            )
    return frozenset(found)


def restored(stored: SlicedLinear, device: torch.device, dtype: torch.dtype) -> ParallelLinear:
    """Return the layer of a checkpoint on a device; see :class:`FakeQuantLinear`."""
    scales = [
        None if scale is None else from_numpy(scale).to(device)
        for scale in (stored.reduce_scale, stored.gather_scale)
    ]
    slices = [FakeQuantLinear(on_device(as_torch(s), device), dtype) for s in stored.slices]
    return ParallelLinear(slices, *scales)


def parallel_tensors(
    model: nn.Module, rename: Callable[[str], str]
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Yield name, tensor and type of what is stored of each layer beside its slices.

    Parameters
    ----------
    rename : callable
        From names in the model to names in the checkpoint.
    """
    for path, module in model.named_modules():
        if not isinstance(module, ParallelLinear):
            continue
        name = rename(f"{path}.weight").removesuffix(".weight")
        codes = [layer.get_buffer("codes") for layer in module.tp_list]
        yield f"{name}.weight", torch.cat(codes, dim=1), TYPE
        if module.reduce_scale is None or module.gather_scale is None:
            continue
        if len(module.reduce_scale) == 1:
            yield f"{name}.{REDUCE}", module.reduce_scale[0], TYPE
        else:
            for index, scale in enumerate(module.reduce_scale):
                yield f"{name}.{REDUCE}.{index}", scale, TYPE
        yield f"{name}.{GATHER}", module.gather_scale, TYPE


def saved_linear(path: str, rename: Callable[[str], str]) -> str:
    """Return the name in the checkpoint of a linear layer or of a slice of one."""
    owner = layer_of(path)
    return rename(f"{owner}.weight").removesuffix(".weight") + path.removeprefix(owner)


def measure_communication(model: nn.Module, samples: Sequence[Sample], *, per_device: bool) -> None:
    """Find the scales of what devices exchange, on all samples, and round with them from now on.

    First those of the products, ``max|product| / 127`` of each output channel, then those of the
    sums of the rounded products.

    Parameters
    ----------
    per_device : bool
        Whether the products of each slice have scales of their own.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ParallelLinear)}
    for which in (REDUCE, GATHER):
        peaks = {name: _Peaks() for name in layers}
        for name, layer in layers.items():
            layer.watch = peaks[name].update
        try:
            for _ in feed(model, samples, "Measuring communication"):
                pass
        finally:
            for layer in layers.values():
                layer.watch = None
        for name, layer in layers.items():
            found = peaks[name].sums if which == GATHER else peaks[name].parts
            if which == REDUCE and not per_device:
                found = found.amax(0, keepdim=True)
            setattr(layer, which, affine_params(-found, found, _CHANNELS)[0])


class _Peaks:
    """Largest magnitudes of products, (slices, out), and of sums, (out,)."""

    parts = torch.zeros(())
    sums = torch.zeros(())

    def update(self, parts: Sequence[torch.Tensor], total: torch.Tensor) -> None:
        self.parts = torch.maximum(self.parts.to(total.device), _peak(torch.stack(list(parts)), 1))
        self.sums = torch.maximum(self.sums.to(total.device), _peak(total[None], 1)[0])


def _peak(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the largest magnitudes over all axes but the first ``kept`` and the last."""
    flat = values.detach().float().abs().flatten(kept, -2)
    return flat.amax(dim=kept)
