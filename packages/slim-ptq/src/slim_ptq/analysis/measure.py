"""The measures of one layer: of its input, and of its output once it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from slim_core.export import CheckpointExport
from slim_core.files import write_json
from slim_core.formats import FORMATS
from slim_ptq.analysis.ranking import Metric
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.observers import InputScore, KurtosisScore, QuantileScore, SpreadObserver
from slim_ptq.pipeline import run_blockwise
from slim_ptq.pipeline.inputs import score_inputs
from slim_ptq.prepare import Prepared

_READABLE = "ascend_v1"  # in the place of dequantized weights

SCORES: Mapping[Metric, Callable[[], InputScore]] = {
    Metric.STD: SpreadObserver,
    Metric.QUANTILE: QuantileScore,
    Metric.KURTOSIS: KurtosisScore,
}


def input_scores(
    job: Prepared, data: TokenWindows, metric: Metric, device: torch.device
) -> dict[str, float]:
    """Return a measure of the input of each layer, by name in the checkpoint."""
    return score_inputs(job.checkpoint, job.inventory, job.plan, data, device, SCORES[metric])


def quantize_into(
    directory: Path, job: Prepared, data: TokenWindows, device: torch.device
) -> dict[str, float]:
    """Quantize the model into a directory and return the relative output error of each layer.

    The layers are those that ``slim-ptq quantize`` would write, by the same code.
    """
    form = _READABLE if job.plan.format == "float" else job.plan.format
    export = CheckpointExport(
        directory,
        FORMATS[form],
        model_type=job.plan.model_type,
        group_size=job.plan.group_size,
    )
    with export:
        reports = run_blockwise(
            job.checkpoint, job.inventory, job.plan, job.recipe, data, export, device
        )
    write_json(directory / "config.json", job.checkpoint.config)  # tells the dtype of the model
    return {
        report.name: 0.0 if report.output_error is None else report.output_error
        for report in reports
        if not report.is_float
    }
