"""``slim-ptq evaluate``: perplexity or accuracy of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slim_ptq.commands.options import (
    AsJson,
    Batch,
    Device,
    Questions,
    Shot,
    Task,
    Trust,
    quiet_loading,
    show_errors,
)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Float or quantized model directory.")],
    data: Annotated[Path, typer.Argument(help="Text file, or the data of the task.")],
    task: Task = "perplexity",
    window: Annotated[int, typer.Option(help="Tokens of a window, for perplexity.")] = 512,
    shot: Shot = 5,
    questions: Questions = None,
    batch: Batch = 4,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of MODEL on the text DATA, or its accuracy on the questions DATA."""
    with show_errors(), quiet_loading():
        from slim_ptq.precision import evaluate_task

        found = evaluate_task(
            model,
            task,
            data,
            shot=shot,
            samples=questions,
            window=window,
            batch_size=batch,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
            return
        if found.metric == "perplexity":
            typer.echo(f"perplexity {found.value:.4f} on {found.count} tokens of {data.name}")
            return
        typer.echo(f"accuracy {found.value:.4f} on {found.count} questions of {data.name} ({task})")
        for name, value in found.parts.items():
            typer.echo(f"  {name} {value:.4f}")
