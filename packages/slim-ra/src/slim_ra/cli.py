"""Command line of slim-ra.  Heavy imports are inside the commands, so ``--help`` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from slim_ra.__about__ import __version__

app = typer.Typer(
    help="RazorAttention: find what each attention head must keep, and run with that.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer reads annotations at run time, on Python 3.10 too, hence Optional.
Model = Annotated[str, typer.Argument(help="Model directory (config.json and weights).")]
Output = Annotated[str, typer.Argument(help="File to write, ending in .pt.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, npu:0.")]
Trust = Annotated[bool, typer.Option(help="Run model code that lies in the model directory.")]
Plot = Annotated[Optional[Path], typer.Option(help="Plot to write, .png or .svg.")]  # noqa: UP045
Text = Annotated[Optional[Path], typer.Option(help="Text file, UTF-8.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Seed of random tokens.")]
Sink = Annotated[int, typer.Option(help="First tokens that every head keeps.")]
Window = Annotated[Optional[int], typer.Option(help="Window, in place of the rule.")]  # noqa: UP045
Protect = Annotated[int, typer.Option(help="So many first layers keep everything.")]
OptionalModel = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", help="Model directory, for sizes."),
]


def main() -> None:
    """Run the command line; errors of the user end with status 2 and one message."""
    from slim_core.errors import SlimError

    try:
        app()
    except (SlimError, OSError) as error:
        typer.echo(f"slim-ra: error: {error}", err=True)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"slim-ra {__version__}")
        raise typer.Exit


@app.callback()
def options(
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error.")] = "warning",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    from slim_core.logging import set_logger_level

    set_logger_level(log_level)


@app.command()
def heads(
    model: Model,
    output: Output,
    induction_ratio: Annotated[float, typer.Option(help="Share of induction heads.")] = 0.14,
    echo_ratio: Annotated[float, typer.Option(help="Share of echo heads.")] = 0.01,
    needle_ratio: Annotated[float, typer.Option(help="Share of heads by needle score.")] = 0.0,
    needles: Annotated[int, typer.Option(help="Needle texts for the needle score.")] = 0,
    min_heads: Annotated[int, typer.Option(help="At least so many heads of each kind.")] = 0,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the full cache at 32k tokens, in place of the shares above."),
    ] = None,
    protect_first_layers: Protect = 0,
    unit_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Random tokens; default 2500, or what the model allows."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="How often they are repeated.")] = 4,
    samples: Annotated[int, typer.Option(help="Sequences to average over.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences run at once.")] = 1,
    group_reduce: Annotated[str, typer.Option(help="max or mean over shared heads.")] = "max",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    plot: Plot = None,
) -> None:
    """Find the heads of a RoPE model that must keep everything; write win.pt and win.scores.pt."""
    from slim_ra import commands

    commands.heads(
        model,
        output,
        ratios=(induction_ratio, echo_ratio, needle_ratio),
        min_heads=min_heads,
        budget=budget,
        protect_first_layers=protect_first_layers,
        plot=plot,
        loading=(dtype, device, trust_remote_code),
        search={
            "unit_length": unit_length,
            "repeats": repeats,
            "samples": samples,
            "batch_size": batch_size,
            "group_reduce": group_reduce,
            "seed": seed,
            "needles": needles,
        },
    )


@app.command()
def windows(
    model: Model,
    output: Output,
    mode: Annotated[str, typer.Option(help="legacy, bound or calibrated.")] = "legacy",
    theta: Annotated[float, typer.Option(help="legacy: tolerance.")] = 1e-5,
    alpha: Annotated[int, typer.Option(help="legacy: margin in nats.")] = 100,
    epsilon: Annotated[float, typer.Option(help="bound, calibrated: attention lost.")] = 1e-3,
    mass: Annotated[bool, typer.Option(help="bound: limit the sum of what is lost.")] = False,
    delta: Annotated[float, typer.Option(help="calibrated: queries that may lose more.")] = 0.01,
    text: Text = None,
    length: Annotated[int, typer.Option(help="calibrated: tokens of a text window.")] = 2048,
    samples: Annotated[int, typer.Option(help="calibrated: at most so many windows.")] = 16,
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    plot: Plot = None,
) -> None:
    """Find the windows of an ALiBi model; write win.pt, and win.layers.pt with one a layer."""
    from slim_ra import commands

    commands.windows(
        model,
        output,
        mode=mode,
        legacy=(theta, alpha),
        epsilon=epsilon,
        mass=mass,
        delta=delta,
        calibration=(text, length, samples),
        plot=plot,
        loading=(dtype, "cpu", trust_remote_code),
    )


@app.command(name="eval")
def evaluate(
    model: Model,
    heads: Annotated[Path, typer.Option(help="win.pt, or a .json or .tsv head list.")],
    length: Annotated[int, typer.Option(help="Tokens of a passkey text.")] = 512,
    samples: Annotated[int, typer.Option(help="Passkeys, and at most so many texts.")] = 8,
    text: Text = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a text before decoding.")] = 384,
    decode: Annotated[int, typer.Option(help="Tokens decoded after them.")] = 128,
    window: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Window of compressed heads; repeat it for a curve."),
    ] = None,
    sink_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="First tokens kept; default 4, for ALiBi windows 0."),
    ] = None,
    compensation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="mean or none; default mean, for ALiBi windows none."),
    ] = None,
    mode: Annotated[str, typer.Option(help="incremental or prefill.")] = "incremental",
    protect_first_layers: Protect = 0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    plot: Plot = None,
    json: Annotated[Optional[Path], typer.Option(help="Figures as JSON.")] = None,  # noqa: UP045
) -> None:
    """Measure passkey accuracy, and perplexity of a text, against the full cache."""
    from slim_ra import commands

    given = {"sink_size": sink_size, "compensation": compensation}
    commands.evaluate(
        model,
        heads,
        passkey=(length, samples, seed),
        text=(text, prompt, decode, samples),
        windows=list(window or []),
        mode=mode,
        policy={
            "protect_first_layers": protect_first_layers,
            **{name: value for name, value in given.items() if value is not None},
        },
        loading=(dtype, device, trust_remote_code),
        plot=plot,
        json=json,
    )


@app.command()
def show(
    profile: Annotated[Path, typer.Argument(help="win.pt, or a .json or .tsv head list.")],
    model: OptionalModel = None,
    sink_size: Sink = 4,
    window: Window = None,
    plot: Plot = None,
) -> None:
    """Show a profile: a table, predicted memory (with --model), and a heat map (with --plot)."""
    from slim_ra import commands

    commands.show(profile, model=model, sink_size=sink_size, window=window, plot=plot)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="win.pt, .json or .tsv.")],
    output: Annotated[str, typer.Argument(help="win.pt, .json or .tsv.")],
    model: OptionalModel = None,
) -> None:
    """Convert between win.pt, Golden-Stick's JSON and DuoAttention's TSV (needs --model)."""
    from slim_ra import commands

    commands.convert(source, output, model=model)
