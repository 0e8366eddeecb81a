"""The layout of AutoGPTQ and GPTQModel (``quant_method: gptq``): weight-only, 4 or 8 bits.

Codes and zero points are unsigned; words run along the input channels of ``qweight`` and along the
output channels of ``qzeros``.  Scales are float16.  Symmetric layers are of version 1, which every
reader knows and which stores zero points less one.  Asymmetric ones are of version 2
(``checkpoint_format: gptq_v2``), which stores them as they are: a zero point of 0 has no version 1,
and GPTQModel takes asymmetric files of version 1 from no tool but itself.
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
from slim_core.formats.words import WORD, pack_words, unpack_words
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme


class GptqFormat(ForeignFormat):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` for each layer."""

    name: ClassVar[str] = "gptq"

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why a layer cannot be held: activations, bits, or channels of no whole word."""
        bits = integer_bits(scheme)
        if scheme.is_float:
            return None
        if bits not in (4, 8) or scheme.activation is not None:
            return "the gptq format holds w4a16 and w8a16 only"
        per_word = WORD // bits
        for which, length in zip(("output", "input"), shape, strict=True):
            if length % per_word:
                return f"its {length} {which} channels are no multiple of {per_word}"
        return group_problem(scheme, shape)

    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of the four tensors."""
        bits = integer_bits(scheme) or 0
        groups = shape[1] // scheme.group_size if scheme.group_size else 1
        zeros = groups * shape[0] * bits // 8
        return shape[0] * shape[1] * bits // 8 + zeros + 2 * groups * shape[0] + 4 * shape[1]

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer."""
        bits = integer_bits(layer.scheme) or 0
        codes, zeros, scales = unsigned_parts(layer, bits)
        columns = codes.shape[1]
        group = layer.scheme.group_size or columns
        tensors = {
            "qweight": pack_words(codes.T, bits, axis=0),
            "qzeros": pack_words(zeros.T - _less(layer.scheme), bits, axis=1),
            "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
            "g_idx": (np.arange(columns) // group).astype(np.int32),
        }
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer; its scales are those of float16."""
        bits = integer_bits(scheme) or 0
        columns = len(take(name, tensors, "g_idx", np.int32))
        scales = take(name, tensors, "scales", np.float16)
        codes = unpack_words(take(name, tensors, "qweight", np.int32), bits, 0, columns).T
        stored = take(name, tensors, "qzeros", np.int32)
        zeros = unpack_words(stored, bits, 1, scales.shape[1]) + np.uint8(_less(scheme))
        parts = (codes, zeros.T, scales.T)
        return signed_layer(name, scheme, parts, tensors.get("bias"), model_dtype)

    def config(self, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return what GPTQModel writes; float layers are excluded by ``dynamic`` rules."""
        scheme = only_scheme(layers, self.name)
        weight = scheme.weight
        assert weight is not None  # narrowing: only_scheme returns no float one
        floats = [name for name, own in layers.items() if own.is_float]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": integer_bits(scheme),
            "group_size": scheme.group_size or -1,
            "sym": weight.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq" if weight.symmetric else "gptq_v2",
        }
        if floats:
            config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in floats}
        return config


def _less(scheme: QuantScheme) -> int:
    """Return how much less than a zero point is stored."""
    return 1 if scheme.weight is not None and scheme.weight.symmetric else 0
