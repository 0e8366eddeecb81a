"""Scripts write samples as [ids, mask], also for models whose second argument is a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slim_ptq import Calibrator, QuantConfig
from slim_ptq.structure import cache_argument, named_sample


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_ids_and_mask_reach_models_that_take_a_cache_second(
    family: str, tiny_model: Any, tiny_ids: Any
) -> None:
    ids = tiny_ids(12)
    samples = [[ids, torch.ones_like(ids)]]
    model = tiny_model(family)
    Calibrator(model, QuantConfig(mm_tensor=False), samples, disable_level="L1").run()
    assert torch.isfinite(model(ids).logits).all()


class Plain(nn.Module):
    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Take no cache."""


class Old(nn.Module):
    def forward(
        self, ids: torch.Tensor, past_key_values: Any = None, attention_mask: Any = None
    ) -> None:
        """Take the cache second, under the name that it had before transformers 5.24."""


class New(nn.Module):
    def forward(self, ids: torch.Tensor, cache: Any = None, attention_mask: Any = None) -> None:
        """Take the cache second, under its name from transformers 5.24 on."""


@pytest.mark.parametrize(
    ("model", "name"), [(Plain(), None), (Old(), "past_key_values"), (New(), "cache")]
)
def test_the_cache_is_told_by_its_name(model: nn.Module, name: str | None) -> None:
    ids, mask = torch.zeros(1, 3), torch.ones(1, 3)
    assert cache_argument(model) == name
    found = named_sample(model, [ids, mask])
    if name is None:
        assert found[0] is ids
        assert found[1] is mask
    else:
        assert found["ids"] is ids
        assert found["attention_mask"] is mask
