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

Zero points are stored negated.  ``dequant_scale`` holds the bits of a float32.  In ``gs-sq`` the
bias stands for the float bias and the offset of the input together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slim_core.dtypes import INT4, INT8
from slim_core.errors import FormatError
from slim_core.formats import decode_deq_scale, encode_deq_scale
from slim_core.layers import QuantizedLinear
from slim_core.packing import pack_int4, unpack_int4
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.quantized_layer import SmoothedLinear

Tensors = dict[str, np.ndarray]
LAYOUTS = ("gs-rtn", "gs-sq", "gs-ptq")
COMPUTE_DTYPES = ("float32", "float16")
PACKED = "_layer.weight"
_STATIC = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)


def encode_layer(layout: str, result: SmoothedLinear, dtype: Any = np.float32) -> Tensors:
    """Return the tensors of a layer by their local names.

    Parameters
    ----------
    layout : str
        One of ``LAYOUTS``.
    result : SmoothedLinear
    dtype : numpy dtype
        Compute dtype of the network.

    Raises
    ------
    FormatError
        The layout cannot hold the layer; names it.
    """
    problem = unsupported(layout, result.layer.scheme, result.layer.codes.shape[0])
    if problem:
        raise FormatError(f"{result.layer.name}: {problem}")
    if layout == "gs-rtn":
        return _encode_rtn(result, dtype)
    if layout == "gs-sq":
        return _encode_smooth_quant(result, dtype)
    return _encode_ptq(result, dtype)


def unsupported(layout: str, scheme: QuantScheme, rows: int) -> str | None:
    """Return why a layout cannot hold layers of a scheme and number of rows, None if it can."""
    weight = scheme.weight
    if layout == "gs-rtn" and (scheme.activation or scheme.group_size or weight.dtype != INT8):  # type: ignore[union-attr]
        return f"layout gs-rtn holds w8a16 per channel only, not {scheme}"
    if layout == "gs-sq" and not scheme.is_static:
        return f"layout gs-sq holds w8a8 only, not {scheme}"
    if weight is not None and weight.dtype == INT4 and rows % 2:
        return f"layout {layout} packs two rows in a byte; {rows} rows are odd"
    return None


def check_ascend(config: QuantizationConfig) -> None:
    """Require that the ``ascend_v1`` format can hold what a configuration makes.

    Raises
    ------
    FormatError
        The configuration has int4 weights, a cache with scales per token, or smoothing.
    """
    layers = [config, *config.layer_policies.values()]
    if config.outliers_suppression is not None:
        raise FormatError(
            "ascend_v1 has no place for scales that divide the input, so outliers_suppression "
            f"cannot be {config.outliers_suppression}",
            hint="write a .ckpt or .safetensors file (layout gs-ptq)",
        )
    if any(layer.weight_dtype == "int4" for layer in layers):
        raise FormatError(
            "int4 weights are written in layout gs-ptq only",
            hint="write a .ckpt or .safetensors file",
        )
    if config.kvcache_quant_granularity == "per_token":
        raise FormatError("ascend_v1 holds a cache with fixed scales only, not one per token")


def _encode_rtn(result: SmoothedLinear, dtype: Any) -> Tensors:
    layer = result.layer
    tensors = {
        "_handler.weight": np.asarray(layer.codes),
        "_weight_quantizer.scale": _scale(layer, "weight_scale", dtype)[:, 0],
        "_weight_quantizer.zp_neg": (-np.asarray(layer.weight_offset)[:, 0] + 0.0).astype(dtype),
    }
    return tensors | _bias("_handler.bias", layer, dtype)


def _encode_smooth_quant(result: SmoothedLinear, dtype: Any) -> Tensors:
    layer = result.layer
    deq_scale, quant_bias = (np.asarray(item) for item in layer.folded())
    inputs = layer.codes.shape[1]
    return {
        "_handler.weight": np.asarray(layer.codes),
        "_handler.bias": (quant_bias * deq_scale.astype(np.float64)).astype(dtype),
        "_input_quantizer.t_scale": _input_scale(result, np.float16, inputs),
        "_input_quantizer.t_zp": np.full(inputs, np.asarray(layer.input_offset)[0], np.int8),
        "_output_quantizer.scale": encode_deq_scale(deq_scale, "float32"),
    }


