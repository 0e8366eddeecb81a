"""The report as one HTML page that needs nothing but itself: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from slim_core.report import LayerReport, Report
from slim_core.report_chart import BarChart, kinds_of, legend
from slim_core.report_style import STYLE
from slim_core.report_text import (
    describe_layers,
    format_bytes,
    format_change,
    format_error,
    format_ratio,
    format_seconds,
)

_WORST = 12
_OPEN_TABLE = 40  # a table of up to so many layers is unfolded from the start


def render_html(report: Report) -> str:
    """Return the page; every text of the report is escaped."""
    title = f"{report.model} in {report.scheme}"
    parts = [
        f"<header><p class=tool>{escape(report.tool)}</p><h1>{escape(report.model)}</h1>"
        f"<p class=sub>{escape(report.scheme)}, format {escape(report.format)}, "
        f"{escape(describe_layers(report))}</p></header>",
        _cards(report),
        _charts(report),
        _worst(report),
        _fallbacks(report),
        _layers(report),
        _facts("Calibration", report.calibration or {}),
        _facts("Time by stage", {k: format_seconds(v) for k, v in report.seconds.items()}),
        _facts("Provenance", report.provenance),
    ]
    return html_page(title, parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page of these parts, which are HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _cards(report: Report) -> str:
    before, after = report.bytes_before, report.bytes_after
    cards = [("Size on disk", format_bytes(after), f"from {format_bytes(before)}")]
    cards.append(("Ratio", *_split_ratio(before, after)))
    cards += _perplexity_card(report)
    quantized = len(report.quantized)
    rest = len(report.layers) - quantized
    fallbacks = len(report.fallbacks)
    note = f"{rest} left in float, {fallbacks} fallback{'s'[: fallbacks != 1]}"
    cards.append(("Layers quantized", f"{quantized} of {len(report.layers)}", note))
    if report.seconds:
        peak = report.peak_memory
        note = "" if peak is None else f"peak memory {format_bytes(peak)}"
        cards.append(("Time", format_seconds(sum(report.seconds.values())), note))
    body = "".join(
        f"<div class=card><p class=label>{escape(label)}</p><p class=value>{escape(value)}</p>"
        f"<p class=note>{escape(note)}</p></div>"
        for label, value, note in cards
    )
    return f"<section class=cards>{body}</section>"


def _split_ratio(before: int, after: int) -> tuple[str, str]:
    factor, _, word = format_ratio(before, after).partition(" ")
    return factor, word


def _perplexity_card(report: Report) -> list[tuple[str, str, str]]:
    before, after = report.perplexity_before, report.perplexity_after
    if after is None:
        return []
    source = "" if report.perplexity_text is None else f" on {report.perplexity_text}"
    tokens = "" if report.perplexity_tokens is None else f" ({report.perplexity_tokens:,} tokens)"
    if before is None:
        return [("Perplexity", f"{after:.4g}", (source + tokens).strip())]
    note = f"from {before:.4g}, {format_change(before, after)}{source}{tokens}"
    return [("Perplexity", f"{after:.4g}", note)]


def _charts(report: Report) -> str:
    layers = report.quantized
    if not layers:
        return ""
    names = [layer.name for layer in layers]
    kinds = kinds_of(names)
    charts: list[tuple[str, list[float | None]]] = [
        ("Weight error", [layer.weight_error for layer in layers])
    ]
    if any(layer.output_error is not None for layer in layers):
        charts.append(("Output error", [layer.output_error for layer in layers]))
    body = "".join(
        f"<h3>{title}</h3>{BarChart(title, errors).render(names, kinds, _labels(layers, errors))}"
        for title, errors in charts
    )
    return (
        "<section><h2>Error of each layer</h2><p class=note>Relative Frobenius error, layers in "
        "the order of the model from left to right; point at a bar for its name.</p>"
        f"{legend(kinds)}{body}</section>"
    )


def _labels(layers: Sequence[LayerReport], errors: Sequence[float | None]) -> list[str]:
    return [
        f"{layer.name}: {format_error(error)} ({layer.type})"
        for layer, error in zip(layers, errors, strict=True)
    ]


def _worst(report: Report) -> str:
    layers = report.worst(_WORST)
    if not layers:
        return ""
    what = "output" if report.has_output_errors else "weight"
    return f"<section><h2>Largest {what} errors</h2>{_table(layers, bars=what)}</section>"


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    state = " open" if len(report.layers) <= _OPEN_TABLE else ""
    return (
        f"<section><details{state}><summary>All {len(report.layers)} layers</summary>"
        f"{_table(report.layers)}</details></section>"
    )


def _table(layers: Iterable[LayerReport], bars: str | None = None) -> str:
    shown = tuple(layers)
    outputs = any(layer.output_error is not None for layer in shown)
    heads = ["Layer", "Type", "Method", "Shape", "Bytes", "Weight error"]
    heads += ["Output error"] if outputs else []
    cells = "".join(f"<th{' class=n' if i > 2 else ''}>{h}</th>" for i, h in enumerate(heads))
    peaks = [_error(layer, bars) for layer in shown] if bars else []
    top = max(peaks, default=0.0) or 1.0
    rows = []
    for layer in shown:
        bar = f"{100 * _error(layer, bars) / top:.1f}" if bars else None
        rows.append(_row(layer, outputs, bar))
    return f"<div class=scroll><table><tr>{cells}</tr>{''.join(rows)}</table></div>"


def _error(layer: LayerReport, what: str | None) -> float:
    value = layer.output_error if what == "output" else layer.weight_error
    return value if value is not None and value < float("inf") else 0.0


def _row(layer: LayerReport, outputs: bool, bar: str | None) -> str:
    name = f"<span class=name>{escape(layer.name)}</span>"
    if bar is not None:
        name += (
            '<svg class="hbar" viewBox="0 0 100 4" preserveAspectRatio="none">'
            f'<rect width="{bar}" height="4"/></svg>'
        )
    notes = "".join(f"<div class=remark>{escape(note)}</div>" for note in layer.notes)
    shape = " &times; ".join(str(size) for size in layer.shape)
    size = f"{format_bytes(layer.bytes_before)} &rarr; {format_bytes(layer.bytes_after)}"
    cells = [
        f"<td>{name}{notes}</td><td>{escape(layer.type)}</td><td>{escape(layer.method)}</td>",
        f"<td class=n>{shape}</td><td class=n>{size}</td>",
        f"<td class=n>{format_error(None if layer.is_float else layer.weight_error)}</td>",
        f"<td class=n>{format_error(layer.output_error)}</td>" if outputs else "",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _fallbacks(report: Report) -> str:
    if not report.fallbacks:
        return ""
    rows = "".join(
        f"<tr><td class=name>{escape(name)}</td><td>{escape(reason)}</td></tr>"
        for name, reason in report.fallbacks
    )
    return (
        f"<section class=warn><h2>Fallbacks ({len(report.fallbacks)})</h2><div class=scroll>"
        f"<table><tr><th>Layer</th><th>Reason</th></tr>{rows}</table></div></section>"
    )


def _facts(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_phrase(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<section><h2>{title}</h2><table class=facts>{rows}</table></section>"


def _phrase(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_phrase(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_phrase(item) for item in value)
    return str(value)
