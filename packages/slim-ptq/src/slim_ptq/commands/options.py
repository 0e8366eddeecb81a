"""What the commands share: their options, and how errors are shown.

Only the standard library and typer are imported here, so ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Model = Annotated[Path, typer.Argument(help="Model directory: config.json and weights.")]
Scheme = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time, on Python 3.10 too)
    typer.Option(help="w8a8 (default), w8a8_dynamic, w8a16, w4a16_g128, w4a8_dynamic, nf4 ..."),
]
RecipeFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="YAML or JSON recipe, in the place of --scheme and --format."),
]
Method = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="How weights are quantized: minmax (default) or another method by name."),
]
Smooth = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Suppress outliers first: smoothquant, threshold, awq, iterative, cbq or flex."
    ),
]
FormatName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--format",
        help="ascend_v1 (default), safe_tensor, float, compressed_tensors, gptq or awq.",
    ),
]
Calib = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Calibration file: .jsonl (text, messages, input_ids), .json (mixture) or plain text."
    ),
]
Samples = Annotated[int, typer.Option(help="At most so many calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, npu:0.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="In which blocks run on calibration data: float32, or that of the model, bfloat16 for "
        "example. auto is float32 on the CPU, that of the model elsewhere."
    ),
]
Text = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--eval", help="Text file on which perplexity is measured before and after."),
]
Trust = Annotated[bool, typer.Option(help="Run model code that lies in the model directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that is there.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run of the same job.")]
ActivationGib = Annotated[
    float, typer.Option(help="GiB of calibration activations held in memory; more go to disk.")
]
Events = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Append one line of JSON for every step to this file; - is standard output, whose "
        "last line is then the report."
    ),
]
STDOUT = Path("-")  # for --events
Metric = Annotated[
    str,
    typer.Option(help="How layers are ranked: std, quantile, kurtosis, layer_error, model_error."),
]
Task = Annotated[str, typer.Option(help="perplexity, boolq, ceval, mmlu, gsm8k or truthfulqa.")]
Shot = Annotated[int, typer.Option(help="Examples before each question of ceval and mmlu.")]
Questions = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="At most so many questions, the first ones."),
]
Batch = Annotated[int, typer.Option(help="Sequences that run at once.")]
Output = Annotated[Path, typer.Argument(help="Directory to make.")]


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
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
def step_events(path: Path | None) -> Iterator[None]:
    """Write the events of all steps to a file or to standard output, if one is given."""
    from slim_core.progress import writing_events

    if path is None:
        yield
        return
    with writing_events(sys.stdout if path == STDOUT else path):
        yield


@contextlib.contextmanager
def show_errors(output: Path | None = None) -> Iterator[None]:
    """Print errors that a user can act on, and exit with 2 for mistakes, 1 for failures.

    Parameters
    ----------
    output : Path, optional
        Directory that a resumable job was to make.
    """
    from slim_core.errors import InvalidTypeError, InvalidValueError, OutputExistsError, SlimError

    try:
        yield
    except SlimError as error:
        if (name := _name_of_process()) is not None:
            typer.echo(f"error{name}: {error}", err=True)
        mistakes = (InvalidTypeError, InvalidValueError, OutputExistsError)
        sys.exit(2 if isinstance(error, mistakes) else 1)
    except OSError as error:
        if (name := _name_of_process()) is not None:
            typer.echo(f"error{name}: {error}", err=True)
            _say_how_to_go_on(output)
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":  # the first of several processes says it for all
            sys.exit(130)
        typer.echo("interrupted", err=True)
        if not _say_how_to_go_on(output):
            typer.echo("nothing was written", err=True)
        sys.exit(130)


def _name_of_process() -> str | None:
    """Return what tells an error of one of several processes from those of the others.

    None if another process of this machine says the same: before they join, all of them check the
    same arguments and files.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    from slim_ptq.parallel import own_rank

    rank = own_rank()
    if rank is not None:
        return f" in process {rank}"
    return "" if os.environ.get("LOCAL_RANK", "0") == "0" else None


def _say_how_to_go_on(output: Path | None) -> bool:
    """Print the command that goes on with what was interrupted, if anything is left of it."""
    from slim_core.resume import is_resumable

    if output is None or not is_resumable(output):
        return False
    typer.echo(f"finished steps are kept; go on with:\n  {_resuming_command()}", err=True)
    return True


def _resuming_command() -> str:
    """Return this command with --resume, for a shell."""
    program, *arguments = sys.argv
    name = Path(program).name
    start = [name if shutil.which(name) == program else program]
    if name == "__main__.py":
        start = [sys.executable, "-m", "slim_ptq"]
    if "LOCAL_RANK" in os.environ:  # torchrun tells a process nothing of its own options
        start = ["torchrun", "...", "-m", "slim_ptq"]
    if "--resume" not in arguments:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        arguments.insert(end, "--resume")
    return shlex.join([*start, *arguments])
