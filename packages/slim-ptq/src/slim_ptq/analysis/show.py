"""Analyses for people: a table on the console, and one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from slim_core.report_chart import BarChart, kinds_of, legend
from slim_core.report_html import html_page
from slim_ptq.analysis.ranking import MEANINGS, Analysis, Sensitivity, as_python, as_yaml

if TYPE_CHECKING:
    from rich.console import Console


def print_analysis(analysis: Analysis, count: int, console: Console) -> None:
    """Print the first groups as a table, and what leaves them in floating point."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in _heads(analysis):
        table.add_column(title, justify="left" if title == "layers" else "right", overflow="fold")
    for rank, item in enumerate(analysis.top(count), 1):
        table.add_row(*(Text(cell) for cell in _cells(analysis, rank, item)))
    console.print(f"{analysis.metric.value}: {MEANINGS[analysis.metric]}", highlight=False)
    console.print(table)
    rest = len(analysis.groups) - count
    if rest > 0:
        console.print(f"... and {rest} less sensitive ones", highlight=False)


def paste_text(analysis: Analysis, count: int) -> str:
    """Return the lists of names of the first groups, for a recipe and for ``QuantConfig``."""
    return (
        f"# for a recipe\n{as_yaml(analysis.exclude(count))}"
        f"# for QuantConfig\n{as_python(analysis.disable_names(count))}"
    )


def render_analysis(analysis: Analysis, count: int) -> str:
    """Return the page; every text is escaped."""
    in_order = sorted(analysis.groups, key=lambda item: _place(item.group))
    names = [item.group for item in in_order]
    kinds = kinds_of(names)
    chart = BarChart("Sensitivity", [item.score for item in in_order], tick="{:.4g}".format)
    labels = [f"{item.group}: {item.score:.4g}" for item in in_order]
    data = analysis.data
    head = (
        f"<header><p class=tool>slim-ptq analyze</p><h1>{escape(analysis.model)}</h1>"
        f"<p class=sub>{escape(analysis.scheme)}, {escape(analysis.metric.value)} on "
        f"{data['tokens']:,} tokens of {escape(str(data['source']))}</p></header>"
    )
    bars = (
        "<section><h2>Sensitivity of each group of layers</h2><p class=note>"
        f"{escape(MEANINGS[analysis.metric])}; layers in the order of the model from left to "
        f"right; point at a bar for its name.</p>{legend(kinds)}"
        f"{chart.render(names, kinds, labels)}</section>"
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_class(i)}>{escape(cell)}</td>" for i, cell in enumerate(cells))
        + "</tr>"
        for cells in (_cells(analysis, rank, item) for rank, item in enumerate(analysis.groups, 1))
    )
    heads = "".join(f"<th{_class(i)}>{head}</th>" for i, head in enumerate(_heads(analysis)))
    table = (
        f"<section><h2>Ranking</h2><div class=scroll><table><tr>{heads}</tr>{rows}</table></div>"
        "</section>"
    )
    lists = (
        f"<section><h2>To leave the first {min(count, len(analysis.groups))} groups in floating "
        f"point</h2><pre>{escape(paste_text(analysis, count))}</pre></section>"
    )
    return html_page(f"Sensitivity of {analysis.model}", [head, bars, table, lists])


def _heads(analysis: Analysis) -> list[str]:
    return ["layers", "rank", analysis.metric.value] + (
        [] if analysis.perplexity is None else ["perplexity", "change"]
    )


def _cells(analysis: Analysis, rank: int, item: Sensitivity) -> list[str]:
    cells = [item.group, str(rank), f"{item.score:.4g}"]
    if analysis.perplexity is not None and item.perplexity is not None:
        change = 100 * (item.perplexity / analysis.perplexity - 1)
        cells += [f"{item.perplexity:.4f}", f"{change:+.3f} %"]
    return cells


def _class(column: int) -> str:
    return " class=name" if column == 0 else " class=n"


def _place(group: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers inside names as numbers; the order within a block is free."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in group.split(".")]
