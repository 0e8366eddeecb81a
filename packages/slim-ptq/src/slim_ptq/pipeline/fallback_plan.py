"""Leave the layers of the most extreme inputs in floating point before blocks are quantized."""

from __future__ import annotations

from dataclasses import replace

import torch

from slim_core.checkpoint import Checkpoint
from slim_core.plan import Plan
from slim_core.scheme import FLOAT
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.fallback import SAMPLES, choose_fallback
from slim_ptq.inventory import Inventory
from slim_ptq.observers import SpreadObserver
from slim_ptq.pipeline.inputs import score_inputs


def plan_with_fallback(
    checkpoint: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    count: int,
    data: TokenWindows,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Return the plan with the layers of the most extreme inputs left in floating point."""
    head = data.head(SAMPLES)
    spread = score_inputs(checkpoint, inventory, plan, head, device, SpreadObserver, dtype)
    floats = frozenset(layer.name for layer in plan.layers if layer.scheme.is_float)
    chosen = set(choose_fallback(spread, count, floats))
    return replace(
        plan,
        layers=tuple(
            replace(
                layer,
                scheme=FLOAT,
                reason=f"fallback: range_param {spread[layer.name]:.1f}",
                asked=False,
            )
            if layer.name in chosen
            else layer
            for layer in plan.layers
        ),
    )
