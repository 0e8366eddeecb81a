"""The ranking as a picture: a page of its own, or a figure of matplotlib (extra ``plots``)."""

from __future__ import annotations

import math
from pathlib import Path

from slim_core.errors import InvalidValueError, MissingDependencyError
from slim_core.files import PathLike, as_path, atomic_write, write_bytes
from slim_ptq.analysis.ranking import MEANINGS, Analysis
from slim_ptq.analysis.show import render_analysis

SUFFIXES = (".html", ".png", ".svg")


def check_plot_file(path: PathLike) -> Path:
    """Return the path of a plot that can be written, before the work for it is done.

    Raises
    ------
    InvalidValueError
        The suffix is none of ``.html``, ``.png`` and ``.svg``.
    MissingDependencyError
        A figure is asked for and matplotlib is not installed.
    FileNotFoundError
        There is no such directory.
    """
    file = as_path("plot", path)
    if file.suffix not in SUFFIXES:
        raise InvalidValueError(f"plot must end in {', '.join(SUFFIXES)}, not {file.name!r}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {file.parent}")
    if file.suffix != ".html":
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                f"{file.suffix} plots need matplotlib, which is not installed",
                hint="pip install 'slim-ptq[plots]', or plot to a .html file",
            ) from error
    return file


def save_plot(analysis: Analysis, count: int, path: PathLike) -> None:
    """Write the ranking as a page (``.html``) or the first groups as a figure (``.png, .svg``)."""
    file = check_plot_file(path)
    if file.suffix == ".html":
        write_bytes(file, render_analysis(analysis, count).encode())
        return
    from matplotlib.figure import Figure

    shown = analysis.top(count)[::-1]
    figure = Figure(figsize=(8, 0.8 + 0.25 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    finite = max((item.score for item in shown if math.isfinite(item.score)), default=1.0)
    axes.barh([item.group for item in shown], [min(item.score, finite) for item in shown])
    axes.set_xlabel(f"{analysis.metric.value}: {MEANINGS[analysis.metric]}", fontsize=8)
    axes.set_title(f"{analysis.model}, {analysis.scheme}", fontsize=10)
    axes.tick_params(labelsize=8)
    with atomic_write(file) as stream:
        figure.savefig(stream, format=file.suffix[1:], dpi=150)
