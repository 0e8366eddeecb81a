"""``slim-ptq analyze``: which layers are sensitive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from slim_ptq.commands.options import (
    AsJson,
    Calib,
    Device,
    Length,
    Method,
    Metric,
    Model,
    RecipeFile,
    Samples,
    Scheme,
    Trust,
    quiet_loading,
    show_errors,
)


def analyze(
    model: Model,
    calib: Calib = None,
    metric: Metric = "quantile",
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    method: Method = None,
    top: Annotated[int, typer.Option(help="So many groups of layers are listed.")] = 15,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--eval", help="Text file for model_error, in the place of --calib."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write the ranking as .html, .png or .svg."),
    ] = None,
    samples: Samples = 32,
    length: Length = 512,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Rank the layers of MODEL, and list those that are best left in floating point."""
    with show_errors(), quiet_loading():
        from rich.console import Console

        from slim_core.errors import InvalidValueError
        from slim_core.validate import check_int
        from slim_ptq.analysis import analyze as run
        from slim_ptq.analysis.plot import check_plot_file, save_plot
        from slim_ptq.analysis.show import paste_text, print_analysis

        check_int("top", top, low=1)
        if calib is None:
            raise InvalidValueError("analyze needs calibration data", hint="--calib FILE")
        if plot is not None:
            check_plot_file(plot)
        found = run(
            model,
            calibration=calib,
            metric=metric,
            scheme=scheme,
            recipe=recipe,
            method=method,
            text=text,
            samples=samples,
            length=length,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if plot is not None:
            save_plot(found, top, plot)
        if as_json:
            typer.echo(json.dumps(found.to_dict(top), indent=2))
            return
        print_analysis(found, top, Console())
        typer.echo("\n" + paste_text(found, top), nl=False)
        if plot is not None:
            typer.echo(f"written to {plot}")
