"""Names and dtypes of quantized layers in the checkpoints of MindSpore Golden Stick.

Pure functions between a layer and its local tensors.  ``CD`` is the compute dtype of the network,
``n`` a number of groups (no such axis per channel):

=========  ==================================================  =======  =====================
layout     name behind the cell's                              dtype    shape
=========  ==================================================  =======  =====================
gs-rtn     ``._handler.weight``                                int8     (out, in)
           ``._weight_quantizer.scale``, ``.zp_neg``           CD       (out,)
gs-sq      ``._handler.weight``                                int8     (out, in)
           ``._handler.bias``                                  CD       (out,)
           ``._input_quantizer.t_scale``                       float16  (in,)
           ``._input_quantizer.t_zp``                          int8     (in,)
           ``._output_quantizer.scale``                        int64    (out,)
gs-ptq     ``._layer.weight``                                  int8     (out, in)
                                                               Int4     (in, out / 2)
           ``._layer.matmul.weight_scale``, ``.weight_zp``     CD       (out,) or (n, out)
           ``._layer.matmul.smooth_scale`` (1 / s)             CD       (in,)
           ``._layer.matmul.dequant_scale``                    int64    (out,)
           ``._layer.matmul.quant_bias``                       int32    (out,)
           ``.quant_op.input_scale``                           CD       (1,), (in,) smoothed
           ``.quant_op.input_zp``                              int8     the same
           ``.dyn_quant_op.smooth_scale`` (1 / s)              CD       (in,)
           ``._layer.bias`` (unless folded)                    CD       (out,)
=========  ==================================================  =======  =====================

``msmodelslim`` has the tensors of :mod:`slim_mindspore.sparse_format`.

Zero points are stored negated.  ``dequant_scale`` holds the bits of a float32.  In ``gs-sq`` the
bias stands for the float bias and the offset of the input together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from slim_core.dtypes import INT4, INT8
from slim_core.errors import FormatError
from slim_core.formats import encode_deq_scale
from slim_core.layers import QuantizedLinear
from slim_core.packing import pack_int4
from slim_core.scheme import QuantScheme, ScaleKind, Variant
from slim_mindspore.quantized_layer import SmoothedLinear
from slim_mindspore.sparse_format import encode_sparse

Tensors = dict[str, np.ndarray]
LAYOUTS = ("gs-rtn", "gs-sq", "gs-ptq", "msmodelslim")
LAYOUT_OF = {"rtn": "gs-rtn", "smooth_quant": "gs-sq", "ptq": "gs-ptq"}  # by quant_method
COMPUTE_DTYPES = ("float32", "float16")
PACKED = "_layer.weight"


def encode_layer(
    layout: str, result: SmoothedLinear, dtype: Any = np.float32, packed: bool = True
) -> Tensors:
    """Return the tensors of a layer by their local names.

    Parameters
    ----------
    layout : str
        One of ``LAYOUTS``.
    result : SmoothedLinear
    dtype : numpy dtype
        Compute dtype of the network.
    packed : bool
        Whether int4 weights have two codes in a byte; else they are int8 of shape (out, in).

    Raises
    ------
    FormatError
        The layout cannot hold the layer; names it.
    """
    problem = unsupported(layout, result, packed)
    if problem:
        raise FormatError(f"{result.layer.name}: {problem}")
    if layout == "gs-rtn":
        return _encode_rtn(result, dtype)
    if layout == "msmodelslim":
        scale = _input_scale(result, np.float16, 1).astype(np.float32)
        return encode_sparse(replace(result.layer, input_scale=scale))
    if layout == "gs-sq":
        return _encode_smooth_quant(result, dtype)
    return _encode_ptq(result, dtype, packed)


def unsupported(layout: str, result: SmoothedLinear, packed: bool = True) -> str | None:
    """Return why a layout cannot hold a layer, None if it can."""
    scheme, rows = result.layer.scheme, result.layer.codes.shape[0]
    weight = scheme.weight
    if weight is None or not _known(scheme):
        return f"layout {layout} holds int8 and int4 weights with int8 activations, not {scheme}"
    kind = str(scheme) if result.smooth is None else f"{scheme} with smoothing"
    holds = {
        "gs-rtn": ("w8a16 per channel", scheme.activation is None and weight.dtype == INT8),
        "gs-sq": ("w8a8", scheme.is_static),
        "msmodelslim": ("w8a8", scheme.is_static),
    }
    wanted, fits = holds.get(layout, ("", True))
    only_plain = layout in ("gs-rtn", "msmodelslim") and (
        scheme.group_size or result.smooth is not None
    )
    if not fits or only_plain:
        return f"layout {layout} holds {wanted} only, not {kind}"
    if scheme.is_dynamic and scheme.group_size:
        return f"integer products need one scale for each row, not {scheme}"
    if packed and weight.dtype == INT4 and rows % 2:
        return f"layout {layout} packs two rows in a byte; {rows} rows are odd"
    return None


def _known(scheme: QuantScheme) -> bool:
    """Whether a layer of the scheme is nothing but codes, float scales and offsets."""
    weight, activation = scheme.weight, scheme.activation
    return (
        weight is not None
        and weight.dtype in (INT8, INT4)
        and weight.scales is ScaleKind.FLOAT
        and (activation is None or activation.dtype == INT8)
        and scheme.variant is not Variant.FLATQUANT
    )


def _encode_rtn(result: SmoothedLinear, dtype: Any) -> Tensors:
    layer = result.layer
    tensors = {
        "_handler.weight": np.asarray(layer.codes),
        "_weight_quantizer.scale": _scale(layer, dtype)[:, 0],
        "_weight_quantizer.zp_neg": _negated_zero(layer, dtype)[:, 0],
    }
    return tensors | _bias("_handler.bias", layer, dtype)


def _encode_smooth_quant(result: SmoothedLinear, dtype: Any) -> Tensors:
    layer = result.layer
    deq_scale, quant_bias = _folded(layer)
    inputs = layer.codes.shape[1]
    return {
        "_handler.weight": np.asarray(layer.codes),
        "_handler.bias": (quant_bias * deq_scale.astype(np.float64)).astype(dtype),
        "_input_quantizer.t_scale": _input_scale(result, np.float16, inputs),
        "_input_quantizer.t_zp": np.full(inputs, np.asarray(layer.input_offset)[0], np.int8),
        "_output_quantizer.scale": encode_deq_scale(deq_scale, "float32"),
    }


def _encode_ptq(result: SmoothedLinear, dtype: Any, packed: bool) -> Tensors:
    layer, scheme = result.layer, result.layer.scheme
    codes = np.asarray(layer.codes)
    tensors: Tensors = {PACKED: codes}
    if scheme.is_static:
        deq_scale, quant_bias = _folded(layer)
        scale = _input_scale(result, dtype, 1 if result.smooth is None else codes.shape[1])
        return tensors | {
            "_layer.matmul.quant_bias": quant_bias,
            "_layer.matmul.dequant_scale": encode_deq_scale(deq_scale, "float32"),
            "quant_op.input_scale": scale,
            "quant_op.input_zp": np.full(scale.shape, np.asarray(layer.input_offset)[0], np.int8),
        }
    if scheme.is_dynamic:
        scale = _scale(layer, np.float32)[:, 0]
        tensors["_layer.matmul.weight_scale"] = scale
        if result.smooth is not None:
            tensors["dyn_quant_op.smooth_scale"] = (1 / result.smooth).astype(dtype)
        return tensors | _bias("_layer.bias", layer, dtype)
    if packed and scheme.weight is not None and scheme.weight.dtype == INT4:
        tensors[PACKED] = np.asarray(pack_int4(np.ascontiguousarray(codes.T), axis=1))
    scale, zero = _scale(layer, dtype), _negated_zero(layer, dtype)
    grouped = scheme.group_size > 0
    tensors["_layer.matmul.weight_scale"] = np.ascontiguousarray(
        scale.T if grouped else scale[:, 0]
    )
    tensors["_layer.matmul.weight_zp"] = np.ascontiguousarray(zero.T if grouped else zero[:, 0])
    if result.smooth is not None:
        tensors["_layer.matmul.smooth_scale"] = (1 / result.smooth).astype(dtype)
    return tensors | _bias("_layer.bias", layer, dtype)


def _scale(layer: QuantizedLinear, dtype: Any) -> np.ndarray:
    """Return the scales of the weight, shape (out, 1) or (out, groups)."""
    scale = _by_row(layer, layer.weight_scale).astype(dtype)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        raise FormatError(f"{layer.name}: {np.dtype(dtype).name} cannot hold its weight_scale")
    return scale


def _folded(layer: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    deq_scale, quant_bias = (np.asarray(item) for item in layer.folded())
    return np.broadcast_to(deq_scale, quant_bias.shape).copy(), quant_bias


def _negated_zero(layer: QuantizedLinear, dtype: Any) -> np.ndarray:
    zero = _by_row(layer, layer.weight_offset)
    return np.asarray((0.0 - zero).astype(dtype))


def _by_row(layer: QuantizedLinear, values: Any) -> np.ndarray:
    """Return scales or offsets with one row for each row of the weight."""
    array = np.asarray(values)
    rows = layer.codes.shape[0]
    return np.broadcast_to(array.reshape(-1, array.shape[-1]), (rows, array.shape[-1]))


def _input_scale(result: SmoothedLinear, dtype: Any, size: int) -> np.ndarray:
    divisor = np.ones(size, np.float32) if result.smooth is None else result.smooth
    scale: np.ndarray = (np.asarray(result.layer.input_scale) * divisor).astype(dtype)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        raise FormatError(
            f"{result.layer.name}: {np.dtype(dtype).name} cannot hold its input scales"
        )
    return scale


def _bias(local: str, layer: QuantizedLinear, dtype: Any) -> Tensors:
    return {} if layer.bias is None else {local: np.asarray(layer.bias).astype(dtype)}
