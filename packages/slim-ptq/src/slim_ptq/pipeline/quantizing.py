"""From one planned layer and its float weight to the quantized layer and its line in the report."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from slim_core.checkpoint import Checkpoint
from slim_core.export import CheckpointExport
from slim_core.layers import QuantizedLinear
from slim_core.logging import get_logger
from slim_core.method import MethodSpec
from slim_core.plan import LayerPlan
from slim_core.report import LayerReport
from slim_core.scheme import Granularity, QuantScheme
from slim_ptq.methods import (
    LayerInputs,
    MinMax,
    Parts,
    WeightMethod,
    make_method,
    relative_error,
)
from slim_ptq.modules import FakeQuantLinear, on_device
from slim_ptq.tensors import from_numpy

_PART = 1 << 20  # weights
_CPU = torch.device("cpu")

_log = get_logger("ptq")


def read_bias(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """Return the float bias of a layer, None if it has none."""
    bias = f"{name}.bias"
    return from_numpy(checkpoint.load(bias)) if bias in checkpoint.tensors else None


def quantize_layer(
    plan: LayerPlan,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    model_dtype: str,
    inputs: LayerInputs | None = None,
    input_params: tuple[torch.Tensor, torch.Tensor] | None = None,
    parts: Parts | None = None,
) -> tuple[QuantizedLinear, float]:
    """Quantize a planned layer; returns it and the relative error of its weight.

    Parameters
    ----------
    parts : Parts, optional
        The quantized weight, if it was quantized with others.
    """
    layer = (
        quantize_weight(
            plan.name,
            plan.scheme,
            plan.method,
            weight,
            bias,
            model_dtype=model_dtype,
            inputs=inputs,
        )
        if parts is None
        else parts.layer(plan.name, plan.scheme, bias, model_dtype)
    )
    if input_params is not None:
        scale, offset = (part.to(weight.device) for part in input_params)
        layer = replace(layer, input_scale=scale, input_offset=offset)
    return layer, relative_error(weight, layer)


def quantize_weight(
    name: str,
    scheme: QuantScheme,
    method: MethodSpec,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    model_dtype: str,
    inputs: LayerInputs | None = None,
) -> QuantizedLinear:
    """Quantize the weight of a layer by a method.

    Parameters
    ----------
    inputs : LayerInputs, optional
        There if the method needs calibration data.  A layer that no token reached, an expert, is
        rounded to nearest; its notes say so.
    """
    assert scheme.weight is not None  # narrowing: only quantized layers come here
    made: WeightMethod = make_method(method)
    notes: tuple[str, ...] = ()
    if made.needs and inputs is not None and not inputs.count:
        notes = (f"no calibration token reached it: minmax in the place of {method}",)
        _log.warning("%s: %s", name, notes[0])
        made = MinMax()
    layer = made.quantize(name, weight, scheme.weight, inputs).layer(
        name, scheme, bias, model_dtype
    )
    return replace(layer, notes=notes + layer.notes)


@dataclass(frozen=True)
class Made:
    """A layer that was quantized, on the CPU, and what that cost."""

    layer: QuantizedLinear
    weight_error: float
    output_error: float | None
    seconds: float


def made_layer(
    layer: QuantizedLinear, weight_error: float, output_error: float | None, started: float
) -> Made:
    """Return what :func:`write_layer` takes; ``started`` is a time of ``time.perf_counter``."""
    seconds = time.perf_counter() - started
    return Made(on_device(layer, _CPU), weight_error, output_error, seconds)


def write_layer(
    export: CheckpointExport,
    plan: LayerPlan,
    made: Made,
    *,
    bytes_before: int,
    transposed: bool = False,
) -> LayerReport:
    """Write a layer to the checkpoint and return its line in the report."""
    bytes_after = export.add_layer(made.layer, transposed=transposed)
    return LayerReport(
        name=plan.name,
        scheme=str(plan.scheme),
        type=plan.scheme.ascend_type,
        method=str(plan.method),
        shape=plan.shape,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        weight_error=made.weight_error,
        output_error=made.output_error,
        seconds=made.seconds,
        notes=made.layer.notes,
    )


def float_report(plan: LayerPlan, nbytes: int) -> LayerReport:
    """Return the line of a layer that stays in floating point."""
    return LayerReport(
        name=plan.name,
        scheme="float",
        type="FLOAT",
        method="",
        shape=plan.shape,
        bytes_before=nbytes,
        bytes_after=nbytes,
        weight_error=0.0,
        notes=(plan.reason,),
    )


def output_error(layer: QuantizedLinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the relative error of the layer's output, without bias, for input ``x``."""
    x = x.float()
    layer = replace(layer, bias=None)
    scheme = layer.scheme.weight
    across = scheme is not None and scheme.granularity is Granularity.PER_BLOCK
    step = len(weight) if across else max(1, _PART // weight.shape[1])
    norm = error = 0.0
    for start in range(0, len(weight), step):  # the float weights of a part of the rows at a time
        rows = slice(start, start + step)
        expected = x @ weight[rows].float().T
        found = FakeQuantLinear(layer if across else layer.rows(rows), torch.float32)(x)
        norm += float(torch.linalg.vector_norm(expected)) ** 2
        error += float(torch.dist(found, expected)) ** 2
    return math.sqrt(error / norm) if norm else 0.0
