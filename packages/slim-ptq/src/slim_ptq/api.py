"""The modern interface: one call from a model directory to a quantized one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slim_core.checkpoint import copy_side_files
from slim_core.dtypes import float_name
from slim_core.errors import InvalidValueError
from slim_core.export import CheckpointExport, NoExport
from slim_core.files import (
    PathLike,
    as_path,
    check_apart,
    check_output_dir,
    write_bytes,
)
from slim_core.formats import ASCEND_FORMATS, FORMATS
from slim_core.formats.foreign import ForeignFormat
from slim_core.plan import Plan
from slim_core.recipe import Recipe
from slim_core.report import LayerReport, Report
from slim_core.resume import ResumableDir, resumable_dir
from slim_core.validate import check_choice, check_float, check_int
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.devices import AUTO, DTYPES, compute_dtype, torch_device
from slim_ptq.evaluate import Perplexity
from slim_ptq.job_fingerprints import job_fingerprints
from slim_ptq.job_report import Clock, job_report
from slim_ptq.parallel import Team, own_device, team_of_environment
from slim_ptq.pipeline import check_alone, plan_with_fallback, run_blockwise, run_weights_only
from slim_ptq.prepare import Prepared, prepare
from slim_ptq.quality import evaluate_text
from slim_ptq.readback import read_back
from slim_ptq.rotation import rotate_checkpoint

RECIPE_FILE = "slim_recipe.yaml"

_GIB = 1 << 30


def quantize(
    model: PathLike,
    output: PathLike,
    *,
    scheme: str | None = None,
    recipe: Recipe | PathLike | None = None,
    method: str | None = None,
    smooth: str | None = None,
    format: str | None = None,
    calibration: PathLike | Iterable[str] | TokenWindows | None = None,
    samples: int = 32,
    length: int = 512,
    batch: int = 4,
    device: str = "cpu",
    dtype: str = AUTO,
    text: PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_gib: int = 4,
    activation_gib: float = 4,
    trust_remote_code: bool = False,
) -> Report:
    """Quantize a Hugging Face model directory into a checkpoint directory.

    Schemes without static activations stream through the weight files and build no model.  Others
    run the model on the calibration data, one decoder block in memory at a time.

    Parameters
    ----------
    model : path
        Directory with ``config.json`` and safetensors or ``.bin`` weights.
    output : path
        Directory to make; it appears only when it is complete and verified.
    scheme : str, optional
        ``w8a8`` (default), ``w8a8_dynamic``, ``w8a16``, ``w8a16_g128`` ... for all layers.
    recipe : Recipe or path, optional
        In the place of ``scheme``: per-layer rules, exclusions, smoothing, options of methods.
    method : str, optional
        How weights are quantized (:data:`slim_ptq.methods.METHODS`), ``minmax`` by default; in the
        place of that of the recipe.
    smooth : str, optional
        How activation outliers are suppressed first
        (:class:`slim_core.recipe.SmoothMethod`), not at all by default; in the place of what the
        recipe says.
    format : str, optional
        ``ascend_v1`` (default), ``safe_tensor``, ``float``, or one of the layouts of other tools:
        ``compressed_tensors``, ``gptq``, ``awq``.
    calibration : path, texts or TokenWindows, optional
        See :func:`slim_ptq.calibration.text.read_calibration`.
    samples, length, batch : int
        At most so many windows of so many tokens, so many at once.
    device : str
        ``cpu``, ``cuda:0``, ``npu:0``.
    dtype : str
        In which decoder blocks run on calibration data: ``auto`` is ``float32`` on the CPU and the
        dtype of the model on other devices, each of which can be asked for by name.
    text : path, optional
        Measure the perplexity before and after on this text file.
    overwrite : bool
        Replace an output directory that is there, and discard an interrupted run.
    resume : bool
        Go on with an interrupted run of the same recipe, model, data and versions, if there is
        one; the weights and the description become those of a run that was not interrupted.
    max_shard_gib : int
        Size of a weight file in GiB.
    activation_gib : float
        Up to how many GiB the hidden states of the calibration data stay in memory; more go to
        disk, beside the output.
    trust_remote_code : bool
        Run model code that lies in the model directory.

    Returns
    -------
    Report
        Also written into the output, as JSON and HTML.

    Raises
    ------
    SlimError
        See :mod:`slim_core.errors`; everything that can be known beforehand is raised beforehand.
    """
    target = check_output_dir(as_path("output", output), overwrite=overwrite)
    check_apart("model", model, target)
    device = own_device(device)
    place = torch_device(device)
    check_choice("dtype", dtype, DTYPES)
    shard = check_int("max_shard_gib", max_shard_gib, low=1) * _GIB
    held = int(check_float("activation_gib", activation_gib, low=0, high=1 << 20) * _GIB)
    clock = Clock()
    job = prepare(
        model,
        scheme=scheme,
        recipe=recipe,
        method=method,
        smooth=smooth,
        format=format,
        calibration=calibration,
        samples=samples,
        length=length,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    _check_foreign(job, text)
    compute = compute_dtype(dtype, place, job.inventory.model_dtype)
    _config_changes(job.plan)  # or the format cannot hold such a mixture: said before long work
    clock.stage("plan")
    with team_of_environment(place) as team:
        check_alone(job.plan, team)
        measure = _Measure(text if team.is_first else None, device, trust_remote_code)
        before = measure.perplexity(job.checkpoint.path)
        clock.stage("evaluate float")
        job = _settle(job, place, compute, clock, team)
        config_changes = _config_changes(job.plan)
        prints = job_fingerprints(job, device.partition(":")[0], compute, shard, team)
        if not team.is_first:
            begun: tuple[Path, dict[str, Any] | None] = team.from_first(None)
            work = ResumableDir(begun[0], prints, begun[1])
            _write(job, NoExport(), place, compute, work, held, team)
            finished: Report = team.from_first(None)
            return finished
        with resumable_dir(target, prints, resume=resume, overwrite=overwrite) as work:
            team.from_first((work.path, work.state))
            export = CheckpointExport(
                work.path,
                FORMATS[job.plan.format],
                model_type=job.plan.model_type,
                group_size=job.plan.group_size,
                max_shard_bytes=shard if job.plan.bytes_after > shard else None,
            )
            with export:
                layers = _write(job, export, place, compute, work, held, team)
                _describe_tied_head(job, export)
            clock.stage("quantize")
            copy_side_files(job.checkpoint, work.path, config_changes)
            read_back(work.path, job.plan)
            clock.stage("verify")
            after = measure.perplexity(work.path)
            clock.stage("evaluate quantized")
            where = {"device": place.type}
            if job.blockwise:
                where["dtype"] = float_name(compute)
            report = job_report(job, layers, work.path, before, after, text, clock, where)
            report.save(work.path)
            write_bytes(work.path / RECIPE_FILE, job.recipe.to_yaml().encode())
        return team.from_first(report)


def _settle(
    job: Prepared, device: torch.device, dtype: torch.dtype, clock: Clock, team: Team
) -> Prepared:
    """Return the job with what can be known only by running the float model.

    What depends on the last bits of floating point is decided by the first process for all.
    """
    if job.recipe.rotate is not None:
        rotated = rotate_checkpoint(job.checkpoint, job.inventory, job.recipe.rotate, device)
        job = replace(job, checkpoint=rotated)
        clock.stage("rotate")
    if job.recipe.fallback and job.data is not None:
        plan = None
        if team.is_first:
            count = job.recipe.fallback
            plan = plan_with_fallback(
                job.checkpoint, job.inventory, job.plan, count, job.data, device, dtype
            )
        job = replace(job, plan=team.from_first(plan))
        clock.stage("rank layers")
    return job


def _write(
    job: Prepared,
    export: CheckpointExport,
    device: torch.device,
    dtype: torch.dtype,
    work: ResumableDir,
    activation_bytes: int,
    team: Team,
) -> list[LayerReport]:
    """Quantize and write the weights by the pipeline that the job needs."""
    if not job.blockwise or job.data is None:
        return run_weights_only(job.checkpoint, job.inventory, job.plan, export, device, work, team)
    return run_blockwise(
        job.checkpoint,
        job.inventory,
        job.plan,
        job.recipe,
        job.data.part(team.rank, team.size),
        export,
        device,
        work,
        activation_bytes,
        team,
        dtype,
    )


def _check_foreign(job: Prepared, text: PathLike | None) -> None:
    """Require of a format of another tool what only its own code could do otherwise.

    Raises
    ------
    InvalidValueError
        Its quality is to be measured, or the model keeps transposed weights.
    """
    form = FORMATS[job.plan.format]
    if not isinstance(form, ForeignFormat):
        return
    if text is not None:
        raise InvalidValueError(
            f"text cannot be measured in the {form.name} format, which other tools run",
            hint="measure the same recipe in the ascend_v1 format: it has the same integers",
        )
    if job.inventory.transposed:
        raise InvalidValueError(
            f"format {form.name} holds no transposed weights, as those of "
            f"{next(iter(sorted(job.inventory.transposed)))} are"
        )


def _config_changes(plan: Plan) -> dict[str, Any]:
    """Return what readers of the format look for in the configuration."""
    schemes = {layer.name: layer.scheme for layer in plan.layers}
    return FORMATS[plan.format].config_changes(plan.model_type, schemes)


def _describe_tied_head(job: Prepared, export: CheckpointExport) -> None:
    """Name the tied output head, which engines look up although it is not stored."""
    model = job.inventory.model
    head = None if model is None else model.get_output_embeddings()
    if head is None or model is None:
        return
    path = next(path for path, module in model.named_modules() if module is head)
    name = job.inventory.rename(f"{path}.weight")
    if name not in job.checkpoint.tensors and job.plan.format in ASCEND_FORMATS:
        export.describe(name, "FLOAT")


@dataclass(frozen=True)
class _Measure:
    """How perplexity is measured, if it is."""

    text: PathLike | None
    device: str
    trust_remote_code: bool

    def perplexity(self, directory: Path) -> Perplexity | None:
        if self.text is None:
            return None
        trust = self.trust_remote_code
        return evaluate_text(directory, self.text, device=self.device, trust_remote_code=trust)
