"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text

from slim_ra.memory import predict
from slim_ra.policy import RazorPolicy
from slim_ra.profile import AlibiWindows, RetrievalHeads
from slim_ra.scores import HeadScores

LENGTHS = (8192, 32768, 131072)
_SHADES = " ░▒▓█"


def heads_table(heads: RetrievalHeads, scores: HeadScores | None = None) -> Table:
    """One row a layer that keeps heads; with scores, every layer and a shaded map."""
    table = Table("layer", "induction", "echo", title=f"{heads.count()} heads keep everything")
    layers: Sequence[int] = sorted(heads.union())
    if scores is not None:
        table.add_column("induction score")
        table.add_column("echo score")
        layers = range(len(scores.induction))
    for layer in layers:
        cells: list[str | Text] = [
            str(layer),
            " ".join(map(str, heads.induction.get(layer, []))) or "-",
            " ".join(map(str, heads.echo.get(layer, []))) or "-",
        ]
        if scores is not None:
            cells += [_shaded(scores.induction[layer]), _shaded(scores.echo[layer])]
        table.add_row(*cells)
    return table


def windows_table(windows: AlibiWindows) -> Table:
    """One row a layer, or one for all layers."""
    rows = windows.windows if windows.windows.ndim == 2 else windows.windows[None]
    table = Table("layer", "windows of heads 0, 1, ...", title="latest tokens that each head keeps")
    for layer, row in enumerate(rows.tolist()):
        name = str(layer) if windows.windows.ndim == 2 else "all"
        table.add_row(name, " ".join(map(str, row)))
    return table


def memory_table(
    policy: RazorPolicy, itemsize: int, lengths: Sequence[int] = LENGTHS, batch: int = 1
) -> Table:
    """Predicted bytes of the full and of the compressed cache."""
    table = Table(
        "tokens",
        "full cache",
        "razor",
        "share",
        title=f"predicted memory, {itemsize} bytes a number",
    )
    for column in table.columns:
        column.justify = "right"
    for tokens in lengths:
        memory = predict(policy, tokens, batch=batch, itemsize=itemsize)
        table.add_row(
            f"{tokens:,}", _mib(memory.full), _mib(memory.razor), f"{100 * memory.ratio:.1f} %"
        )
    return table


def _shaded(row: torch.Tensor) -> Text:
    """One character a head, darker for higher scores, and the largest score."""
    steps = (row.clamp(0, 1) * (len(_SHADES) - 1)).round().long().tolist()
    return Text("".join(_SHADES[step] for step in steps) + f" max {float(row.max()):.3f}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
