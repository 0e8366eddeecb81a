"""The report as a summary for a terminal, a log or a pipe."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slim_core.report import Report
from slim_core.report_text import (
    describe_layers,
    describe_perplexity,
    format_bytes,
    format_error,
    format_ratio,
    format_seconds,
)

_MAX_FALLBACKS = 10


def print_report(report: Report, console: Console, *, worst: int = 5) -> None:
    """Print size, perplexity, the worst layers and the fallbacks.

    Parameters
    ----------
    report : Report
    console : rich.console.Console
    worst : int
        Number of layers to list.
    """
    console.print(_facts(report))
    layers = report.worst(worst)
    if layers:
        what = "output" if report.has_output_errors else "weight"
        console.print()
        console.print(Text(f"Layers with the largest {what} error", style="bold"))
        console.print(_layer_table(report, worst))
    if report.fallbacks:
        console.print()
        console.print(Text(f"Fallbacks ({len(report.fallbacks)})", style="bold yellow"))
        console.print(_fallback_table(report))


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", Text(report.model))
    table.add_row("scheme", Text(f"{report.scheme}, format {report.format} ({report.tool})"))
    table.add_row("layers", describe_layers(report))
    before, after = report.bytes_before, report.bytes_after
    table.add_row(
        "size", f"{format_bytes(before)} -> {format_bytes(after)}, {format_ratio(before, after)}"
    )
    text = describe_perplexity(report)
    if text is not None:
        table.add_row("perplexity", Text(text))
    if report.seconds:
        time = format_seconds(sum(report.seconds.values()))
        memory = report.peak_memory
        peak = "" if memory is None else f", peak memory {format_bytes(memory)}"
        table.add_row("time", time + peak)
    return table


def _layer_table(report: Report, worst: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("weight error", justify="right", no_wrap=True)
    outputs = any(layer.output_error is not None for layer in report.quantized)
    if outputs:
        table.add_column("output error", justify="right", no_wrap=True)
    for layer in report.worst(worst):
        errors = [format_error(layer.weight_error)]
        errors += [format_error(layer.output_error)] if outputs else []
        table.add_row(Text(layer.name), Text(layer.type), *errors)
    return table


def _fallback_table(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, reason in report.fallbacks[:_MAX_FALLBACKS]:
        table.add_row(Text(name), Text(reason))
    more = len(report.fallbacks) - _MAX_FALLBACKS
    if more > 0:
        table.add_row(f"... and {more} more", "")
    return table
