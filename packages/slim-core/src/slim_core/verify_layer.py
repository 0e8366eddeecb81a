"""Checking one stored layer: value ranges, and what must follow from what."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import numpy as np

from slim_core.dtypes import IntType
from slim_core.formats import decode_deq_scale, scale_bias
from slim_core.layers import QuantizedLinear
from slim_core.scheme import ScaleKind
from slim_core.two_stage import LARGEST_GROUP_SCALE, SECOND_SCALE

_SCALE_BIAS_TOLERANCE = 0.01  # of its largest element: some writers form it in bfloat16


def layer_problems(layer: QuantizedLinear, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield what is wrong with a layer whose dtypes and shapes are right.

    Parameters
    ----------
    layer : QuantizedLinear
        Of numpy arrays, as it was decoded.
    tensors : mapping
        Its stored tensors by their local names.
    """
    broken = [
        f"{layer.name}.{local} has NaN or infinite elements"
        for local, tensor in {**tensors, "weight_scale": layer.weight_scale}.items()
        if tensor.dtype.kind not in "iu" and not np.isfinite(tensor.astype(np.float32)).all()
    ]
    if broken:  # nothing follows from such numbers
        yield from broken
        return
    if (layer.weight_scale <= 0).any():
        yield f"{layer.name}.weight_scale has elements that are not positive"
    yield from _code_problems(layer)
    yield from _two_stage_problems(layer, tensors)
    yield from _transform_problems(layer)
    if layer.scheme.is_static:
        yield from _folded_problems(layer, tensors)


def shared_input(layer: QuantizedLinear) -> Hashable:
    """Return what layers that engines run as one matrix must have in common."""
    tensors = [layer.input_scale, layer.input_offset]
    tensors += [layer.extras.get(key) for key in ("left_trans", "right_trans", "clip_ratio")]
    return tuple(None if tensor is None else tensor.tobytes() for tensor in tensors)


def _code_problems(layer: QuantizedLinear) -> Iterator[str]:
    dtype = None if layer.scheme.weight is None else layer.scheme.weight.dtype
    if not isinstance(dtype, IntType) or not layer.codes.size:
        return
    low, high = int(layer.codes.min()), int(layer.codes.max())
    if low < dtype.min or high > dtype.max:
        yield f"{layer.name}.weight has codes from {low} to {high}, which are not {dtype}"


def _two_stage_problems(layer: QuantizedLinear, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    second = layer.extras.get(SECOND_SCALE)
    if second is not None and (
        (second != np.rint(second)).any() or second.min() < 1 or second.max() > LARGEST_GROUP_SCALE
    ):
        yield f"{layer.name}.{SECOND_SCALE} must be integers from 1 to {LARGEST_GROUP_SCALE}"
    stored = tensors.get("scale_bias")
    if stored is None:
        return
    expected = scale_bias(layer, stored.shape[1])
    if np.abs(stored - expected).max() > _SCALE_BIAS_TOLERANCE * np.abs(expected).max():
        yield f"{layer.name}.scale_bias is not 8 times the sum of the weights"


def _transform_problems(layer: QuantizedLinear) -> Iterator[str]:
    ratio = layer.extras.get("clip_ratio")
    if ratio is not None and not 0 < float(ratio[0]) <= 1:
        yield f"{layer.name}.clip_ratio must be above 0 and at most 1, not {float(ratio[0])}"
    powers = layer.scheme.weight is not None and layer.scheme.weight.scales is ScaleKind.E8M0
    if ratio is not None and powers and float(ratio[0]) != 1:
        yield f"{layer.name}.clip_ratio must be 1, since scales that are powers of two do not clip"
    for key in ("left_trans", "right_trans"):
        matrix = layer.extras.get(key)
        if matrix is not None and np.linalg.matrix_rank(matrix) < len(matrix):
            yield f"{layer.name}.{key} has no inverse"


def _folded_problems(layer: QuantizedLinear, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    deq_scale, quant_bias = layer.folded()
    if not np.array_equal(decode_deq_scale(tensors["deq_scale"]), deq_scale):
        yield f"{layer.name}.deq_scale is not input_scale times weight_scale"
    if not np.array_equal(tensors["quant_bias"], quant_bias):
        yield f"{layer.name}.quant_bias does not follow from codes, scales and bias"
