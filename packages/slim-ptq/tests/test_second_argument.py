"""Scripts write samples as [ids, mask], also for models whose second argument is a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slim_ptq import Calibrator, QuantConfig


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_ids_and_mask_reach_models_that_take_a_cache_second(
    family: str, tiny_model: Any, tiny_ids: Any
) -> None:
    ids = tiny_ids(12)
    samples = [[ids, torch.ones_like(ids)]]
    model = tiny_model(family)
    Calibrator(model, QuantConfig(mm_tensor=False), samples, disable_level="L1").run()
    assert torch.isfinite(model(ids).logits).all()
