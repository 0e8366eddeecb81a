"""Spread one budget over the layers of a model.

Every layer offers options (cost, predicted loss), staying dense among them.  For one price per
unit of cost each layer takes its best option on its own; bisecting the price meets the budget, and
what is left over is spent on the best upgrades that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slim_core.errors import PlanError
from slim_core.validate import check_float
from slim_lowrank.factorize import Array
from slim_lowrank.table import LayerRanks


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Parameters
    ----------
    cost : float
        In the unit of the budget.
    loss : float
        Predicted harm, comparable between layers.
    ranks : LayerRanks or None
        None stands for the dense layer.
    """

    cost: float
    loss: float
    ranks: LayerRanks | None


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Return the option of each layer, of total cost at most ``budget``.

    Parameters
    ----------
    options : dict
        At least one option a layer.
    budget : float
        Total cost allowed.

    Raises
    ------
    PlanError
        Even the cheapest options exceed the budget; says by how much.
    """
    budget = check_float("budget", budget, low=0.0)
    names = list(options)
    costs = [np.array([option.cost for option in options[name]]) for name in names]
    losses = [np.array([option.loss for option in options[name]]) for name in names]
    cheapest = float(sum(cost.min() for cost in costs))
    if cheapest > budget * (1 + 1e-12):
        dense = float(sum(cost.max() for cost in costs))
        raise PlanError(
            [f"a budget of {budget:.6g} is below the least possible cost, {cheapest:.6g}"],
            hint=f"keep at least {cheapest / dense:.1%}, or use a smaller divisor",
        )
    picks = _at_price(costs, losses, _price(costs, losses, budget))
    _spend_rest(costs, losses, picks, budget)
    return {name: options[name][pick] for name, pick in zip(names, picks, strict=True)}


def _price(costs: list[Array], losses: list[Array], budget: float) -> float:
    """Return the lowest price, to a part in 10^9, at which the picks fit the budget."""

    def fits(price: float) -> bool:
        return _total(costs, _at_price(costs, losses, price)) <= budget

    if fits(0.0):
        return 0.0
    high = 1e-30
    while not fits(high) and high < 1e300:
        high *= 1e3
    low = 0.0 if high <= 1e-30 else high / 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
        if high - low <= 1e-9 * high:
            break
    return high


def _at_price(costs: list[Array], losses: list[Array], price: float) -> list[int]:
    """Each layer's least ``loss + price * cost``; the cheaper option wins a tie."""
    picks = []
    for cost, loss in zip(costs, losses, strict=True):
        value = loss + price * cost
        picks.append(int(np.lexsort((cost, value))[0]))
    return picks


def _total(costs: list[Array], picks: list[int]) -> float:
    return float(sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)))


def _spend_rest(costs: list[Array], losses: list[Array], picks: list[int], budget: float) -> None:
    """Upgrade, best gain per cost first, while something fits into what is left."""
    left = budget - _total(costs, picks)
    while True:
        best, best_rate = None, 0.0
        for layer, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            extra = cost - cost[picks[layer]]
            gain = loss[picks[layer]] - loss
            usable = (extra > 0) & (extra <= left) & (gain > 0)
            if usable.any():
                rate = np.where(usable, gain / np.where(usable, extra, 1.0), 0.0)
                choice = int(rate.argmax())
                if rate[choice] > best_rate:
                    best, best_rate = (layer, choice), float(rate[choice])
        if best is None:
            return
        layer, choice = best
        left -= float(costs[layer][choice] - costs[layer][picks[layer]])
        picks[layer] = choice
