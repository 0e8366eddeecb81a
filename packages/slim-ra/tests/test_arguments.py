"""Models take their cache as ``cache`` or, before transformers 5.24, as ``past_key_values``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MptConfig, MptForCausalLM

from slim_core.errors import StructureError
from slim_ra.arguments import cache_argument


class Old(nn.Module):
    def forward(self, ids, attention_mask=None, past_key_values=None):
        return past_key_values


class New(nn.Module):
    def forward(self, ids, attention_mask=None, cache=None, **kwargs):
        return cache


class Renaming(nn.Module):
    def forward(self, ids, past_key_values=None, cache=None):
        return cache


class Wrapper(nn.Module):
    """Hands on what it is given, like the wrappers of peft and ``torch.compile``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "name"),
    [(Old(), "past_key_values"), (New(), "cache"), (Renaming(), "cache")],
    ids=["old", "new", "both"],
)
def test_the_name_is_read_off_the_forward(model, name):
    assert cache_argument(model) == cache_argument(Wrapper(Wrapper(model))) == name


@pytest.mark.parametrize("part", ["the model", "its attention"])
def test_what_is_given_under_the_name_is_filled(tiny_llama, part):
    cache = DynamicCache(config=tiny_llama.config)
    ids = torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        if part == "the model":
            Wrapper(tiny_llama)(ids, **{cache_argument(Wrapper(tiny_llama)): cache})
            assert cache.get_seq_length() == 5
            return
        model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=8))
        module = model.transformer.blocks[0].attn
        bias, mask = torch.zeros(2, 1, 5), torch.zeros(1, 1, 5, 5, dtype=torch.bool)
        given = {cache_argument(module): cache, "position_bias": bias, "attention_mask": mask}
        module(torch.zeros(1, 5, 16), **given)
    assert cache.get_seq_length() == 5


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(StructureError, match="Linear takes no key-value cache"):
        cache_argument(nn.Linear(2, 2))
