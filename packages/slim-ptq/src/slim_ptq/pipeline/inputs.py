"""How hard the input of each layer is to quantize, found block by block on the float model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from slim_core.checkpoint import Checkpoint
from slim_core.plan import LayerPlan, Plan
from slim_core.progress import track
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.inventory import Inventory
from slim_ptq.observers import InputScore
from slim_ptq.pipeline.blocks import BlockRunner


def score_inputs(
    checkpoint: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    data: TokenWindows,
    device: torch.device,
    make: Callable[[], InputScore],
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Return the score of the input of every planned layer, by its name in the checkpoint.

    Parameters
    ----------
    make : callable
        Gives a new, empty score.
    dtype : torch.dtype, optional
        Of :class:`BlockRunner`.
    """
    runner = BlockRunner(checkpoint, inventory, data, device, dtype=dtype)
    blocks = by_block(inventory, plan)
    values: dict[str, float] = {}
    for index in track(range(len(runner)), "Ranking layers"):
        layers = blocks[inventory.blocks[index]]
        scores = {local: make() for local in layers}
        with runner.loaded(index) as block:
            runner.advance(block, index, {local: score.watch for local, score in scores.items()})
        values.update({layers[local].name: score.value() for local, score in scores.items()})
    return values


def by_block(inventory: Inventory, plan: Plan) -> dict[str, dict[str, LayerPlan]]:
    """Return the planned layers of each block by their local module names."""
    layers: dict[str, dict[str, LayerPlan]] = {block: {} for block in inventory.blocks}
    for layer in plan.layers:
        module = inventory.modules[layer.name]
        block = next(name for name in inventory.blocks if module.startswith(f"{name}."))
        layers[block][module.removeprefix(f"{block}.")] = layer
    return layers
