"""The two safetensors layouts of Ascend engines: ``ascend_v1`` and ``safe_tensor``.

``ascend_v1`` is read by vllm-ascend, SGLang and MindIE, ``safe_tensor`` by MindIE.  Tensor names,
dtypes and shapes are those of ``docs/formats/ascend.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from slim_core.errors import FormatError
from slim_core.formats.base import Format, Tensors, to_numpy
from slim_core.layers import QuantizedLinear
from slim_core.numerics import unfold_scale
from slim_core.scheme import QuantScheme, Variant

DESCRIPTION_FILE = "quant_model_description.json"


class SafeTensorFormat(Format):
    """Layout of the ``safe_tensor`` save type: typed file names, no version key."""

    name: ClassVar[str] = "safe_tensor"

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why the layer cannot be held: a group size that does not divide."""
        if scheme.group_size and shape[1] % scheme.group_size:
            return f"group size {scheme.group_size} does not divide its {shape[1]} input channels"
        return None

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer, named and typed as the engines read them."""
        tensors: Tensors = {"weight": to_numpy(layer.codes, np.int8)}
        if layer.scheme.variant is not Variant.SPARSE:
            tensors["weight_scale"] = to_numpy(layer.weight_scale, np.float32)
            tensors["weight_offset"] = to_numpy(layer.weight_offset, np.float32)
        if layer.scheme.is_static:
            deq_scale, quant_bias = layer.folded()
            tensors["input_scale"] = to_numpy(layer.input_scale, np.float32)
            tensors["input_offset"] = to_numpy(layer.input_offset, np.float32)
            tensors["quant_bias"] = to_numpy(quant_bias, np.int32)
            tensors["deq_scale"] = encode_deq_scale(
                to_numpy(deq_scale, np.float32), layer.model_dtype
            )
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer that these tensors hold, after checking dtypes and shapes."""
        codes = _take(name, tensors, "weight", np.int8, None)
        if codes.ndim != 2:
            raise FormatError(f"{name}.weight must have shape (out, in), not {codes.shape}")
        rows, columns = codes.shape
        reason = self.unsupported(scheme, (rows, columns))
        if reason is not None:
            raise FormatError(f"{name} cannot be {scheme}: {reason}")
        scale_shapes = [(rows, 1), (1,)]
        if scheme.group_size:
            scale_shapes = [(rows, columns // scheme.group_size)]
        layer: dict[str, Any] = {"bias": tensors.get("bias")}
        if scheme.is_static:
            for key in ("input_scale", "input_offset"):
                layer[key] = _take(name, tensors, key, np.float32, [(1,)])
            stored = np.int64 if model_dtype != "bfloat16" else np.float32
            deq_scale = _take(name, tensors, "deq_scale", stored, [(rows,), (1,)])
            _take(name, tensors, "quant_bias", np.int32, [(rows,)])
        if scheme.variant is Variant.SPARSE:
            scale = unfold_scale(decode_deq_scale(deq_scale), layer["input_scale"])
            layer["weight_scale"] = scale if scale.shape == (1,) else scale[:, None]
            layer["weight_offset"] = np.zeros_like(layer["weight_scale"])
        else:
            for key in ("weight_scale", "weight_offset"):
                layer[key] = _take(name, tensors, key, np.float32, scale_shapes)
        return QuantizedLinear(name, scheme, codes, **layer, model_dtype=model_dtype)

    def weight_file(self, model_type: str) -> str:
        """Return ``quant_model_weight_<type>``."""
        return f"quant_model_weight_{model_type.lower()}"

    def description_file(self, model_type: str) -> str:
        """Return ``quant_model_description_<type>.json``."""
        return f"quant_model_description_{model_type.lower()}.json"

    def description(self, model_type: str, group_size: int) -> dict[str, Any]:
        """Return the one key that MindIE reads here."""
        return {"model_quant_type": model_type}


class AscendV1Format(SafeTensorFormat):
    """Layout of the ``ascendV1`` save type, the default: fixed description name and a version."""

    name: ClassVar[str] = "ascend_v1"

    def description_file(self, model_type: str) -> str:
        """Return the only name that vllm-ascend and SGLang look for."""
        return DESCRIPTION_FILE

    def description(self, model_type: str, group_size: int) -> dict[str, Any]:
        """Return version, type and an integer group size (0: no groups)."""
        return {
            "version": "1.0.0",
            "model_quant_type": model_type,
            "group_size": group_size,
            "metadata": {},
            "optional": {},
        }


def encode_deq_scale(deq_scale: np.ndarray, model_dtype: str) -> np.ndarray:
    """Return the scale as the matrix-multiply operator of Ascend wants it.

    Unless the model is bfloat16, the float32 bit pattern is stored zero-extended in int64.
    """
    if model_dtype == "bfloat16":
        return deq_scale
    return deq_scale.view(np.uint32).astype(np.int64)


def decode_deq_scale(stored: np.ndarray) -> np.ndarray:
    """Return the float32 scale of either stored form."""
    if stored.dtype == np.float32:
        return stored
    return (stored & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def _take(
    name: str,
    tensors: Mapping[str, np.ndarray],
    key: str,
    dtype: Any,
    shapes: list[tuple[int, ...]] | None,
) -> np.ndarray:
    """Return a tensor of a layer, checked."""
    if key not in tensors:
        raise FormatError(f"{name} has no {key}; its tensors are {', '.join(sorted(tensors))}")
    tensor = tensors[key]
    if tensor.dtype != dtype:
        raise FormatError(f"{name}.{key} must be {np.dtype(dtype).name}, not {tensor.dtype}")
    if shapes is not None and tensor.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise FormatError(f"{name}.{key} must have shape {wanted}, not {tensor.shape}")
    return tensor
