"""What tells the job of an interrupted run from another one."""

from __future__ import annotations

import torch

from slim_core.dtypes import float_name
from slim_core.provenance import fingerprint, provenance
from slim_ptq.parallel import Team
from slim_ptq.prepare import Prepared


def job_fingerprints(
    job: Prepared, device: str, dtype: torch.dtype, shard: int, team: Team
) -> dict[str, str]:
    """Return what an interrupted run must have in common with the one that goes on with it."""
    files = {info.file for info in job.checkpoint.tensors.values()}
    versions = provenance(["slim-ptq", "torch", "transformers"])
    model = {
        "config": job.checkpoint.config,
        "files": sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files),
    }
    data = b"" if job.data is None else b"".join(x.numpy().tobytes() for x in job.data.batches)
    shapes = [] if job.data is None else [list(x.shape) for x in job.data.batches]
    return {
        "recipe": fingerprint(job.recipe.to_dict()),
        "device": device,
        "dtype": float_name(dtype),
        "size of weight files": str(shard),
        "number of processes": str(team.size),
        "model": fingerprint(model),
        "calibration data": fingerprint({"shapes": shapes, "ids": fingerprint(data)}),
        "version of a package": fingerprint(versions),
    }
