"""What a decomposition did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from slim_core.files import PathLike, write_json
from slim_lowrank.table import LayerRanks

VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Parameters
    ----------
    name, kind : str
        Which layer, and what it is.
    shape : tuple of int
        Of the dense weight.
    form : str or None
        None where the layer stays dense.
    ranks : tuple of int
        Empty where the layer stays dense.
    params_before, params_after : int
        Weights without bias; 0 after for a layer that reads the factors of another.
    predicted_error, measured_error : float or None
        Relative error of the outputs, ``sqrt(E|y - y'|^2 / E|y|^2)``: predicted from the
        calibration statistics (of the weight itself without them), and measured with the layer's
        final values on other data.  After a sequential update both compare the decomposed model,
        with its own inputs, to the dense one; otherwise every layer gets the dense inputs.
    reason : str or None
        Why the layer stays dense.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    form: str | None
    ranks: tuple[int, ...]
    params_before: int
    params_after: int
    predicted_error: float | None = None
    measured_error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """A whole run.

    Parameters
    ----------
    method : str
        ``plain``, ``output`` or ``loss``.
    sequential : bool
        Whether later layers made up for the errors of earlier ones.
    params_before, params_after : int
        Parameters of the model, as :func:`slim_lowrank.count_parameters` counts them.
    layers : tuple of LayerReport
        Every layer of a kind that can be decomposed, in the order of the model.
    notes : tuple of str
        What was done otherwise than asked.
    """

    method: str
    sequential: bool
    params_before: int
    params_after: int
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def decomposed(self) -> tuple[LayerReport, ...]:
        """The layers that do not stay dense."""
        return tuple(layer for layer in self.layers if layer.form is not None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"version": VERSION, **asdict(self)}

    def save(self, path: PathLike) -> None:
        """Write the report as JSON, atomically."""
        write_json(path, self.to_json())

    def with_measured(self, errors: dict[str, float]) -> Report:
        """Return a copy with measured errors filled in."""
        layers = (
            replace(layer, measured_error=errors.get(layer.name, layer.measured_error))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def __str__(self) -> str:
        rows = [("layer", "shape", "form", "rank", "kept", "predicted", "measured")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name or "(model)",
                    "x".join(map(str, layer.shape)),
                    layer.form or "dense",
                    ",".join(map(str, layer.ranks)) or "-",
                    f"{layer.params_after / max(layer.params_before, 1):.1%}",
                    _percent(layer.predicted_error),
                    _percent(layer.measured_error) if layer.form else layer.reason or "-",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in rows
        ]
        share = self.params_after / max(self.params_before, 1)
        lines.append(
            f"{len(self.decomposed)} of {len(self.layers)} layers decomposed ({self.method}"
            f"{', sequential' if self.sequential else ''}): "
            f"{self.params_before:,} -> {self.params_after:,} parameters ({share:.1%})"
        )
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])


def layer_report(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    ranks: LayerRanks | None,
    *,
    owns: bool,
    error: float | None,
    reason: str | None,
) -> LayerReport:
    """Return the line of a layer; ``owns`` is False where another layer holds the weights."""
    before = math.prod(shape) if owns else 0
    if ranks is None:
        return LayerReport(name, kind, shape, None, (), before, before, reason=reason)
    after = ranks.params if owns else 0
    return LayerReport(name, kind, shape, ranks.form, ranks.ranks, before, after, error)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
