"""Layers that are quantized as one slice of their input channels for each device.

MindIE reads them in the ``safe_tensor`` layout: ``<layer>.tp_list.<i>.*`` are the tensors of slice
``i``, those of a W8A8 layer of its own, whose bias only the first one has; ``<layer>.weight`` int8,
shape (out, in), are the codes of all slices side by side.  What devices exchange is int8 too, one
scale for each output channel, float32, shape (out,): ``<layer>.reduce_scale.<i>`` that of the
products of slice ``i``, or one ``<layer>.reduce_scale`` for all of them, and
``<layer>.gather_scale`` that of their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from slim_core.dtypes import INT8
from slim_core.errors import FormatError
from slim_core.layers import QuantizedLinear
from slim_core.scheme import Granularity, QuantScheme, TensorScheme

TYPE = "W8A8"
REDUCE, GATHER = "reduce_scale", "gather_scale"
COMMUNICATION_KEYS = {"reduce_quant_type": "per_channel"}  # of the description
_LIST = ".tp_list."


def slice_name(layer: str, index: int) -> str:
    """Return the name of a slice of a layer."""
    return f"{layer}{_LIST}{index}"


def layer_of(name: str) -> str:
    """Return the name of the layer that a slice belongs to; that of any other layer as it is."""
    return name.partition(_LIST)[0]


def count_slices(names: Iterable[str]) -> dict[str, int]:
    """Return the number of slices of each layer that has some.

    Raises
    ------
    FormatError
        The slices of a layer are not numbered from 0 on.
    """
    found: dict[str, set[str]] = {}
    for name in names:
        layer, mark, index = name.partition(_LIST)
        if mark:
            found.setdefault(layer, set()).add(index)
    for layer, indices in found.items():
        if indices != {str(index) for index in range(len(indices))}:
            listed = ", ".join(sorted(indices))
            raise FormatError(f"the slices of {layer} must be numbered from 0 on, not {listed}")
    return {layer: len(indices) for layer, indices in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class SlicedLinear:
    """A layer as its slices, and the scales of what devices exchange.

    Parameters
    ----------
    name : str
    slices : tuple of QuantizedLinear
        In the order of their input channels, equally many each.
    reduce_scale : array or None
        float32, shape (slices, out), or (1, out) for all of them; None if nothing is rounded.
    gather_scale : array or None
        float32, shape (out,).
    """

    name: str
    slices: tuple[QuantizedLinear, ...]
    reduce_scale: np.ndarray | None = None
    gather_scale: np.ndarray | None = None

    def joined(self) -> QuantizedLinear:
        """Return one layer, of weights in as many groups as there are slices."""
        first = self.slices[0]
        rows, columns = first.codes.shape
        scheme = TensorScheme(INT8, Granularity.PER_GROUP, True, columns)
        scales, offsets = (
            np.concatenate(
                [np.broadcast_to(part.reshape(-1, 1), (rows, 1)) for part in parts], axis=1
            )
            for parts in (
                [layer.weight_scale for layer in self.slices],
                [layer.weight_offset for layer in self.slices],
            )
        )
        return replace(
            first,
            name=self.name,
            scheme=QuantScheme(scheme, None),
            codes=np.concatenate([layer.codes for layer in self.slices], axis=1),
            weight_scale=scales,
            weight_offset=offsets,
            input_scale=None,
            input_offset=None,
        )


def read_sliced(
    name: str,
    slices: tuple[QuantizedLinear, ...],
    stored: Iterable[str],
    load: Callable[[str], np.ndarray],
) -> SlicedLinear:
    """Return a layer from its slices and its other tensors.

    Parameters
    ----------
    stored : iterable of str
        Names of the tensors of the checkpoint.
    load : callable
        Returns one of them.

    Raises
    ------
    FormatError
        The slices do not fit one another, the weight is not theirs, or the scales are missing, of
        another shape, or not positive.
    """
    shapes = {layer.codes.shape for layer in slices}
    if len(shapes) > 1:
        raise FormatError(f"the slices of {name} differ in shape: {sorted(shapes)}")
    if any(layer.bias is not None for layer in slices[1:]):
        raise FormatError(f"only the first slice of {name} can have a bias")
    weight = np.concatenate([layer.codes for layer in slices], axis=1)
    if not np.array_equal(load(f"{name}.weight"), weight):
        raise FormatError(f"{name}.weight is not that of its slices side by side")
    known = set(stored)
    shared, gather = f"{name}.{REDUCE}", f"{name}.{GATHER}"
    own = [f"{shared}.{index}" for index in range(len(slices))]
    wanted = [shared] if shared in known else own
    if gather not in known and not known.intersection([shared, *own]):
        return SlicedLinear(name, slices)
    rows = weight.shape[0]
    scales = []
    for tensor in (*wanted, gather):
        if tensor not in known:
            raise FormatError(f"{tensor} is not stored, and other scales of the layer are")
        scale = load(tensor)
        if scale.dtype != np.float32 or scale.shape != (rows,):
            raise FormatError(
                f"{tensor} must be float32 of shape {(rows,)}, not {scale.dtype} of {scale.shape}"
            )
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise FormatError(f"{tensor} has elements that are not positive and finite")
        scales.append(scale)
    return SlicedLinear(name, slices, np.stack(scales[:-1]), scales[-1])