def _encode_ptq(result: SmoothedLinear, dtype: Any) -> Tensors:
    layer, scheme = result.layer, result.layer.scheme
    codes = np.asarray(layer.codes)
    tensors: Tensors = {PACKED: codes}
    if scheme.is_static:
        deq_scale, quant_bias = (np.asarray(item) for item in layer.folded())
        scale = _input_scale(result, dtype, 1 if result.smooth is None else codes.shape[1])
        return tensors | {
            "_layer.matmul.quant_bias": quant_bias,
            "_layer.matmul.dequant_scale": encode_deq_scale(deq_scale, "float32"),
            "quant_op.input_scale": scale,
            "quant_op.input_zp": np.full(scale.shape, np.asarray(layer.input_offset)[0], np.int8),
        }
    if scheme.is_dynamic:
        scale = _scale(layer, "weight_scale", np.float32)[:, 0]
        tensors["_layer.matmul.weight_scale"] = scale
        if result.smooth is not None:
            tensors["dyn_quant_op.smooth_scale"] = (1 / result.smooth).astype(dtype)
        return tensors | _bias("_layer.bias", layer, dtype)
    if scheme.weight is not None and scheme.weight.dtype == INT4:
        tensors[PACKED] = np.asarray(pack_int4(np.ascontiguousarray(codes.T), axis=1))
    scale = _scale(layer, "weight_scale", dtype)
    zero = (-np.asarray(layer.weight_offset) + 0.0).astype(dtype)
    grouped = scheme.group_size > 0
    tensors["_layer.matmul.weight_scale"] = np.ascontiguousarray(
        scale.T if grouped else scale[:, 0]
    )
    tensors["_layer.matmul.weight_zp"] = np.ascontiguousarray(zero.T if grouped else zero[:, 0])
    if result.smooth is not None:
        tensors["_layer.matmul.smooth_scale"] = (1 / result.smooth).astype(dtype)
    return tensors | _bias("_layer.bias", layer, dtype)


def decode_layer(
    name: str, tensors: Mapping[str, np.ndarray], int4: bool = False
) -> SmoothedLinear:
    """Return the layer that local tensors of any of the layouts hold.

    Scales come back as they were rounded for the file, the bias of ``w8a8`` layers to within half a
    ``dequant_scale``.

    Parameters
    ----------
    name : str
        Of the cell.
    tensors : mapping of str to numpy.ndarray
        By local names.
    int4 : bool
        Whether the weight is marked ``Int4``.

    Raises
    ------
    FormatError
        A tensor is missing, unexpected, or of the wrong dtype or shape.
    """
    take = _Taker(name, tensors)
    if "_handler.weight" in tensors and "_weight_quantizer.scale" in tensors:
        result = _decode_rtn(name, take)
    elif "_handler.weight" in tensors:
        result = _decode_smooth_quant(name, take)
    elif PACKED in tensors and "quant_op.input_scale" in tensors:
        result = _decode_static(name, take)
    elif PACKED in tensors:
        result = _decode_ptq(name, take, int4)
    else:
        raise FormatError(f"{name} holds no weight of a known layout: {', '.join(tensors)}")
    take.finish()
    return result


