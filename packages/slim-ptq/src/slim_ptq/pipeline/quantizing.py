"""From one planned layer and its float weight to the quantized layer and its line in the report."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from slim_core.checkpoint import Checkpoint
from slim_core.export import CheckpointExport
from slim_core.layers import QuantizedLinear
from slim_core.plan import LayerPlan
from slim_core.report import LayerReport
from slim_ptq.methods import quantize_minmax, relative_error
from slim_ptq.modules import FakeQuantLinear, on_device
from slim_ptq.tensors import from_numpy

_CPU = torch.device("cpu")


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
    input_params: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[QuantizedLinear, float]:
    """Quantize a layer; returns it and the relative error of its weight."""
    assert plan.scheme.weight is not None  # narrowing: only quantized layers are planned
    parts = quantize_minmax(plan.name, weight, plan.scheme.weight)
    layer = QuantizedLinear(plan.name, plan.scheme, *parts, bias=bias, model_dtype=model_dtype)
    if input_params is not None:
        scale, offset = (part.to(weight.device) for part in input_params)
        layer = replace(layer, input_scale=scale, input_offset=offset)
    return layer, relative_error(weight, parts)


def write_layer(
    export: CheckpointExport,
    plan: LayerPlan,
    layer: QuantizedLinear,
    *,
    bytes_before: int,
    weight_error: float,
    output_error: float | None,
    started: float,
    transposed: bool = False,
    notes: tuple[str, ...] = (),
) -> LayerReport:
    """Write a layer to the checkpoint and return its line in the report."""
    bytes_after = export.add_layer(on_device(layer, _CPU), transposed=transposed)
    return LayerReport(
        name=plan.name,
        scheme=str(plan.scheme),
        type=plan.scheme.ascend_type,
        method="minmax",
        shape=plan.shape,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        weight_error=weight_error,
        output_error=output_error,
        seconds=time.perf_counter() - started,
        notes=notes,
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
    expected = x @ weight.float().T
    found = FakeQuantLinear(replace(layer, bias=None), torch.float32)(x)
    norm = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(found - expected)) / norm if norm else 0.0
