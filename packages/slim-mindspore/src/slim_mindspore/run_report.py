"""The report of a quantization run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slim_core.provenance import provenance
from slim_core.report import Report
from slim_mindspore.__about__ import __version__
from slim_mindspore.quantize import QuantizedNetwork

_WEIGHTS = (".ckpt", ".safetensors", ".bin")


def make_report(
    quantized: QuantizedNetwork,
    *,
    checkpoint: Path,
    target: Path,
    batches: list[np.ndarray],
    dataset: str | None,
    evaluation: tuple[str | None, float | None, float | None],
    seconds: dict[str, float],
) -> Report:
    """Return the report of a run that has written its output.

    Parameters
    ----------
    quantized : QuantizedNetwork
    checkpoint, target : Path
        Float weights and output: files, or directories of files.
    batches : list of numpy.ndarray
        Calibration tokens.
    dataset : str or None
        Where they come from.
    evaluation : tuple
        Text file and perplexities before and after, or None.
    seconds : dict of str to float
    """
    config = quantized.config
    text, before, after = evaluation
    schemes = sorted({str(result.layer.scheme) for result in quantized.layers.values()})
    if config.kvcache_dtype:
        schemes.append(f"kv8 {config.kvcache_quant_granularity}")
    calibration = None
    if batches:
        calibration = {
            "file": Path(dataset).name if dataset else None,
            "samples": len(batches),
            "tokens": sum(batch.size for batch in batches),
        }
    return Report(
        tool=f"slim-mindspore {__version__}",
        model=checkpoint.name,
        scheme=", ".join(schemes),
        format=target.suffix.lstrip(".") or "ascend_v1",
        layers=tuple(quantized.reports),
        bytes_before=weight_bytes(checkpoint),
        bytes_after=weight_bytes(target),
        perplexity_before=before,
        perplexity_after=after,
        perplexity_text=Path(text).name if text else None,
        calibration=calibration,
        seconds=seconds,
        provenance=provenance(
            ["slim-mindspore", "mindspore"], recipe=config.model_dump(mode="json")
        ),
    )


def weight_bytes(path: Path) -> int:
    """Return the bytes of a weight file, or of all weight files of a directory."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in _WEIGHTS)