class _Taker:
    """Hands out the tensors of a layer, checked, and knows which are left."""

    def __init__(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        self._name = name
        self._left = dict(tensors)

    def __contains__(self, local: str) -> bool:
        return local in self._left

    def __call__(self, local: str, kind: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        if local not in self._left:
            raise FormatError(f"{self._name} has no {local}")
        tensor = self._left.pop(local)
        name = tensor.dtype.name
        if not (name == kind or (kind == "float" and "float" in name)):
            raise FormatError(f"{self._name}.{local} must be {kind}, not {name}")
        if shape is not None and tensor.shape != shape:
            raise FormatError(f"{self._name}.{local} must have shape {shape}, not {tensor.shape}")
        return tensor.astype(np.float32) if kind == "float" else tensor

    def matrix(self, local: str) -> np.ndarray:
        tensor = self(local, "int8")
        if tensor.ndim != 2:
            raise FormatError(f"{self._name}.{local} must be a matrix, not {tensor.shape}")
        return tensor

    def bias(self, local: str, rows: int) -> np.ndarray | None:
        return self(local, "float", (rows,)) if local in self else None

    def finish(self) -> None:
        if self._left:
            raise FormatError(f"{self._name} has tensors of no use: {', '.join(self._left)}")


def _decode_rtn(name: str, take: _Taker) -> SmoothedLinear:
    codes = take.matrix("_handler.weight")
    rows = codes.shape[0]
    scale = take("_weight_quantizer.scale", "float", (rows,))
    offset = -take("_weight_quantizer.zp_neg", "float", (rows,))
    scheme = QuantScheme(TensorScheme(INT8, Granularity.PER_CHANNEL, not offset.any()))
    bias = take.bias("_handler.bias", rows)
    layer = QuantizedLinear(name, scheme, codes, scale[:, None], offset[:, None], bias=bias)
    return SmoothedLinear(layer)


def _decode_smooth_quant(name: str, take: _Taker) -> SmoothedLinear:
    codes = take.matrix("_handler.weight")
    rows, columns = codes.shape
    deq_scale = decode_deq_scale(take("_output_quantizer.scale", "int64", (rows,)))
    quant_bias = np.rint(take("_handler.bias", "float", (rows,)) / deq_scale)
    scale = take("_input_quantizer.t_scale", "float", (columns,))
    zero = take("_input_quantizer.t_zp", "int8", (columns,))
    return _static(name, codes, deq_scale, quant_bias, scale, zero)


def _decode_static(name: str, take: _Taker) -> SmoothedLinear:
    codes = take.matrix(PACKED)
    rows, columns = codes.shape
    deq_scale = decode_deq_scale(take("_layer.matmul.dequant_scale", "int64", (rows,)))
    quant_bias = take("_layer.matmul.quant_bias", "int32", (rows,))
    scale = take("quant_op.input_scale", "float")
    if scale.shape not in ((1,), (columns,)):
        raise FormatError(f"{name}.quant_op.input_scale must have shape (1,) or ({columns},)")
    zero = take("quant_op.input_zp", "int8", scale.shape)
    return _static(name, codes, deq_scale, quant_bias, scale, zero)


def _static(
    name: str,
    codes: np.ndarray,
    deq_scale: np.ndarray,
    quant_bias: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
) -> SmoothedLinear:
    """Return a w8a8 layer; how its scales split into input, smoothing and weight is free."""
    if (zero != zero[0]).any():
        raise FormatError(f"{name}: the zero points of the input channels differ")
    smooth = None if len(scale) == 1 else (scale / scale[0]).astype(np.float32)
    input_scale, input_offset = scale[:1], zero[:1].astype(np.float32)
    row_sum = codes.sum(axis=1, dtype=np.int64)
    bias = (quant_bias + float(input_offset[0]) * row_sum) * deq_scale.astype(np.float64)
    layer = QuantizedLinear(
        name=name,
        scheme=QuantScheme(TensorScheme(INT8, Granularity.PER_CHANNEL), _STATIC),
        codes=codes,
        weight_scale=(deq_scale / input_scale)[:, None],
        weight_offset=np.zeros((len(codes), 1), np.float32),
        input_scale=input_scale,
        input_offset=input_offset,
        bias=bias.astype(np.float32),
    )
    return SmoothedLinear(layer, smooth, "smooth" if smooth is not None else "rtn")


def _decode_ptq(name: str, take: _Taker, int4: bool) -> SmoothedLinear:
    codes = take.matrix(PACKED)
    if int4:
        codes = np.ascontiguousarray(np.asarray(unpack_int4(codes, axis=1)).T)
    rows, columns = codes.shape
    scale = take("_layer.matmul.weight_scale", "float")
    if scale.shape[-1] != rows or scale.ndim > 2 or (scale.ndim == 2 and columns % len(scale)):
        raise FormatError(f"{name}._layer.matmul.weight_scale has the shape {scale.shape}")
    dynamic = "_layer.matmul.weight_zp" not in take
    zero = (
        np.zeros_like(scale) if dynamic else take("_layer.matmul.weight_zp", "float", scale.shape)
    )
    group = columns // len(scale) if scale.ndim == 2 else 0
    weight = TensorScheme(
        INT4 if int4 else INT8,
        Granularity.PER_GROUP if group else Granularity.PER_CHANNEL,
        not zero.any(),
        group,
    )
    place = "dyn_quant_op" if dynamic else "_layer.matmul"
    smooth = None
    if f"{place}.smooth_scale" in take:
        smooth = 1 / take(f"{place}.smooth_scale", "float", (columns,))
    activation = TensorScheme(INT8, Granularity.PER_TOKEN) if dynamic else None
    layer = QuantizedLinear(
        name=name,
        scheme=QuantScheme(weight, activation),
        codes=codes,
        weight_scale=np.ascontiguousarray(np.atleast_2d(scale).T),
        weight_offset=np.ascontiguousarray(-np.atleast_2d(zero).T),
        bias=take.bias("_layer.bias", rows),
    )
    return SmoothedLinear(layer, smooth)


def _scale(layer: QuantizedLinear, field: str, dtype: Any) -> np.ndarray:
    scale = np.asarray(getattr(layer, field)).astype(dtype)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        raise FormatError(f"{layer.name}: {np.dtype(dtype).name} cannot hold its {field}")
    return scale


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
