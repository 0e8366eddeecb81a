"""Linear cells that compute from integer weights, on any device.

Their parameters have the names and dtypes of MindSpore Golden Stick, compute dtype float32 (see
:mod:`slim_mindspore.layouts`), so ``network.parameters_dict()`` is what its checkpoints hold; only
int4 codes lie unpacked in int8, since a CPU has no operator on Int4.

On a CPU the cells work in floating point where a fused operator of Ascend works in integers; sums
of integers are exact, since they are formed in pieces short enough for the 24 bits of float32 and
added in int32.  Inputs of float64 are computed in float64, on the scales as they are stored, all
others in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.numerics import EPS
from slim_core.validate import check_choice
from slim_mindspore.ascend import FusedDynamic, FusedStatic, FusedWeightOnly, on_ascend
from slim_mindspore.framework import Parameter, Tensor, ms, nn, ops
from slim_mindspore.layouts import LAYOUT_OF, encode_layer
from slim_mindspore.linears import stores_rows
from slim_mindspore.quantized_layer import SmoothedLinear

# 1024 products of int8 by int8 stay within 2**24.
EXACT_COLUMNS = 1024


def quant_cell(result: SmoothedLinear, activation: Any = None, layout: str = "gs-ptq") -> Any:
    """Return the cell that computes a quantized layer.

    Parameters
    ----------
    result : SmoothedLinear
    activation : Cell, optional
        Applied to the output, as in ``nn.Dense``.
    layout : str
        Whose names the parameters have: ``gs-ptq``, ``gs-rtn`` or ``gs-sq``.

    Raises
    ------
    InvalidValueError
        The layout is another one.
    FormatError
        The layout cannot hold the layer.
    """
    scheme = result.layer.scheme
    check_choice("layout", layout, LAYOUT_OF.values())
    if layout == "gs-rtn":
        return RtnLinear(result, layout, activation)
    if layout == "gs-sq":
        return SmoothQuantLinear(result, layout, activation)
    if scheme.is_static:
        return StaticLinear(result, layout, activation)
    if scheme.is_dynamic:
        return DynamicLinear(result, layout, activation)
    return WeightOnlyLinear(result, layout, activation)


class _Part(nn.Cell):  # type: ignore[misc]
    """A level of names between a cell and its parameters."""


class _QuantLinear(nn.Cell):  # type: ignore[misc]
    """What the cells share: parameters, sizes, and the activation of the replaced cell."""

    def __init__(self, result: SmoothedLinear, layout: str, activation: Any) -> None:
        super().__init__()
        layer = result.layer
        self.scheme_name = str(layer.scheme)
        self.out_features, self.in_features = layer.codes.shape
        self.smoothed = result.smooth is not None
        self.biased = layer.bias is not None
        self.activation = activation
        self.activated = activation is not None
        self.fused = on_ascend()
        for name, array in encode_layer(layout, result, packed=False).items():
            *parts, last = name.split(".")
            holder: Any = self
            for part in parts:
                if not hasattr(holder, part):
                    setattr(holder, part, _Part())
                holder = getattr(holder, part)
            setattr(holder, last, constant(array, last))

    def finish(self, y: Any) -> Any:
        """Apply the activation of the replaced cell."""
        return self.activation(y) if self.activated else y

    def integer_product(self, codes: Any, weight: Any) -> Any:
        """Return the int32 products, exact, of activation codes and the weight."""
        codes, weight = ops.cast(codes, ms.float32), ops.cast(weight, ms.float32)
        total = None
        for start in range(0, self.in_features, EXACT_COLUMNS):
            end = min(start + EXACT_COLUMNS, self.in_features)
            part = ops.matmul(codes[..., start:end], weight[:, start:end].T)
            part = ops.cast(part, ms.int32)
            total = part if total is None else total + part
        return total


class WeightOnlyLinear(_QuantLinear):
    """Dequantizes the weight and multiplies; scales per channel or per group."""

    def __init__(self, result: SmoothedLinear, layout: str, activation: Any) -> None:
        super().__init__(result, layout, activation)
        self.groups = result.layer.weight_scale.shape[-1]
        self.kernel: Any = None
        if self.fused and self.groups == 1:
            self.kernel = FusedWeightOnly()

    def stored(self) -> Any:
        """Return codes, scales and negated zero points."""
        return self._layer.weight, self._layer.matmul.weight_scale, self._layer.matmul.weight_zp

    def bias(self) -> Any:
        """Return the bias."""
        return self._layer.bias

    def construct(self, x: Any) -> Any:
        """Return outputs of (..., in) inputs."""
        x = ops.cast(x, working_type(x))
        if self.smoothed:
            x = x * self._layer.matmul.smooth_scale
        codes, scale, zero = self.stored()
        if self.kernel is not None:
            y = self.kernel(x, codes, scale, zero)
        else:
            y = ops.matmul(x, self.dequantized(codes, scale, zero, x.dtype).T)
        return self.finish(y + self.bias() if self.biased else y)

    def dequantized(self, codes: Any, scale: Any, zero: Any, dtype: Any) -> Any:
        """Return the weight (out, in)."""
        columns = self.in_features // self.groups
        codes = ops.cast(codes, dtype).reshape(self.out_features, self.groups, columns)
        shape = (self.groups, self.out_features)
        scale, zero = (item.reshape(shape).T.expand_dims(2) for item in (scale, zero))
        return ((codes + zero) * scale).reshape(self.out_features, self.in_features)


class RtnLinear(WeightOnlyLinear):
    """:class:`WeightOnlyLinear` with the names of layout gs-rtn."""

    def stored(self) -> Any:
        """Return codes, scales and negated zero points."""
        quantizer = self._weight_quantizer
        return self._handler.weight, quantizer.scale, quantizer.zp_neg

    def bias(self) -> Any:
        """Return the bias."""
        return self._handler.bias


class StaticLinear(_QuantLinear):
    """Quantizes its input with fixed parameters and multiplies integers."""

    def __init__(self, result: SmoothedLinear, layout: str, activation: Any) -> None:
        super().__init__(result, layout, activation)
        self.powers = Tensor(np.float32(2) ** (np.arange(256, dtype=np.float32) - 150))
        self.kernel: Any = FusedStatic() if self.fused else None

    def construct(self, x: Any) -> Any:
        """Return outputs of (..., in) inputs."""
        scale, zero = self.quant_op.input_scale, self.quant_op.input_zp
        matmul = self._layer.matmul
        if self.kernel is not None:
            y = self.kernel(
                x, scale, zero, self._layer.weight, matmul.dequant_scale, matmul.quant_bias
            )
            return self.finish(y)
        total = self.integer_product(self.codes(x, scale, zero), self._layer.weight)
        total = ops.cast(total + matmul.quant_bias, working_type(x))
        return self.finish(total * self.from_bits(matmul.dequant_scale))

    def codes(self, x: Any, scale: Any, zero: Any) -> Any:
        """Return the codes of the input, held in floating point."""
        dtype = working_type(x)
        scale, zero = ops.cast(scale, dtype), ops.cast(zero, dtype)
        return ops.clamp(ops.round(ops.cast(x, dtype) / scale + zero), -128, 127)

    def from_bits(self, bits: Any) -> Any:
        """Return the positive float32 numbers whose bits int64 ones hold."""
        exponent = ops.bitwise_and(ops.bitwise_right_shift(bits, 23), 255)
        mantissa = ops.cast(ops.bitwise_and(bits, 0x7FFFFF) + 0x800000, ms.float32)
        return mantissa * ops.gather(self.powers, ops.cast(exponent, ms.int32), 0)


class SmoothQuantLinear(StaticLinear):
    """:class:`StaticLinear` with the names of layout gs-sq; its bias is a float one."""

    def construct(self, x: Any) -> Any:
        """Return outputs of (..., in) inputs."""
        quantizer = self._input_quantizer
        codes = self.codes(x, quantizer.t_scale, quantizer.t_zp)
        total = ops.cast(self.integer_product(codes, self._handler.weight), working_type(x))
        scale = self.from_bits(self._output_quantizer.scale)
        return self.finish(total * scale + self._handler.bias)


class DynamicLinear(_QuantLinear):
    """Quantizes each token by its own largest magnitude and multiplies integers."""

    def __init__(self, result: SmoothedLinear, layout: str, activation: Any) -> None:
        super().__init__(result, layout, activation)
        self.kernel: Any = FusedDynamic() if self.fused else None

    def construct(self, x: Any) -> Any:
        """Return outputs of (..., in) inputs."""
        weight, weight_scale = self._layer.weight, self._layer.matmul.weight_scale
        smooth = self.dyn_quant_op.smooth_scale if self.smoothed else None
        if self.kernel is not None:
            y = self.kernel(x, smooth, weight, weight_scale)
        else:
            x = ops.cast(x, working_type(x))
            x = x * smooth if self.smoothed else x
            scale = ops.maximum(ops.amax(ops.abs(x), -1, True) / 127.0, EPS)
            total = self.integer_product(ops.clamp(ops.round(x / scale), -128, 127), weight)
            y = ops.cast(total, x.dtype) * scale * weight_scale
        return self.finish(y + self._layer.bias if self.biased else y)


def working_type(x: Any) -> Any:
    """Return the dtype in which a cell computes for its input: float64, or float32."""
    return ms.float64 if x.dtype == ms.float64 else ms.float32


def constant(array: np.ndarray, name: str) -> Any:
    """Return an array as a parameter that is not trained."""
    return Parameter(Tensor(np.ascontiguousarray(array)), name=name, requires_grad=False)


def activation_of(cell: Any) -> Any:
    """Return the activation that a linear cell applies, None if there is none."""
    return getattr(cell, "activation", None)


def find_quantized(network: Any) -> dict[str, Any]:
    """Return the quantized linear cells of a network by their full names."""
    cells = network.cells_and_names()
    return {name: cell for name, cell in cells if isinstance(cell, _QuantLinear)}


def weight_shape(cell: Any) -> tuple[int, int]:
    """Return outputs and inputs of a linear cell, float or quantized."""
    if isinstance(cell, _QuantLinear):
        return cell.out_features, cell.in_features
    rows, columns = cell.weight.shape
    return (rows, columns) if stores_rows(cell) else (columns, rows)
