from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from slim_ra import AlibiWindows, RazorPolicy, RetrievalHeads, razor
from slim_ra.arguments import cache_argument
from slim_ra.evaluate import (
    decode_perplexity,
    full_cache,
    held_bytes,
    passkey_accuracy,
    passkeys,
    with_cache,
)


def test_copy_model_recalls_with_its_heads_only(copy_llama):
    samples = passkeys(copy_llama.config, length=256, samples=4, cue=16)
    full = passkey_accuracy(copy_llama, samples, full_cache(copy_llama))
    assert full.accuracy >= 0.85
    assert full.ratio == 1.0
    found = {}
    for name, heads in {"right": {1: [0, 1, 2, 3]}, "wrong": {0: [0, 1], 2: [0, 1]}}.items():
        policy = RazorPolicy.from_profile(RetrievalHeads(heads), copy_llama.config, window=32)
        with razor(copy_llama, policy) as new_cache:
            found[name] = passkey_accuracy(copy_llama, samples, with_cache(new_cache))
    assert found["right"].accuracy >= full.accuracy - 0.03
    assert found["right"].ratio <= 0.55
    assert found["wrong"].accuracy <= 0.3


def test_wired_model_needs_no_forcing(wired):
    samples = passkeys(wired.config, length=200, samples=2, answer=4, cue=2, seed=3)
    for aware in (False, True):
        policy = RazorPolicy.from_profile(RetrievalHeads({1: [1]}), wired.config, window=16)
        with razor(wired, policy) as new_cache:
            found = passkey_accuracy(
                wired, samples, with_cache(new_cache), aware=aware, forced=False
            )
        assert 0.0 <= found.accuracy <= 1.0
        assert found.ratio < 0.5


def test_perplexity_equals_one_pass(tiny_llama):
    ids = torch.randint(1, 2048, (1, 90), generator=torch.Generator().manual_seed(0))
    found = decode_perplexity(tiny_llama, [ids], full_cache(tiny_llama), prompt=50)
    with torch.no_grad():
        logits = tiny_llama(ids).logits[0, 49:89]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 50:])
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.divergence == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0


def test_alibi_perplexity(tiny_bloom):
    ids = torch.randint(1, 2048, (1, 90), generator=torch.Generator().manual_seed(0))
    policy = RazorPolicy.from_profile(AlibiWindows(torch.full((8,), 10)), tiny_bloom.config)
    with razor(tiny_bloom, policy) as new_cache:
        found = decode_perplexity(tiny_bloom, [ids], with_cache(new_cache), prompt=60)
    assert found.ratio < 0.2
    assert found.divergence > 0


def test_bytes_of_a_full_cache(tiny_llama):
    cache = DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        tiny_llama(torch.ones(1, 30, dtype=torch.int64), **{cache_argument(tiny_llama): cache})
    assert held_bytes(cache) == 2 * 4 * 4 * 4 * 16 * 30


def test_short_texts_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="at least 82"):
        decode_perplexity(
            tiny_llama, [torch.ones(1, 80, dtype=torch.int64)], full_cache(tiny_llama), prompt=80
        )
    with pytest.raises(ValueError, match="length"):
        passkeys(tiny_llama.config, length=60)
