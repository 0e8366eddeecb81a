"""The layout of AutoAWQ (``quant_method: awq``, version gemm): weight-only, 4 bits.

A word holds eight output channels of one input channel, in an order that suits the kernel.  Zero
points are stored as they are, scales as float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from slim_core.formats.base import Tensors, to_numpy
from slim_core.formats.foreign import (
    ForeignFormat,
    group_problem,
    integer_bits,
    only_scheme,
    signed_layer,
    take,
    unsigned_parts,
)
from slim_core.formats.words import pack_words, unpack_words
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat(ForeignFormat):
    """``qweight``, ``qzeros`` and ``scales`` for each layer."""

    name: ClassVar[str] = "awq"

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why a layer cannot be held: activations, bits, or channels of no whole word."""
        if scheme.is_float:
            return None
        if integer_bits(scheme) != _BITS or scheme.activation is not None:
            return "the awq format holds w4a16 only"
        if shape[0] % len(_ORDER):
            return f"its {shape[0]} output channels are no multiple of {len(_ORDER)}"
        return group_problem(scheme, shape)

    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of the three tensors."""
        groups = shape[1] // scheme.group_size if scheme.group_size else 1
        return shape[0] * shape[1] // 2 + groups * shape[0] // 2 + 2 * groups * shape[0]

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer."""
        codes, zeros, scales = unsigned_parts(layer, _BITS)
        tensors = {
            "qweight": pack_words(codes.T, _BITS, axis=1, order=_ORDER),
            "qzeros": pack_words(zeros.T, _BITS, axis=1, order=_ORDER),
            "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        }
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer; its scales are those of float16."""
        scales = take(name, tensors, "scales", np.float16)
        rows = scales.shape[1]
        codes, zeros = (
            unpack_words(take(name, tensors, local, np.int32), _BITS, 1, rows, _ORDER).T
            for local in ("qweight", "qzeros")
        )
        bias = tensors.get("bias")
        return signed_layer(name, scheme, (codes, zeros, scales.T), bias, model_dtype)

    def config(self, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return what AutoAWQ writes."""
        scheme = only_scheme(layers, self.name)
        floats = [name for name, own in layers.items() if own.is_float]
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *floats],
        }
