"""Command line of slim-ptq.  Heavy imports are inside the commands, so ``--help`` is instant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from slim_ptq.__about__ import __version__
from slim_ptq.commands.analyze import analyze
from slim_ptq.commands.evaluate import evaluate
from slim_ptq.commands.options import (
    STDOUT,
    ActivationGib,
    AsJson,
    Calib,
    Device,
    Dtype,
    Events,
    FormatName,
    Length,
    Method,
    Model,
    Output,
    Overwrite,
    RecipeFile,
    Resume,
    Samples,
    Scheme,
    Smooth,
    Text,
    Trust,
    quiet_loading,
    show_errors,
    step_events,
)
from slim_ptq.commands.tune import tune

app = typer.Typer(
    help="Quantize Hugging Face language models for Ascend and other engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"slim-ptq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error.")] = "warning",
    log_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Append messages from info on, each step among them, to this file."),
    ] = None,
) -> None:
    """Quantize Hugging Face language models for Ascend and other engines."""
    from slim_core.logging import add_log_file, set_logger_level
    from slim_core.progress import plain_progress

    context.with_resource(plain_progress())
    with show_errors():
        set_logger_level(log_level)
        if log_file is not None:
            add_log_file(log_file)


@app.command()
def quantize(
    model: Model,
    output: Output,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    method: Method = None,
    smooth: Smooth = None,
    format_name: FormatName = None,
    calib: Calib = None,
    samples: Samples = 32,
    length: Length = 512,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    text: Text = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    activation_gib: ActivationGib = 4,
    events: Events = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL into the directory OUTPUT."""
    with show_errors(output), quiet_loading(), step_events(events):
        from slim_ptq.api import quantize as run

        report = run(
            model,
            output,
            scheme=scheme,
            recipe=recipe,
            method=method,
            smooth=smooth,
            format=format_name,
            calibration=calib,
            samples=samples,
            length=length,
            device=device,
            dtype=dtype,
            text=text,
            overwrite=overwrite,
            resume=resume,
            activation_gib=activation_gib,
            trust_remote_code=trust_remote_code,
        )
        if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
            return
        if events == STDOUT:
            typer.echo(json.dumps(report.to_dict()))
            return
        if as_json:
            typer.echo(report.to_json())
            return
        from rich.console import Console

        from slim_core.report_console import print_report

        print_report(report, Console())
        typer.echo(f"written to {output}")


@app.command()
def plan(
    model: Model,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    method: Method = None,
    format_name: FormatName = None,
    calib: Calib = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what would be done to each layer of MODEL, from headers alone."""
    with show_errors():
        from slim_ptq.prepare import prepare

        job = prepare(
            model,
            scheme=scheme,
            recipe=recipe,
            method=method,
            format=format_name,
            calibration=calib,
            plan_only=True,
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            typer.echo(json.dumps(job.plan.to_dict(), indent=2))
            return
        from rich.console import Console

        from slim_core.plan_console import print_plan

        print_plan(job.plan, Console())


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Quantized checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Read a quantized checkpoint again and check what inference engines rely on."""
    with show_errors():
        from slim_core.verify import verify_checkpoint

        found = verify_checkpoint(directory)
        if as_json:
            typer.echo(json.dumps({"sound": found.sound, "problems": list(found.problems)}))
        else:
            for problem in found.problems:
                typer.echo(f"problem: {problem}")
            verdict = "sound" if found.sound else f"{len(found.problems)} problems"
            typer.echo(f"{directory}: {found.layers} layers, {found.tensors} tensors: {verdict}")
        if not found.sound:
            raise typer.Exit(1)


@app.command()
def dequantize(
    directory: Annotated[Path, typer.Argument(help="Quantized checkpoint.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Turn a quantized checkpoint back into an ordinary float one."""
    with show_errors():
        from slim_ptq.dequantizing import dequantize as run

        run(directory, output, overwrite=overwrite)
        typer.echo(f"written to {output}")


app.command()(analyze)
app.command()(evaluate)
app.command()(tune)
app.command("eval", hidden=True)(evaluate)  # the short name


def main() -> None:
    """Entry point of the ``slim-ptq`` command."""
    app()
