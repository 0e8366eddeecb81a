"""The two safetensors layouts of Ascend engines: ``ascend_v1`` and ``safe_tensor``.

``ascend_v1`` is read by vllm-ascend, SGLang and MindIE, ``safe_tensor`` by MindIE.  Tensor names,
dtypes and shapes are those of ``docs/formats/ascend.md`` and of :mod:`slim_core.formats.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from slim_core.errors import FormatError
from slim_core.formats.base import Format, Tensors, to_numpy
from slim_core.formats.codes import (
    load_codes,
    load_power,
    store_codes,
    store_power,
    stored_shape,
)
from slim_core.formats.layout import TensorSpec, layer_layout, layout_problem
from slim_core.layers import QuantizedLinear
from slim_core.numerics import unfold_scale
from slim_core.scheme import QuantScheme, Variant
from slim_core.two_stage import SECOND_SCALE, two_stage_integers

DESCRIPTION_FILE = "quant_model_description.json"


class SafeTensorFormat(Format):
    """Layout of the ``safe_tensor`` save type: typed file names, no version key."""

    name: ClassVar[str] = "safe_tensor"
    packed: ClassVar[bool] = False

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why the layer cannot be held: a group size that does not divide, an odd axis."""
        return None if scheme.is_float else layout_problem(scheme, shape, packed=self.packed)

    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of the stored tensors without the float bias."""
        specs = layer_layout(name, scheme, shape, model_dtype, packed=self.packed)
        return sum(spec.nbytes for spec in specs.values())

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer, named and typed as the engines read them."""
        scheme = layer.scheme
        rows, columns = layer.codes.shape
        specs = self._layout(layer.name, scheme, (rows, columns), layer.model_dtype)
        made = _folded(layer) if scheme.is_static else {}
        made["weight"] = store_codes(to_numpy(layer.codes, np.int8), scheme, packed=self.packed)
        tensors: Tensors = {
            local: made[local] if local in made else _parameter(layer, local, spec)
            for local, spec in specs.items()
        }
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer that these tensors hold, after checking dtypes and shapes."""
        shape = stored_shape(name, scheme, tensors, packed=self.packed)
        specs = self._layout(name, scheme, shape, model_dtype)
        found = {local: _take(name, tensors, local, spec) for local, spec in specs.items()}
        scale = _weight_scale(scheme, found)
        return QuantizedLinear(
            name,
            scheme,
            load_codes(found["weight"], scheme, shape, packed=self.packed),
            scale,
            found.get("weight_offset", np.zeros_like(scale)),
            found.get("input_scale"),
            found.get("input_offset"),
            tensors.get("bias"),
            model_dtype,
            extras={local: found[local] for local in _EXTRAS if local in found},
        )

    def _layout(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> dict[str, TensorSpec]:
        reason = self.unsupported(scheme, shape)
        if reason is not None:
            raise FormatError(f"{name} cannot be {scheme}: {reason}")
        return layer_layout(name, scheme, shape, model_dtype, packed=self.packed)

    def type_name(self, ascend_type: str) -> str:
        """Return ``W8A8`` for ``W8A8_MIX``, which this layout does not know; else the type."""
        return "W8A8" if ascend_type == "W8A8_MIX" else ascend_type

    def weight_file(self, model_type: str) -> str:
        """Return ``quant_model_weight_<type>``."""
        return f"quant_model_weight_{self.type_name(model_type).lower()}"

    def description_file(self, model_type: str) -> str:
        """Return ``quant_model_description_<type>.json``."""
        return f"quant_model_description_{self.type_name(model_type).lower()}.json"

    def config_changes(self, model_type: str, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return what MindIE wants to find in the configuration."""
        return {"quantize": self.type_name(model_type).lower()}

    def description(self, model_type: str, group_size: int) -> dict[str, Any]:
        """Return the one key that MindIE reads here."""
        return {"model_quant_type": self.type_name(model_type)}


