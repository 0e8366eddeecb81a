"""A plan as a table for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table

from slim_core.plan import LayerPlan, Plan

_MB = 1e6


def print_plan(plan: Plan, console: Console) -> None:
    """Print every layer with its shape, scheme and reason, then sizes and warnings."""
    table = Table(box=None, pad_edge=False)
    for title, justify in (("layer", "left"), ("shape", "right"), ("scheme", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("reason", overflow="fold")
    for layer in plan.layers:
        shape = "x".join(str(size) for size in layer.shape)
        table.add_row(layer.name, shape, str(layer.scheme), layer.reason)
    console.print(table)
    for line in _summary(plan):
        console.print(line, highlight=False)


def _summary(plan: Plan) -> Iterator[str]:
    def scheme(layer: LayerPlan) -> str:
        return str(layer.scheme)

    counts = groupby(sorted(plan.layers, key=scheme), key=scheme)
    listed = ", ".join(f"{len(list(layers))} {name}" for name, layers in counts)
    yield f"{len(plan.layers)} layers: {listed}; type {plan.model_type}, format {plan.format}"
    ratio = plan.bytes_before / plan.bytes_after
    yield (
        f"weights {plan.bytes_before / _MB:.1f} MB -> about {plan.bytes_after / _MB:.1f} MB "
        f"({ratio:.2f}x smaller)"
    )
    yield f"memory about {plan.memory / _MB:.0f} MB, libraries and activations not counted"
    if plan.needs_calibration:
        yield "needs calibration data"
    for warning in plan.warnings:
        yield f"note: {warning}"
