"""The neutral object in which a quantized linear layer is handed from a method to a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from array_api_compat import array_namespace

from slim_core.dtypes import INT8
from slim_core.kronecker import restore_weight
from slim_core.numerics import dequantize_weight, fold_static
from slim_core.scheme import QuantScheme, Variant
from slim_core.two_stage import SECOND_SCALE, two_stage_integers

Array = Any

LAYER_TENSORS = (
    "codes",
    "weight_scale",
    "weight_offset",
    "input_scale",
    "input_offset",
    "bias",
)  # fields of a QuantizedLinear that are arrays, besides the extras


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLinear:
    """Integer codes of a linear layer and everything needed to compute with them.

    Parameters
    ----------
    name : str
        Dotted name of the layer in the checkpoint, without ``.weight``.
    scheme : QuantScheme
    codes : array, int8, shape (out, in)
        One code per element, also for types of fewer than 8 bits.
    weight_scale, weight_offset : array, float32
        Shape (out, 1), (out, groups), (1,) or (blocks,).
    input_scale, input_offset : array, float32, shape (1,), or None
        For statically quantized activations.
    bias : array, shape (out,), or None
        The float bias, in the dtype of the model.
    model_dtype : str
        ``float16``, ``bfloat16`` or ``float32``: decides how some formats store scales.
    extras : mapping of str to array, float32
        Further tensors of the scheme, by the local names that they have in a checkpoint.
    """

    name: str
    scheme: QuantScheme
    codes: Array
    weight_scale: Array
    weight_offset: Array
    input_scale: Array | None = None
    input_offset: Array | None = None
    bias: Array | None = None
    model_dtype: str = "float32"
    notes: tuple[str, ...] = field(default=())
    extras: Mapping[str, Array] = field(default_factory=dict)

    def dequantized(self) -> Array:
        """Return the float32 weight, shape (out, in), that the layer stands for."""
        weight = self.multiplied()
        if self.scheme.variant is Variant.FLATQUANT:
            return restore_weight(weight, self.extras["left_trans"], self.extras["right_trans"])
        return weight

    def multiplied(self) -> Array:
        """Return the float32 matrix, shape (out, in), by which the engine multiplies.

        It is the weight, but for layers that transform their input first.
        """
        if SECOND_SCALE in self.extras:
            return two_stage_integers(self.codes, self.extras[SECOND_SCALE]) * self.weight_scale
        dtype = INT8 if self.scheme.weight is None else self.scheme.weight.dtype
        return dequantize_weight(self.codes, self.weight_scale, self.weight_offset, dtype)

    def folded(self) -> tuple[Array, Array]:
        """Return ``deq_scale`` and ``quant_bias`` (:func:`slim_core.numerics.fold_static`)."""
        bias = self.bias
        if bias is not None:
            xp = array_namespace(bias)
            bias = xp.astype(bias, xp.float32)
        return fold_static(self.codes, self.weight_scale, self.input_scale, self.input_offset, bias)

    def map_tensors(self, convert: Callable[[Array], Array]) -> QuantizedLinear:
        """Return the layer with every tensor converted: moved, or made one of another library."""
        fields: dict[str, Any] = {
            name: convert(tensor)
            for name in LAYER_TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        extras = {name: convert(tensor) for name, tensor in self.extras.items()}
        return replace(self, **fields, extras=extras)

    def rows(self, part: slice) -> QuantizedLinear:
        """Return the layer of some of the output channels, sharing memory.

        Blocks, which can lie across rows, cannot be cut.
        """
        whole = self.weight_scale.ndim == 1  # one scale for all rows
        second = {name: self.extras[name][part] for name in (SECOND_SCALE,) if name in self.extras}
        return replace(
            self,
            codes=self.codes[part],
            weight_scale=self.weight_scale if whole else self.weight_scale[part],
            weight_offset=self.weight_offset if whole else self.weight_offset[part],
            bias=None if self.bias is None else self.bias[part],
            extras={**self.extras, **second},
        )

    def renamed(self, name: str) -> QuantizedLinear:
        """Return the same layer under another name."""
        return replace(self, name=name)
