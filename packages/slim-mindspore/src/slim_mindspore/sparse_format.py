"""Tensors of a sparse-quantized layer in a MindSpore checkpoint.

========================  =======  ========  ===============================================
name behind the cell's    dtype    shape     content
========================  =======  ========  ===============================================
``.weight``               int8     (out, in) codes (float32 on request)
``.input_scale``          float16  (1,)      scale of the activation
``.input_offset``         int8     (1,)      offset of the activation
``.quant_bias``           int32    (out,)    bias and offset in units of ``deq_scale``
``.deq_scale``            int64    (out,)    bits of the float32 ``input_scale * weight_scale``
========================  =======  ========  ===============================================

The float bias is part of ``quant_bias`` and not stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slim_core.errors import FormatError
from slim_core.formats import decode_deq_scale, encode_deq_scale
from slim_core.layers import QuantizedLinear
from slim_core.validate import check_choice
from slim_mindspore.sparse import SPARSE_SCHEME

SPARSE_TYPE = "W8A8S"
WEIGHT_DTYPES = ("int8", "float32")
_LOCALS = {
    "input_scale": np.float16,
    "input_offset": np.int8,
    "quant_bias": np.int32,
    "deq_scale": np.int64,
}


def encode_sparse(layer: QuantizedLinear, weight_dtype: str = "int8") -> dict[str, np.ndarray]:
    """Return the tensors of a layer by their local names, ``weight`` first."""
    check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
    deq_scale, quant_bias = layer.folded()
    return {
        "weight": np.asarray(layer.codes).astype(weight_dtype),
        "input_scale": np.asarray(layer.input_scale).astype(np.float16),
        "input_offset": np.asarray(layer.input_offset).astype(np.int8),
        "quant_bias": np.asarray(quant_bias),
        "deq_scale": encode_deq_scale(np.asarray(deq_scale), "float32"),
    }


def decode_sparse(name: str, tensors: Mapping[str, np.ndarray]) -> QuantizedLinear:
    """Return the layer whose :func:`encode_sparse` gave these tensors.

    The float bias comes back from ``quant_bias`` to within half a ``deq_scale``.

    Raises
    ------
    FormatError
        A tensor is missing or has the wrong dtype or shape.
    """
    codes = tensors["weight"]
    if codes.ndim != 2 or codes.dtype not in (np.int8, np.float32):
        raise FormatError(f"{name}.weight must be an int8 or float32 matrix, not {codes.dtype}")
    for local, dtype in _LOCALS.items():
        shape = (1,) if local.startswith("input") else codes.shape[:1]
        if local not in tensors:
            raise FormatError(f"{name} has no {local}; its tensors are {', '.join(tensors)}")
        if tensors[local].dtype != dtype or tensors[local].shape != shape:
            raise FormatError(
                f"{name}.{local} must be {np.dtype(dtype).name} of shape {shape}, "
                f"not {tensors[local].dtype} of shape {tensors[local].shape}"
            )
    integers = codes.astype(np.int8)
    if not np.array_equal(integers, codes):
        raise FormatError(f"{name}.weight holds values that are no int8 codes")
    input_scale = tensors["input_scale"].astype(np.float32)
    input_offset = tensors["input_offset"].astype(np.float32)
    deq_scale = decode_deq_scale(tensors["deq_scale"])
    offset_part = input_offset.astype(np.float64) * integers.sum(axis=1, dtype=np.int64)
    bias = (tensors["quant_bias"] + offset_part) * deq_scale
    return QuantizedLinear(
        name=name,
        scheme=SPARSE_SCHEME,
        codes=integers,
        weight_scale=(deq_scale / input_scale)[:, None],
        weight_offset=np.zeros((codes.shape[0], 1), np.float32),
        input_scale=input_scale,
        input_offset=input_offset,
        bias=bias.astype(np.float32),
    )
