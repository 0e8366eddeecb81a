"""Command line of slim-ptq.  Heavy imports are inside the commands, so ``--help`` is instant."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from slim_ptq.__about__ import __version__

app = typer.Typer(
    help="Quantize Hugging Face language models for Ascend and other engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="Model directory: config.json and weights.")]
Scheme = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time, on Python 3.10 too)
    typer.Option(help="w8a8 (default), w8a8_dynamic, w8a16, w8a16_g128, w8a16_asym."),
]
RecipeFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="YAML or JSON recipe, in the place of --scheme and --format."),
]
Method = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="How weights are quantized: minmax (default) or another method by name."),
]
FormatName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--format", help="ascend_v1 (default), safe_tensor or float."),
]
Calib = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Calibration file: .jsonl (text, messages, input_ids) or plain text."),
]
Samples = Annotated[int, typer.Option(help="At most so many calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, npu:0.")]
Text = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--eval", help="Text file on which perplexity is measured before and after."),
]
Trust = Annotated[bool, typer.Option(help="Run model code that lies in the model directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that is there.")]
Output = Annotated[Path, typer.Argument(help="Directory to make.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"slim-ptq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error.")] = "warning",
) -> None:
    """Quantize Hugging Face language models for Ascend and other engines."""
    from slim_core.logging import set_logger_level

    with _errors():
        set_logger_level(log_level)


@app.command()
def quantize(
    model: Model,
    output: Output,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    method: Method = None,
    format_name: FormatName = None,
    calib: Calib = None,
    samples: Samples = 32,
    length: Length = 512,
    device: Device = "cpu",
    text: Text = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL into the directory OUTPUT."""
    with _errors(), _quiet_loading():
        from slim_ptq.api import quantize as run

        report = run(
            model,
            output,
            scheme=scheme,
            recipe=recipe,
            method=method,
            format=format_name,
            calibration=calib,
            samples=samples,
            length=length,
            device=device,
            text=text,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
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
    with _errors():
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
    with _errors():
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
def evaluate(
    model: Annotated[Path, typer.Argument(help="Float or quantized model directory.")],
    text: Annotated[Path, typer.Argument(help="Text file.")],
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of MODEL on TEXT."""
    with _errors(), _quiet_loading():
        from slim_ptq.quality import evaluate_text

        found = evaluate_text(
            model, text, window=window, device=device, trust_remote_code=trust_remote_code
        )
        if as_json:
            typer.echo(json.dumps({"perplexity": found.value, "tokens": found.tokens}))
        else:
            typer.echo(f"perplexity {found.value:.4f} on {found.tokens} tokens of {text.name}")


@app.command()
def dequantize(
    directory: Annotated[Path, typer.Argument(help="Quantized checkpoint.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Turn a quantized checkpoint back into an ordinary float one."""
    with _errors():
        from slim_ptq.dequantizing import dequantize as run

        run(directory, output, overwrite=overwrite)
        typer.echo(f"written to {output}")


def main() -> None:
    """Entry point of the ``slim-ptq`` command."""
    app()


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence the bars that transformers prints for every model it loads."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print errors that a user can act on, and exit with 2 for mistakes, 1 for failures."""
    from slim_core.errors import InvalidTypeError, InvalidValueError, OutputExistsError, SlimError

    try:
        yield
    except SlimError as error:
        typer.echo(f"error: {error}", err=True)
        mistakes = (InvalidTypeError, InvalidValueError, OutputExistsError)
        sys.exit(2 if isinstance(error, mistakes) else 1)
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
