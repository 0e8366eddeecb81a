"""Quantize weights tensor by tensor as they stream from shard to shard; no model is built."""

from __future__ import annotations

import time

import torch

from slim_core.checkpoint import Checkpoint
from slim_core.export import CheckpointExport
from slim_core.plan import Plan
from slim_core.progress import track
from slim_core.report import LayerReport
from slim_core.resume import ResumableDir
from slim_ptq.inventory import Inventory
from slim_ptq.pipeline.quantizing import float_report, quantize_layer, read_bias, write_layer
from slim_ptq.tensors import from_numpy

SAVE_SECONDS = 10.0  # between states: saving waits for the disk


def run_weights_only(
    checkpoint: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    export: CheckpointExport,
    device: torch.device,
    work: ResumableDir | None = None,
) -> list[LayerReport]:
    """Write the quantized checkpoint; holds one tensor at a time.

    Every few seconds the state is saved to ``work``, if it is given; a state in it is taken up.

    Raises
    ------
    NumericalError
        A weight has NaN or infinite elements; names the layer.
    """
    layers = {f"{layer.name}.weight": layer for layer in plan.layers}
    biases = {f"{name}.bias" for name in plan.quantized}
    reports: list[LayerReport] = []
    names = [name for _, shard in checkpoint.iter_shards() for name in shard if name not in biases]
    start = 0
    if work is not None and work.state is not None:
        start = work.state["tensors"]
        reports = [LayerReport.from_dict(report) for report in work.state["reports"]]
        export.load_state(work.state["export"])
    saved = time.perf_counter()
    todo = track(names[start:], "Quantizing weights", total=len(names), done=start)
    for done, name in enumerate(todo, start):
        if work is not None and time.perf_counter() - saved > SAVE_SECONDS:
            plain = [report.to_dict() for report in reports]
            work.save({"tensors": done, "reports": plain, "export": export.save_state()})
            saved = time.perf_counter()
        layer = layers.get(name)
        started = time.perf_counter()
        array = checkpoint.load(name)
        if layer is None or layer.scheme.is_float:
            export.add_float(name, array.astype(checkpoint.tensors[name].dtype, copy=False))
            if layer is not None:
                reports.append(float_report(layer, checkpoint.tensors[name].nbytes))
            continue
        weight = from_numpy(array).to(device)
        if layer.name in inventory.transposed:
            weight = weight.T
        bias = read_bias(checkpoint, layer.name)
        quantized, error = quantize_layer(layer, weight, bias, model_dtype=plan.model_dtype)
        reports.append(
            write_layer(
                export,
                layer,
                quantized,
                bytes_before=checkpoint.tensors[name].nbytes,
                weight_error=error,
                output_error=None,
                started=started,
                transposed=layer.name in inventory.transposed,
            )
        )
    return reports
