"""Moments of one layer across two models: wanted outputs of one, inputs of the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from slim_lowrank.factorize import Array
from slim_lowrank.layers import Layer, to_array
from slim_lowrank.solve import Statistics, flat_weight
from slim_lowrank.watch import Moments, feature_width, input_rows, output_rows, wide
from slim_lowrank.whitening import SHRINKAGE

RIDGES = (SHRINKAGE, 1e-3, 1e-2, 1e-1, 1.0)


class _Fold:
    """Sums over a part of the positions."""

    def __init__(self, outputs: int, width: int) -> None:
        self.moments = Moments(width)
        self.target = torch.zeros(outputs, width, dtype=torch.float64)
        self.mean = torch.zeros(outputs, dtype=torch.float64)
        self.energy = 0.0

    def add(self, y: Tensor, x: Tensor) -> None:
        self.moments.add(x)
        self.target += (y.T @ x).cpu()
        self.mean += y.sum(0, dtype=torch.float64).cpu()
        self.energy += float(y.double().square().sum())


class Pair:
    """Collects what the sequential update of one layer needs.

    Positions go to two folds in turns, chunk by chunk: each judges what was fitted on the other.

    Parameters
    ----------
    dense, small : Layer
        The layer in the model as it was, and in the one decomposed so far.
    """

    def __init__(self, dense: Layer, small: Layer) -> None:
        width = feature_width(dense) or 0
        self.layers = dense, small
        self.folds = _Fold(dense.shape[0], width), _Fold(dense.shape[0], width)
        self.matched = True
        self._turn = 0
        self._wanted: list[Tensor] = []
        self._chunks: list[Tensor] = []

    def hook(self, side: int, mask: Tensor | None) -> Any:
        """Watch outputs of the dense layer (side 0) or inputs of the small one (side 1)."""
        layer = self.layers[side]

        def wanted(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            self._wanted.append(wide(output_rows(layer, y, mask)))

        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._chunks += [wide(rows) for rows in input_rows(layer, args[0], mask)]

        if side == 0:
            return layer.module.register_forward_hook(wanted)
        return layer.module.register_forward_pre_hook(seen)

    def add(self) -> None:
        """Add what a batch showed."""
        wanted, chunks = self._wanted, self._chunks
        self._wanted, self._chunks = [], []
        count = sum(len(rows) for rows in wanted)
        self.matched &= count == sum(len(rows) for rows in chunks)
        if not self.matched or not count:
            return
        y = torch.cat(wanted)
        for rows, part in zip(chunks, torch.split(y, [len(rows) for rows in chunks]), strict=True):
            half = len(rows) // 2
            for cut in (slice(None, half), slice(half, None)):
                self.folds[self._turn % 2].add(part[cut], rows[cut])
                self._turn += 1

    def statistics(self) -> Statistics:
        """Return the means over all positions, with the ridge that predicts best."""
        one, two = self.folds
        rows = one.moments.rows + two.moments.rows
        return Statistics(
            rows,
            input_mean=((one.moments.total + two.moments.total) / rows).numpy(),
            input_second=((one.moments.products + two.moments.products) / rows).numpy(),
            target=to_array((one.target + two.target) / rows),
            target_mean=np.asarray((one.mean + two.mean) / rows),
            target_energy=(one.energy + two.energy) / rows,
            ridge=self._best_ridge(),
        )

    def _best_ridge(self) -> float:
        """Choose by two-fold cross-validation; infinity where no compensation is better."""
        weight = flat_weight(self.layers[0])
        errors = np.zeros(len(RIDGES) + 1)
        for fitted, judged in (self.folds, self.folds[::-1]):
            if min(fitted.moments.rows, judged.moments.rows) == 0:
                return math.inf
            errors += _errors(weight, fitted, judged)
        return (*RIDGES, math.inf)[int(errors.argmin())]


def _errors(weight: Array, fitted: _Fold, judged: _Fold) -> Array:
    """Return the errors on one fold of the maps fitted on the other; the last is the weight."""
    second, target = fitted.moments.second(), (fitted.target / fitted.moments.rows).numpy()
    values, vectors = scipy.linalg.eigh(second, check_finite=False)
    turned = (target - weight @ second) @ vectors
    mean_energy = max(float(np.trace(second)) / len(second), np.finfo(float).tiny)
    ridges = [np.maximum(values, 0.0) + ridge * mean_energy for ridge in RIDGES]
    maps = [weight + (turned / ridge) @ vectors.T for ridge in ridges]
    other = judged.moments.second()
    wanted = (judged.target / judged.moments.rows).numpy()
    return np.array([np.sum((m @ other) * m) - 2 * np.sum(m * wanted) for m in (*maps, weight)])
