"""``analyze``: from a model directory to a ranking of its layers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from slim_core.errors import InvalidValueError
from slim_core.files import PathLike, as_path
from slim_core.groups import group_by
from slim_core.provenance import provenance
from slim_core.recipe import Recipe
from slim_core.validate import check_choice, check_int
from slim_ptq.analysis.measure import SCORES, input_scores, quantize_into
from slim_ptq.analysis.ranking import Analysis, Metric, Sensitivity
from slim_ptq.analysis.whole import Effect, model_effects
from slim_ptq.calibration.text import TokenWindows, load_tokenizer, windows
from slim_ptq.devices import torch_device
from slim_ptq.evaluate import encode_text, read_text
from slim_ptq.limits import check_tokens, within_positions
from slim_ptq.load import load_model
from slim_ptq.prepare import Prepared, prepare
from slim_ptq.rotation import rotate_checkpoint
from slim_ptq.structure import unfuse_experts


def analyze(
    model: PathLike,
    *,
    calibration: PathLike | Iterable[str] | TokenWindows,
    metric: str | Metric = Metric.QUANTILE,
    scheme: str | None = None,
    recipe: Recipe | PathLike | None = None,
    method: str | None = None,
    text: PathLike | None = None,
    samples: int = 32,
    length: int = 512,
    batch: int = 4,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Analysis:
    """Rank the layers of a model by how sensitive they are to quantization.

    The measures of the input and of the error of a layer alone run the model block by block, with
    one block in memory.  ``model_error`` holds the whole model, and runs it once for each group.

    Parameters
    ----------
    model : path
        Directory of a float model.
    calibration : path, texts or TokenWindows
        As for :func:`slim_ptq.quantize`.
    metric : str
        ``std``, ``quantile``, ``kurtosis``, ``layer_error`` or ``model_error``.
    scheme, recipe, method
        As for :func:`slim_ptq.quantize`; layers that stay in floating point are not ranked.
    text : path, optional
        Measure ``model_error`` on this text in the place of the calibration data.
    samples, length, batch : int
        At most so many windows of so many tokens, so many at once.
    device : str
    trust_remote_code : bool

    Returns
    -------
    Analysis
        Layers that engines run as one matrix are ranked together, by the largest score of them.

    Raises
    ------
    SlimError
        See :mod:`slim_core.errors`; everything that can be known beforehand is raised beforehand.
    """
    kind = Metric(
        check_choice("metric", getattr(metric, "value", metric), [m.value for m in Metric])
    )
    place = torch_device(device)
    job = prepare(
        model,
        scheme=scheme,
        recipe=recipe,
        method=method,
        calibration=calibration,
        samples=check_int("samples", samples, low=1),
        length=check_int("length", length, low=1),
        batch=check_int("batch", batch, low=1),
        trust_remote_code=trust_remote_code,
    )
    if job.data is None:
        raise InvalidValueError("the model has to run on calibration data, and there is none")
    given = data = job.data
    if job.inventory.model is None:
        raise InvalidValueError("the model has to run, and transformers does not know it")
    edited = job.recipe.smooth is not None or job.recipe.rotate is not None
    if kind is Metric.MODEL_ERROR and edited:
        raise InvalidValueError(
            "model_error quantizes one group of layers at a time, and smoothing and rotation "
            "join layers",
            hint="use layer_error, or a recipe without smooth and rotate",
        )
    if job.recipe.rotate is not None:
        rotated = rotate_checkpoint(job.checkpoint, job.inventory, job.recipe.rotate, place)
        job = replace(job, checkpoint=rotated)
    if kind is Metric.MODEL_ERROR and text is not None:
        data = _read_text(job, as_path("text", text), samples, length, batch)
    base: Effect | None = None
    effects: dict[str, Effect] = {}
    if kind in SCORES:
        scores = input_scores(job, data, kind, place)
    else:
        with tempfile.TemporaryDirectory(prefix="slim-analyze-") as made:
            scores = quantize_into(Path(made), job, given, place)
            if kind is Metric.MODEL_ERROR:
                base, effects = _whole(job, data, Path(made), device, trust_remote_code)
    return Analysis(
        model=job.checkpoint.path.name,
        scheme=str(job.recipe.scheme),
        metric=kind,
        data=data.to_dict(),
        groups=_rank(job, scores, effects),
        perplexity=None if base is None else base.perplexity,
        provenance=provenance(
            ["slim-ptq", "torch", "transformers"],
            recipe=job.recipe.to_dict(),
            config=job.checkpoint.config,
        ),
    )


def _groups(job: Prepared) -> dict[str, list[str]]:
    """Return the members of each group of quantized layers, by names in the checkpoint."""
    return group_by(job.plan.quantized)


def _rank(
    job: Prepared, scores: dict[str, float], effects: dict[str, Effect]
) -> tuple[Sensitivity, ...]:
    ranked = []
    for group, members in _groups(job).items():
        effect = effects.get(group)
        ranked.append(
            Sensitivity(
                group=group,
                layers=tuple(members),
                modules=tuple(job.inventory.modules[name] for name in members),
                scheme=str(job.plan.quantized[members[0]].scheme),
                score=max(scores[name] for name in members)
                if effect is None
                else effect.mean_divergence,
                perplexity=None if effect is None else effect.perplexity,
            )
        )
    return tuple(sorted(ranked, key=lambda item: item.score, reverse=True))


def _whole(
    job: Prepared, data: TokenWindows, quantized: Path, device: str, trust_remote_code: bool
) -> tuple[Effect, dict[str, Effect]]:
    loaded = load_model(job.checkpoint.path, device=device, trust_remote_code=trust_remote_code)
    unfuse_experts(loaded)
    modules = job.inventory.modules
    groups = {
        group: {name: modules[name] for name in members} for group, members in _groups(job).items()
    }
    return model_effects(loaded, quantized, groups, data.batches)


def _read_text(job: Prepared, text: Path, samples: int, length: int, batch: int) -> TokenWindows:
    tokens = encode_text(load_tokenizer(job.checkpoint.path), read_text(text))
    size = within_positions(length, job.checkpoint.config)
    data = TokenWindows(windows(tokens.tolist(), samples, size, batch), text.name)
    check_tokens(data, job.checkpoint.config)
    return data
