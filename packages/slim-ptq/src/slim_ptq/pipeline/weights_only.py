"""Quantize weights tensor by tensor as they stream from shard to shard; no model is built."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch

from slim_core.checkpoint import Checkpoint
from slim_core.export import CheckpointExport
from slim_core.plan import Plan
from slim_core.progress import track
from slim_core.report import LayerReport
from slim_core.resume import ResumableDir
from slim_ptq.inventory import Inventory
from slim_ptq.parallel import Team
from slim_ptq.pipeline.ahead import work_ahead
from slim_ptq.pipeline.quantizing import (
    Made,
    float_report,
    made_layer,
    quantize_layer,
    read_bias,
    write_layer,
)
from slim_ptq.pipeline.saving import StateSaver
from slim_ptq.tensors import from_numpy

SAVE_SECONDS = 10.0  # between states
AHEAD_BYTES = 1 << 30  # of the stored tensors that are worked on at a time


def run_weights_only(
    checkpoint: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    export: CheckpointExport,
    device: torch.device,
    work: ResumableDir | None = None,
    team: Team | None = None,
) -> list[LayerReport]:
    """Write the quantized checkpoint; holds a few tensors at a time.

    Tensors are read and quantized while earlier ones are written.  The processes of a team
    quantize tensors in turn, and the first one writes those of all.  Every few seconds the state is
    saved to ``work``, if it is given; a state in it is taken up.

    Raises
    ------
    NumericalError
        A weight has NaN or infinite elements; names the layer.
    """
    team = Team() if team is None else team
    job = _Weights(checkpoint, inventory, plan, export, device)
    names = job.names()
    start = 0
    if work is not None and work.state is not None:
        start = work.state["tensors"]
        job.reports = [LayerReport.from_dict(report) for report in work.state["reports"]]
        export.load_state(work.state["export"])
    steps = range(start, len(names), team.size)  # one tensor for each process
    own = names[start + team.rank :: team.size]
    with (
        contextlib.nullcontext() if work is None else StateSaver(work) as saver,
        contextlib.closing(work_ahead(job.make, own, job.nbytes, AHEAD_BYTES)) as made,
    ):
        saved = time.perf_counter()

        def save(done: int) -> None:
            if saver is not None and team.is_first:
                plain = [report.to_dict() for report in job.reports]
                state = export.save_state(saver.sync)
                saver.save({"tensors": done, "reports": plain, "export": state})

        for done in track(steps, "Quantizing weights"):
            if time.perf_counter() - saved > SAVE_SECONDS:
                save(done)
                saved = time.perf_counter()
            now = names[done : done + team.size]
            mine = next(made) if team.rank < len(now) else None
            for name, item in zip(now, team.collect(mine), strict=False):
                if item is not None:
                    job.write(name, item)
        export.finish()
        save(len(names))
    return job.reports


class _Weights:
    """What becomes of one tensor after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inventory: Inventory,
        plan: Plan,
        export: CheckpointExport,
        device: torch.device,
    ) -> None:
        self._checkpoint = checkpoint
        self._transposed = inventory.transposed
        self._plan = plan
        self._export = export
        self._device = device
        self._layers = {f"{layer.name}.weight": layer for layer in plan.layers}
        self.reports: list[LayerReport] = []

    def names(self) -> list[str]:
        """Return the tensors in the order of the files; biases go with their weights."""
        biases = {f"{name}.bias" for name in self._plan.quantized}
        shards = self._checkpoint.iter_shards()
        return [name for _, shard in shards for name in shard if name not in biases]

    def nbytes(self, name: str) -> int:
        """Return the bytes of a stored tensor."""
        return self._checkpoint.tensors[name].nbytes

    def make(self, name: str) -> Made | np.ndarray:
        """Return the quantized layer, or the tensor as it is stored."""
        layer = self._layers.get(name)
        started = time.perf_counter()
        array = self._checkpoint.load(name)
        if layer is None or layer.scheme.is_float:
            return array.astype(self._checkpoint.tensors[name].dtype, copy=False)
        weight = from_numpy(array).to(self._device)
        if layer.name in self._transposed:
            weight = weight.T
        bias = read_bias(self._checkpoint, layer.name)
        dtype = self._plan.model_dtype
        quantized, error = quantize_layer(layer, weight, bias, model_dtype=dtype)
        return made_layer(quantized, error, None, started)

    def write(self, name: str, item: Made | np.ndarray) -> None:
        """Write what :meth:`make` returned, of this or of another process."""
        layer = self._layers.get(name)
        nbytes = self._checkpoint.tensors[name].nbytes
        if isinstance(item, Made):
            assert layer is not None  # narrowing: only planned layers are made
            turned = layer.name in self._transposed
            report = write_layer(self._export, layer, item, bytes_before=nbytes, transposed=turned)
            self.reports.append(report)
            return
        self._export.add_float(name, item)
        if layer is not None:
            self.reports.append(float_report(layer, nbytes))
