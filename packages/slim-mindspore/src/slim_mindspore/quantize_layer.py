"""Quantizing one linear cell."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.errors import StructureError
from slim_core.layers import QuantizedLinear
from slim_core.numerics import affine_params
from slim_core.scheme import QuantScheme
from slim_mindspore.linears import bias_of, weight_of
from slim_mindspore.methods.awq import awq
from slim_mindspore.methods.gptq import gptq
from slim_mindspore.methods.rounding import int_type, round_to_nearest
from slim_mindspore.methods.smooth import smooth_scales
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.quantized_layer import SmoothedLinear
from slim_mindspore.statistics import InputStatistics

Array = np.ndarray


def quantize_linear(
    name: str,
    cell: Any,
    scheme: QuantScheme,
    config: QuantizationConfig,
    statistics: InputStatistics | None = None,
    storage: Any = np.float32,
) -> SmoothedLinear:
    """Quantize a linear cell by the algorithm that the configuration names.

    Parameters
    ----------
    name : str
    cell : Cell
        Stays as it is.
    scheme : QuantScheme
        Not float.
    config : QuantizationConfig
    statistics : InputStatistics, optional
        Of the cell's inputs; needed by everything but rounding.
    storage : numpy dtype
        In which the scales of static inputs will be stored.
    """
    if scheme.weight is None:
        raise StructureError(f"{name} is to stay in floating point")
    weight = weight_of(cell)
    smooth: Array | None = None
    input_scale = input_offset = None
    notes: tuple[str, ...] = ()
    method = "rtn"
    policy = config.policy_of(name)
    smooth_args, awq_args, gptq_args = policy.smooth_args(), policy.awq_args(), policy.gptq_args()
    if config.smooth_into == "norm":  # which has been done; AWQ still looks for the range
        smooth_args = None
        awq_args = None if awq_args is None else awq_args.unscaled()
    if awq_args is not None and statistics is not None:
        found = awq(
            name,
            weight,
            statistics.rows,
            statistics.mean,
            scheme.weight,
            awq_args,
            config.weight_range,
        )
        codes, scale, offset = found.codes, found.scale, found.offset
        smooth = None if (found.smooth == 1).all() else found.smooth
        method, notes = "awq", (f"alpha {found.alpha:g}",)
    elif gptq_args is not None and statistics is not None:
        made = gptq(name, weight, statistics.hessian, scheme.weight, gptq_args, config.weight_range)
        codes, scale, offset, method = made.codes, made.scale, made.offset, "gptq"
        if made.damp_percent != gptq_args.damp_percent:
            notes = (f"damp_percent raised to {made.damp_percent:g}",)
    else:
        if smooth_args is not None and statistics is not None:
            smooth, method = smooth_scales(statistics.peak, weight, smooth_args.alpha), "smooth"
        if scheme.is_static and statistics is not None:
            input_scale, input_offset = input_params(statistics, smooth, scheme, storage)
            if smooth is not None:
                # What is stored is their product: the weight has to undo the rounded one.
                smooth = stored(input_scale * smooth, storage) / input_scale
        if smooth is not None:
            weight = weight * smooth
        codes, scale, offset = round_to_nearest(name, weight, scheme.weight, config.weight_range)
    layer = QuantizedLinear(
        name=name,
        scheme=scheme,
        codes=codes,
        weight_scale=scale,
        weight_offset=offset,
        input_scale=input_scale,
        input_offset=input_offset,
        bias=bias_of(cell),
        notes=notes,
    )
    return SmoothedLinear(layer, smooth, method)


def input_params(
    statistics: InputStatistics,
    smooth: Array | None,
    scheme: QuantScheme,
    storage: Any = np.float32,
) -> tuple[Array, Array]:
    """Return scale and offset, shape (1,), of inputs divided by the smoothing scales.

    The scale is rounded to ``storage``, in which engines keep it, and the offset belongs to the
    rounded one.
    """
    if scheme.activation is None:
        raise StructureError("the scheme does not quantize activations")
    divisor = np.float32(1) if smooth is None else smooth
    low, high = (
        np.asarray(end, np.float32).reshape(1)
        for end in ((statistics.low / divisor).min(), (statistics.high / divisor).max())
    )
    scale = stored(np.asarray(affine_params(low, high, scheme.activation)[0]), storage)
    dtype = int_type(scheme.activation)
    offset = np.rint(-np.minimum(low, np.float32(0)) / scale) + dtype.min
    return scale, np.clip(offset, dtype.min, dtype.max).astype(np.float32)


def stored(scale: Array, dtype: Any) -> Array:
    """Return scales as they come back from a dtype, float32; those that it cannot hold as is."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(dtype).astype(np.float32)
    return np.where(np.isfinite(rounded) & (rounded > 0), rounded, scale).astype(np.float32)


def relative_errors(
    cell: Any, result: SmoothedLinear, statistics: InputStatistics | None
) -> tuple[float, float | None]:
    """Return the relative error of the weight, and of the output if products were summed up."""
    weight = weight_of(cell).astype(np.float64)
    wrong = result.dequantized() - weight
    error = float(np.linalg.norm(wrong) / max(np.linalg.norm(weight), 1e-30))
    gram = None if statistics is None else statistics.gram
    if gram is None:
        return error, None
    output = np.sum((weight @ gram) * weight)
    lost = np.sum((wrong @ gram) * wrong)
    return error, float(np.sqrt(max(lost, 0.0) / max(output, 1e-30)))
