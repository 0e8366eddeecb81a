"""Plot of perplexity over kept parameters."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slim_core.files import MODE_SHARED, write_bytes


def plot_curves(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves of a sweep into an .svg or .png file.

    Parameters
    ----------
    result : dict
        ``model``, ``dense_perplexity``, and ``curves``: lists of points with ``kept_of_layers``
        and ``perplexity`` by title.
    path : Path
        Written atomically.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for title, points in result["curves"].items():
        axes.plot(
            [100 * point["kept_of_layers"] for point in points],
            [point["perplexity"] for point in points],
            marker="o",
            label=title,
        )
    axes.axhline(result["dense_perplexity"], color="gray", linestyle="--", label="dense")
    axes.set(
        xlabel="weights kept in the decomposed layers [%]",
        ylabel="perplexity",
        yscale="log",
        title=result["model"],
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], metadata=_no_date(path))
    write_bytes(path, buffer.getvalue(), MODE_SHARED)


def _no_date(path: Path) -> dict[str, None] | None:
    """Keep the day out of the file, so that equal figures give equal bytes."""
    return {"Date": None} if path.suffix == ".svg" else None