class AscendV1Format(SafeTensorFormat):
    """Layout of the ``ascendV1`` save type, the default: fixed description name and a version."""

    name: ClassVar[str] = "ascend_v1"
    packed: ClassVar[bool] = True

    def config_changes(self, model_type: str, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return nothing: the description file says it all."""
        return {}

    def type_name(self, ascend_type: str) -> str:
        """Return the type as it is."""
        return ascend_type

    def description_file(self, model_type: str) -> str:
        """Return the only name that vllm-ascend and SGLang look for."""
        return DESCRIPTION_FILE

    def description(self, model_type: str, group_size: int) -> dict[str, Any]:
        """Return version, type and an integer group size (0: no groups)."""
        # Transforms of whole rows: devices cannot share the input channels of such a layer.
        one = {"max_supported_tp": 1} if model_type == "W4A4_MXFP4_FLATQUANT" else {}
        return {
            "version": "1.0.0",
            "model_quant_type": model_type,
            "group_size": group_size,
            **one,
            "metadata": {},
            "optional": {},
        }


# Tensors that a QuantizedLinear holds under the name that they have on disk.
_EXTRAS = (SECOND_SCALE, "left_trans", "right_trans", "clip_ratio")


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


def scale_bias(layer: QuantizedLinear, slices: int) -> np.ndarray:
    """Return what int4 kernels of unsigned nibbles add for the shift by 8.

    ``8 * sum_k W[o, k]`` over each of so many equal slices of the input channels, float32, shape
    (out, slices).
    """
    integers = layer.codes
    if SECOND_SCALE in layer.extras:
        integers = two_stage_integers(integers, layer.extras[SECOND_SCALE])
    integers = to_numpy(integers, np.float32)  # below 2**24 also in their sums: exact
    sums: np.ndarray = integers.reshape(len(integers), slices, -1).sum(axis=2)
    bias: np.ndarray = 8 * sums * to_numpy(layer.weight_scale, np.float32)
    return bias


def _folded(layer: QuantizedLinear) -> Tensors:
    """Return what statically quantized layers multiply with and add to integer products."""
    deq_scale, quant_bias = layer.folded()
    return {
        "deq_scale": encode_deq_scale(to_numpy(deq_scale, np.float32), layer.model_dtype),
        "quant_bias": to_numpy(quant_bias, np.int32),
    }


def _parameter(layer: QuantizedLinear, local: str, spec: TensorSpec) -> np.ndarray:
    """Return a stored tensor that is neither the weight nor folded."""
    if local == "scale_bias":
        return scale_bias(layer, spec.shape[1])
    if local == "weight_shape":
        return np.array(layer.codes.shape, spec.dtype)
    if local == "weight_offset_second":
        return np.zeros(spec.shape, spec.dtype)
    if local in _EXTRAS:
        return to_numpy(layer.extras[local], np.float32)
    field = to_numpy(getattr(layer, "weight_scale" if local == "weight_absmax" else local))
    return store_power(field) if spec.dtype == np.uint8 else field.astype(np.float32, copy=False)


def _weight_scale(scheme: QuantScheme, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the float32 weight scale that the stored tensors of a layer hold or imply."""
    if scheme.variant is Variant.SPARSE:
        scale: np.ndarray = unfold_scale(
            decode_deq_scale(tensors["deq_scale"]), tensors["input_scale"]
        )
        return scale if scale.shape == (1,) else scale[:, None]
    if "weight_absmax" in tensors:
        return tensors["weight_absmax"]
    scale = tensors["weight_scale"]
    return load_power(scale) if scale.dtype == np.uint8 else scale


def _take(name: str, tensors: Mapping[str, np.ndarray], local: str, spec: TensorSpec) -> np.ndarray:
    """Return a tensor of a layer, checked."""
    if local not in tensors:
        raise FormatError(f"{name} has no {local}; its tensors are {', '.join(sorted(tensors))}")
    tensor = tensors[local]
    if tensor.dtype != spec.dtype:
        raise FormatError(f"{name}.{local} must be {spec.dtype.name}, not {tensor.dtype}")
    if tensor.shape != spec.shape:
        raise FormatError(f"{name}.{local} must have shape {spec.shape}, not {tensor.shape}")
    return tensor
