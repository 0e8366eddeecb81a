"""Attention of few heads over many keys, cut along the keys for the threads."""

from __future__ import annotations

import pytest
import torch

from slim_ra import kernels
from slim_ra.lse import attention_lse


@pytest.mark.parametrize("threads", [3, 16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", [None, "one", "all"])
def test_keys_cut_for_the_threads(threads, batch, mask, monkeypatch):
    """Few heads over many keys: the parts of the keys together are the whole attention."""
    monkeypatch.setattr(kernels, "_SMALLEST_SPLIT", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 4, 1, 8, generator=generator)
    room = torch.randn(2, batch, 2, 230, 8, generator=generator)
    key, value = room[..., :211, :].unbind(0)  # as a store shows them, with spare room behind
    bias = None
    if mask is not None:
        bias = torch.randn(batch, 4 if mask == "all" else 1, 1, 211, generator=generator)
        bias[..., :150] = -torch.inf  # whole parts see nothing
    query = query if mask != "all" else query[:, :2]
    bias = bias if mask != "all" else bias[:, :2]
    group = query.shape[1] // 2
    assert kernels.splits_for(batch * 2, 211, threads) > 1
    output, lse = attention_lse(query, key, value, scale=0.3, bias=bias)
    logits = query @ key.repeat_interleave(group, 1).mT * 0.3 + (0 if bias is None else bias)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(output, logits.softmax(-1) @ value.repeat_interleave(group, 1))


def test_shares_of_the_threads_are_even():
    for units in range(1, 40):
        for threads in range(1, 20):
            parts = kernels.splits_for(units, 1 << 20, threads)
            assert parts <= threads
            assert (units * parts) % threads == 0 or units >= 4 * threads
    assert kernels.splits_for(1, 1500, 8) == 1  # too short to be worth it


def test_a_query_that_sees_nothing():
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind(0)
    bias = torch.zeros(1, 1, 1, 6)
    bias[..., :] = -torch.inf
    output, lse = attention_lse(query, key, value, scale=1.0, bias=bias)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
