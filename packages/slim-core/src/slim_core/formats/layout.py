"""Which tensors the Ascend layouts store for a layer: names, dtypes and shapes.

``packed`` tells the two layouts apart: ``ascend_v1`` puts two 4-bit codes of W4A16 and W4A8 into a
byte, ``safe_tensor`` one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from slim_core.groups import is_row_parallel
from slim_core.kronecker import kronecker_pair
from slim_core.scheme import Granularity, QuantScheme, ScaleKind, TensorScheme, Variant
from slim_core.tables import FP4, FP8, NF4
from slim_core.two_stage import SECOND_SCALE

Shape = tuple[int, ...]

TP_SLICES = 16  # into which scale_bias of a row-parallel layer is split, so that devices divide it

_F32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a stored tensor."""

    dtype: np.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def packed_axis(scheme: QuantScheme, groups: int, *, packed: bool) -> int | None:
    """Return along which axis pairs of integer codes share a byte, None if they do not.

    Parameters
    ----------
    groups : int
        Scales in a row: readers take W4A16 with one for per-channel weights.
    """
    kind = scheme.ascend_type
    if not packed or kind not in ("W4A16", "W4A8_DYNAMIC"):
        return None
    return -1 if kind == "W4A16" and groups == 1 else -2


def groups_in_row(scheme: QuantScheme, columns: int) -> int:
    """Return the number of scales in a row of a weight of so many input channels."""
    return columns // scheme.group_size if scheme.group_size else 1


def layout_problem(scheme: QuantScheme, shape: tuple[int, int], *, packed: bool) -> str | None:
    """Return why a weight of this shape cannot be stored, None if it can."""
    rows, columns = shape
    kind = scheme.ascend_type
    size = scheme.group_size
    if size and columns % size:
        return f"group size {size} does not divide its {columns} input channels"
    groups = groups_in_row(scheme, columns)
    axis = packed_axis(scheme, groups, packed=packed)
    if axis is not None and shape[axis] % 2:
        which = "output" if axis == -2 else "input"
        return f"pairs of its {shape[axis]} {which} channels share a byte, and the number is odd"
    if packed and kind == "W4A8_DYNAMIC" and columns % TP_SLICES:
        return f"its {columns} input channels are no multiple of {TP_SLICES}, as scale_bias needs"
    if kind.startswith("W4A4_") and columns % 8:
        return f"engines pack 8 codes in a word, and its {columns} input channels do not divide"
    if kind == "NF4":
        return _block_problem(scheme, rows * columns)
    if "MXFP" in kind and groups % 2:
        return f"engines read scales in pairs, and it has {groups} groups in a row"
    return None


def layer_layout(
    name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str, *, packed: bool
) -> dict[str, TensorSpec]:
    """Return what is stored for a layer, by local names, without its float bias.

    Parameters
    ----------
    name : str
        Of the layer: row-parallel layers split their ``scale_bias``.
    shape : tuple of int
        (out, in); must have no :func:`layout_problem`.
    """
    rows, columns = shape
    weight = scheme.weight
    assert weight is not None  # narrowing: float layers have no layout of their own
    specs = {"weight": _codes(scheme, weight, shape, packed)}
    specs |= _scales(scheme, weight, shape, packed)
    if packed and scheme.ascend_type == "W4A8_DYNAMIC":
        specs["scale_bias"] = TensorSpec(_F32, (rows, TP_SLICES if is_row_parallel(name) else 1))
    if scheme.variant is Variant.FLATQUANT:
        left, right = kronecker_pair(columns)
        specs["left_trans"] = TensorSpec(_F32, (left, left))
        specs["right_trans"] = TensorSpec(_F32, (right, right))
        specs["clip_ratio"] = TensorSpec(_F32, (1,))
    if scheme.is_static:
        folded = (1,) if weight.granularity is Granularity.PER_TENSOR else (rows,)
        stored = np.float32 if model_dtype == "bfloat16" else np.int64
        specs["input_scale"] = specs["input_offset"] = TensorSpec(_F32, (1,))
        specs["quant_bias"] = TensorSpec(np.dtype(np.int32), (rows,))
        specs["deq_scale"] = TensorSpec(np.dtype(stored), folded)
    return specs


def _block_problem(scheme: QuantScheme, elements: int) -> str | None:
    size = 0 if scheme.weight is None else scheme.weight.group_size
    if elements % size:
        return f"block size {size} does not divide its {elements} elements"
    return "pairs of elements share a byte, and their number is odd" if elements % 2 else None


def _codes(
    scheme: QuantScheme, weight: TensorScheme, shape: tuple[int, int], packed: bool
) -> TensorSpec:
    rows, columns = shape
    if weight.dtype == NF4:
        return TensorSpec(np.dtype(np.uint8), (rows * columns // 2,))
    if weight.dtype == FP8:
        return TensorSpec(np.dtype(ml_dtypes.float8_e4m3fn), shape)
    if weight.dtype == FP4:
        return TensorSpec(np.dtype(np.uint8), (rows, columns // 2))
    stored = list(shape)
    axis = packed_axis(scheme, groups_in_row(scheme, columns), packed=packed)
    if axis is not None:
        stored[axis] //= 2
    return TensorSpec(np.dtype(np.int8), tuple(stored))


def _scales(
    scheme: QuantScheme, weight: TensorScheme, shape: tuple[int, int], packed: bool
) -> dict[str, TensorSpec]:
    rows, columns = shape
    groups: Shape = (rows, groups_in_row(scheme, columns))
    if weight.granularity is Granularity.PER_TENSOR:
        groups = (1,)
    if scheme.variant is Variant.SPARSE:
        return {}
    if weight.dtype == NF4:
        blocks = (rows * columns // weight.group_size,)
        return {
            "weight_absmax": TensorSpec(_F32, blocks),
            "weight_shape": TensorSpec(np.dtype(np.int64), (2,)),
        }
    if weight.scales is ScaleKind.E8M0:
        return {"weight_scale": TensorSpec(np.dtype(np.uint8), groups)}
    if weight.scales is ScaleKind.FLOAT:
        return {key: TensorSpec(_F32, groups) for key in ("weight_scale", "weight_offset")}
    # Integers as v0 of the original tool writes them; readers of the packed layout have floats.
    zeros = _F32 if packed else np.dtype(np.int64)
    return {
        "weight_scale": TensorSpec(_F32, (rows, 1)),
        "weight_offset": TensorSpec(_F32, (rows, 1)),
        SECOND_SCALE: TensorSpec(_F32, groups),
        "weight_offset_second": TensorSpec(zeros, groups),
    }
