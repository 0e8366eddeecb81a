"""A plan: which layer gets which ranks, ready to be saved or applied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from slim_core.files import PathLike
from slim_lowrank.build import Factors
from slim_lowrank.calibrate import read_batches
from slim_lowrank.helpers import count_parameters
from slim_lowrank.layers import Layer
from slim_lowrank.measure import measure
from slim_lowrank.report import LayerReport, Report, layer_report
from slim_lowrank.sequential import decompose_in_order
from slim_lowrank.solve import solve_plain, solve_with_data
from slim_lowrank.surgery import apply_table
from slim_lowrank.table import LayerRanks, save_table

if TYPE_CHECKING:
    from slim_lowrank.decomposer import Decomposer


class Plan:
    """Ranks chosen by a :class:`slim_lowrank.Decomposer`.

    Parameters
    ----------
    decomposer : Decomposer
        Holds the model and its statistics.
    table : dict of LayerRanks
        The layers to decompose.
    reasons : dict of str
        Why the others stay dense.
    """

    def __init__(
        self, decomposer: Decomposer, table: Mapping[str, LayerRanks], reasons: Mapping[str, str]
    ) -> None:
        self.decomposer = decomposer
        self.table = dict(table)
        self.reasons = dict(reasons)

    def save(self, path: PathLike) -> None:
        """Write the rank table as JSON, atomically, mode 0640."""
        save_table(path, self.table)

    def structure(self, model: nn.Module) -> nn.Module:
        """Change the structure of a model (on ``meta``, for example) in place; no weights."""
        return apply_table(model, self.table)

    def apply(
        self,
        *,
        sequential: bool = False,
        inplace: bool = False,
        measure_on: Iterable[Any] | None = None,
    ) -> tuple[nn.Module, Report]:
        """Decompose the layers.

        Parameters
        ----------
        sequential : bool
            Let each layer make up for the errors of those before it: it is fitted to give the
            dense model's outputs from the decomposed model's inputs, on the calibration batches.
        inplace : bool
            Change the model itself instead of a copy.
        measure_on : iterable, optional
            Batches, better not those of the calibration, on which to measure the error of every
            layer for the report.

        Returns
        -------
        model : Module
            The decomposed model; a new module if the model itself is a layer.
        report : Report
            What was done.

        Raises
        ------
        CalibrationError
            ``sequential`` without calibration.
        """
        decomposer = self.decomposer
        batches = None if measure_on is None else read_batches(measure_on)
        before = count_parameters(decomposer.model)
        dense = decomposer.model
        if not inplace:
            model = copy.deepcopy(dense)
        else:
            model = dense
            # Measuring and compensating compare with the dense model, which is about to change.
            dense = copy.deepcopy(dense) if sequential or batches is not None else dense
        errors: dict[str, float | None] = {}

        def solve(layer: Layer, ranks: LayerRanks) -> Factors:
            factors = self._solve(layer, ranks)
            errors[layer.name] = factors.error
            return factors

        if sequential:
            model = decompose_in_order(
                dense,
                model,
                self.table,
                decomposer.batches,
                decomposer.statistics,
                solve,
                errors,
            )
        else:
            model = apply_table(model, self.table, solve)
        report = Report(
            decomposer.method,
            sequential,
            before,
            count_parameters(model),
            self._layer_reports(errors),
            decomposer.notes,
        )
        if batches is not None:
            found = measure(dense, model, list(self.table), batches, own_inputs=sequential)
            report = report.with_measured(found)
        return model, report

    def _solve(self, layer: Layer, ranks: LayerRanks) -> Factors:
        layers, statistics = self.decomposer.layers, self.decomposer.statistics
        head = next((name for name in layer.tied if layers[name].kind != "embedding"), None)
        if layer.kind == "embedding" and head in statistics:
            return _as_table(solve_with_data(layers[head], self.table[head], statistics[head]))
        if layer.name in statistics:
            return solve_with_data(layer, ranks, statistics[layer.name])
        return solve_plain(layer, ranks)

    def _layer_reports(self, errors: Mapping[str, float | None]) -> tuple[LayerReport, ...]:
        seen: set[str] = set()
        reports = []
        for name, layer in self.decomposer.layers.items():
            reports.append(
                layer_report(
                    name,
                    layer.kind,
                    layer.shape,
                    self.table.get(name),
                    owns=not seen.intersection(layer.tied),
                    error=errors.get(name),
                    reason=self.reasons.get(name),
                )
            )
            seen.add(name)
        return tuple(reports)


def _as_table(head: Factors) -> Factors:
    """Turn the factors of a head ``(r, width), (entries, r)`` into those of its embedding."""
    first, last = head.weights
    return Factors((last, first.T), error=head.error)
