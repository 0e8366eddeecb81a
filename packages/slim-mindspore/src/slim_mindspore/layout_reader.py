"""Reading layers back from the layouts of :mod:`slim_mindspore.layouts`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slim_core.dtypes import INT4, INT8
from slim_core.errors import FormatError
from slim_core.formats import decode_deq_scale
from slim_core.layers import QuantizedLinear
from slim_core.packing import unpack_int4
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_mindspore.layouts import PACKED
from slim_mindspore.quantized_layer import SmoothedLinear

_STATIC = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)


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
    # With smoothing the whole of the input scale goes there, so that their product is exact.
    smooth = None if len(scale) == 1 else scale
    input_scale = scale if smooth is None else np.ones(1, np.float32)
    input_offset = zero[:1].astype(np.float32)
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
