"""The layout of the compressed-tensors library, which vLLM and transformers read.

Weight-only layers are ``pack-quantized``: codes from 0 on in int32 words along the input channels,
zero points in words along the output channels; their scales have the dtype of the model.  Layers
with int8 activations are ``int-quantized``: int8 codes as they are, scales in float32, which is
what int8 kernels take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from slim_core.formats.base import Tensors, to_numpy
from slim_core.formats.foreign import (
    ForeignFormat,
    group_problem,
    integer_bits,
    signed_layer,
    take,
    unsigned_parts,
)
from slim_core.formats.words import pack_words, unpack_words
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme, TensorScheme

_FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class CompressedTensorsFormat(ForeignFormat):
    """``weight_packed`` or ``weight``, with ``weight_scale`` and what belongs to activations."""

    name: ClassVar[str] = "compressed_tensors"

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why a layer cannot be held: a type that the library has no integers for."""
        if scheme.is_float:
            return None
        bits = integer_bits(scheme)
        if scheme.activation is None and bits in (4, 8):
            return group_problem(scheme, shape)
        if scheme.activation is not None and bits == 8 and not scheme.group_size:
            return None
        return "the compressed_tensors format holds w4a16, w8a16, w8a8 and w8a8_dynamic only"

    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of the tensors."""
        bits = integer_bits(scheme) or 0
        rows, columns = shape
        item = int(_scale_dtype(scheme, model_dtype).itemsize)
        groups = columns // scheme.group_size if scheme.group_size else 1
        scales = rows * groups * item
        if scheme.activation is not None:
            return rows * columns + scales + (item + 1 if scheme.is_static else 0)
        words = -(-columns * bits // 32) * rows
        asymmetric = scheme.weight is not None and not scheme.weight.symmetric
        zeros = -(-rows * bits // 32) * groups if asymmetric else 0
        return 4 * (words + zeros) + scales + 16

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer."""
        dtype = _scale_dtype(layer.scheme, layer.model_dtype)
        weight = layer.scheme.weight
        assert weight is not None  # narrowing: only quantized layers are encoded
        tensors: Tensors = {"weight_scale": to_numpy(layer.weight_scale, np.float32).astype(dtype)}
        if layer.scheme.activation is not None:
            tensors["weight"] = to_numpy(layer.codes, np.int8)
            if layer.scheme.is_static:
                tensors["input_scale"] = to_numpy(layer.input_scale, np.float32).astype(dtype)
                tensors["input_zero_point"] = to_numpy(layer.input_offset, np.int8)
        else:
            bits = integer_bits(layer.scheme) or 0
            codes, zeros, _ = unsigned_parts(layer, bits)
            tensors["weight_packed"] = pack_words(codes, bits, axis=1)
            tensors["weight_shape"] = np.array(codes.shape, np.int64)
            if not weight.symmetric:
                tensors["weight_zero_point"] = pack_words(zeros, bits, axis=0)
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer; the scales of a weight-only one are those of the dtype of the model."""
        weight = scheme.weight
        assert weight is not None  # narrowing
        dtype = _scale_dtype(scheme, model_dtype)
        scale = take(name, tensors, "weight_scale", dtype).astype(np.float32)
        bias = tensors.get("bias")
        if scheme.activation is not None:
            layer = QuantizedLinear(
                name,
                scheme,
                take(name, tensors, "weight", np.int8),
                scale,
                np.zeros_like(scale),
                bias=bias,
                model_dtype=model_dtype,
            )
            if not scheme.is_static:
                return layer
            offset = take(name, tensors, "input_zero_point", np.int8)
            return replace(
                layer,
                input_scale=take(name, tensors, "input_scale", dtype),
                input_offset=offset.astype(np.float32),
            )
        bits = integer_bits(scheme) or 0
        rows, columns = (int(n) for n in take(name, tensors, "weight_shape", np.int64))
        codes = unpack_words(take(name, tensors, "weight_packed", np.int32), bits, 1, columns)
        zeros = np.full(scale.shape, 1 << (bits - 1), np.uint8)
        if not weight.symmetric:
            words = take(name, tensors, "weight_zero_point", np.int32)
            zeros = unpack_words(words, bits, 0, rows)
        return signed_layer(name, scheme, (codes, zeros, scale), bias, model_dtype)

    def config(self, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return one group of layers for each scheme, by the full names of the layers."""
        schemes: dict[QuantScheme, list[str]] = {}
        for name, scheme in layers.items():
            if not scheme.is_float:
                schemes.setdefault(scheme, []).append(name)
        formats = {_layout(scheme) for scheme in schemes}
        groups = {
            f"group_{number}": {
                "targets": names,
                "weights": _arguments(scheme.weight),
                "input_activations": _activations(scheme),
                "output_activations": None,
                "format": _layout(scheme),
            }
            for number, (scheme, names) in enumerate(schemes.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": ["lm_head", *(name for name, own in layers.items() if own.is_float)],
            "kv_cache_scheme": None,
        }


def _scale_dtype(scheme: QuantScheme, model_dtype: str) -> np.dtype:
    """Return the dtype of the stored scales."""
    return _FLOATS["float32" if scheme.activation is not None else model_dtype]


def _layout(scheme: QuantScheme) -> str:
    return "pack-quantized" if scheme.activation is None else "int-quantized"


def _arguments(weight: TensorScheme | None) -> dict[str, Any]:
    assert weight is not None  # narrowing
    return {
        "num_bits": weight.dtype.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "group" if weight.group_size else "channel",
        "group_size": weight.group_size or None,
        "dynamic": False,
    }


def _activations(scheme: QuantScheme) -> dict[str, Any] | None:
    activation = scheme.activation
    if activation is None:
        return None
    return {
        "num_bits": activation.dtype.bits,
        "type": "int",
        "symmetric": activation.symmetric,
        "strategy": "token" if scheme.is_dynamic else "tensor",
        "dynamic": scheme.is_dynamic,
    }
