"""``slim-ptq tune``: quantize so that an accuracy target is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from slim_ptq.commands.options import (
    AsJson,
    Batch,
    Calib,
    Device,
    FormatName,
    Length,
    Method,
    Model,
    Output,
    Overwrite,
    Questions,
    RecipeFile,
    Samples,
    Scheme,
    Shot,
    Task,
    Trust,
    quiet_loading,
    show_errors,
)

if TYPE_CHECKING:
    from slim_ptq.tuning import Tuned


def tune(
    model: Model,
    output: Output,
    target: Annotated[
        str,
        typer.Option(help="ppl+1%, ppl+0.2, ppl<=24.5, accuracy-1%, accuracy-0.01, accuracy>=0.7."),
    ],
    data: Annotated[
        Path, typer.Option("--eval", help="What it is measured on: a text, or data of --task.")
    ],
    calib: Calib = None,
    task: Task = "perplexity",
    shot: Shot = 5,
    questions: Questions = None,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="How layers are ranked: model_error (default; layer_error if the recipe smooths "
            "or rotates), layer_error, quantile, std, kurtosis."
        ),
    ] = None,
    fallback: Annotated[
        str, typer.Option(help="Scheme of the layers that fall back: float, w8a16 ...")
    ] = "float",
    prune: Annotated[
        bool, typer.Option(help="Then try to quantize each layer that fell back, one by one.")
    ] = False,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    method: Method = None,
    format_name: FormatName = None,
    samples: Samples = 32,
    length: Length = 512,
    batch: Batch = 4,
    device: Device = "cpu",
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Values of candidates, to go on after an interruption."),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL into OUTPUT with as few layers in floating point as a target allows."""
    with show_errors(), quiet_loading():
        from slim_core.errors import InvalidValueError
        from slim_ptq.tuning import tune as run

        if calib is None:
            raise InvalidValueError("tune needs calibration data", hint="--calib FILE")
        found = run(
            model,
            output,
            target=target,
            calibration=calib,
            data=data,
            task=task,
            shot=shot,
            questions=questions,
            metric=metric,
            fallback=fallback,
            prune=prune,
            scheme=scheme,
            recipe=recipe,
            method=method,
            format=format_name,
            samples=samples,
            length=length,
            batch=batch,
            device=device,
            cache=cache,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else _text(found, output))


def _text(found: Tuned, output: Path) -> str:
    metric = found.target.metric
    sign = "<=" if metric == "perplexity" else ">="
    lines = [
        f"target      {found.target}: {metric} {sign} {found.bound:.6g}"
        f" (float model {found.reference:.6g})",
        f"ranking     {found.metric}",
    ]
    for trial in found.trials:
        verdict = "meets" if found.target.met(trial.value, found.reference) else "fails"
        tried = f"{len(trial.groups):4} of {found.count} groups fall back"
        lines.append(f"{tried}  {trial.value:.6g}  {verdict}")
    lines.append(f"result      {metric} {found.value:.6g}; these layers fall back:")
    lines += [f"  {name}" for name in found.layers]
    return "\n".join([*lines, f"written to {output}"])
