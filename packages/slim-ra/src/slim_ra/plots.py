"""Plots: scores of all heads, and accuracy over bytes held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slim_core.errors import InvalidValueError, MissingDependencyError
from slim_core.files import PathLike, atomic_write
from slim_ra.profile import AlibiWindows, RetrievalHeads
from slim_ra.scores import HeadScores

ENDINGS = (".png", ".svg")


def check_plot_path(path: PathLike) -> Path:
    """Require a path that ends in .png or .svg, and matplotlib.

    Raises
    ------
    InvalidValueError
        Another ending.
    MissingDependencyError
        matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix not in ENDINGS:
        raise InvalidValueError(f"plot must end in {' or '.join(ENDINGS)}, not {file.name!r}")
    _figure(1, 1)
    return file


def head_map(path: PathLike, heads: RetrievalHeads, scores: HeadScores | None) -> None:
    """Draw the scores of all heads, the chosen ones framed; without scores only the choice."""
    import torch

    file = check_plot_path(path)
    if scores is None:
        layers = max(heads.union(), default=0) + 1
        width = max((max(row) for row in heads.union().values()), default=0) + 1
        chosen = torch.zeros(layers, width)
        for layer, row in heads.union().items():
            chosen[layer, row] = 1.0
        panels: list[tuple[str, Any, Mapping[int, list[int]]]] = [("kept", chosen, {})]
    else:
        panels = [
            ("induction", scores.induction, heads.induction),
            ("echo", scores.echo, heads.echo),
        ]
        if scores.needle is not None:
            panels.append(("needle", scores.needle, {}))
    rows, columns = panels[0][1].shape
    figure = _figure(max(3.2, 0.35 * columns + 1.8) * len(panels), max(2.4, 0.22 * rows + 1.2))
    for index, (title, values, frames) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        image = axes.imshow(values.numpy(), aspect="auto", vmin=0.0, cmap="viridis")
        figure.colorbar(image, ax=axes)
        for layer, row in frames.items():
            for head in row:
                _frame(axes, head, layer)
        axes.set(title=title, xlabel="KV head", ylabel="layer")
        _whole_numbers(axes)
    _save(figure, file)


def window_map(path: PathLike, windows: AlibiWindows) -> None:
    """Draw the windows of all heads on a logarithmic scale."""
    file = check_plot_path(path)
    values = windows.windows.clamp(min=1).float().log10()
    values = values[None] if values.ndim == 1 else values
    figure = _figure(max(4.0, 0.3 * values.shape[1] + 2.0), max(2.4, 0.22 * len(values) + 1.2))
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(values.numpy(), aspect="auto"), ax=axes)
    axes.set(title="window, log10 tokens", xlabel="head", ylabel="layer")
    _whole_numbers(axes)
    _save(figure, file)


def trade_off(
    path: PathLike,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ylabel: str,
    title: str = "",
) -> None:
    """Draw one curve a method: the share of the full cache's bytes against a figure of merit."""
    file = check_plot_path(path)
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for name, points in curves.items():
        ordered = sorted(points)
        style = {"linewidth": 2.4, "marker": "o"} if name.startswith("razor") else {"marker": "."}
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], label=name, **style)
    axes.set(xlabel="bytes held / full cache", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, file)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib", hint="pip install 'slim-ra[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _frame(axes: Any, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=1.5))


def _save(figure: Any, file: Path) -> None:
    with atomic_write(file, 0o644) as stream:
        figure.savefig(stream, format=file.suffix[1:], dpi=120)
