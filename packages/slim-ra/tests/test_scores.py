from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slim_core.errors import NumericalError
from slim_ra import HeadScores, search_heads
from slim_ra import lse as lse_module
from slim_ra.lse import attention_lse, merge
from slim_ra.observe import observed
from slim_ra.scores import repeat_scores
from slim_ra.select import select_by_bytes, select_heads, top_heads
from slim_ra.sequences import repeated_ids
from slim_ra.wired import ECHO, INDUCTION

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
OLD = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
NEOX = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=24)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL, sliding_window=24, query_pre_attn_scalar=8, attn_logit_softcapping=0.7
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, sliding_window=24, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**OLD, rotary_dim=8)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**OLD, rotary_dim=8)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=128, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    ),
    "falcon_new": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=128,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            new_decoder_architecture=True,
            num_kv_heads=2,
        )
    ),
}


def brute_force(model, sequences):
    """The published scores from the whole attention matrices of the eager implementation."""
    out = model(input_ids=sequences.ids, use_cache=False, output_attentions=True)
    unit, lead = sequences.unit_length, sequences.lead
    total = unit * sequences.repeats
    induction, echo = [], []
    for weights in out.attentions:
        weights = weights[:, :, lead:, lead:].double()
        rows = torch.arange(unit, total)
        prefix = torch.zeros(weights.shape[:2], dtype=torch.float64)
        copy = torch.zeros_like(prefix)
        for row in rows.tolist():
            for column in range(row - unit, -1, -unit):
                prefix += weights[:, :, row, column + 1]
                copy += weights[:, :, row, column]
        induction.append(prefix / len(rows))
        echo.append(copy / len(rows))
    return torch.stack(induction), torch.stack(echo)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_scores_equal_brute_force(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)  # attention far from even
    implementation = model.config._attn_implementation
    sequences = repeated_ids(model.config, unit_length=11, repeats=4, samples=2)
    seen: dict[int, tuple] = {}
    with observed(model, lambda a: seen.__setitem__(a.layer, repeat_scores(a, sequences))):
        model.base_model(input_ids=sequences.ids, use_cache=False)
    assert model.config._attn_implementation == implementation
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    model.config._attn_implementation = "eager"
    expected = brute_force(model, sequences)
    for kind in (0, 1):
        got = torch.stack([seen[layer][kind] for layer in sorted(seen)])
        torch.testing.assert_close(got, expected[kind], atol=1e-5, rtol=0)
    assert float(expected[0].max()) > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wired_heads_are_found(wired, implementation, seed):
    wired.set_attn_implementation(implementation)
    scores = search_heads(wired, unit_length=60, repeats=4, seed=seed)
    induction, echo = scores.induction.clone(), scores.echo.clone()
    layer, kv_head = INDUCTION[0], INDUCTION[1] // 2
    assert float(induction[layer, kv_head]) == pytest.approx(1.0, abs=0.01)
    induction[layer, kv_head] = 0
    assert float(induction.max()) <= 0.05
    layer, kv_head = ECHO[0], ECHO[1] // 2
    assert float(echo[layer, kv_head]) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=0.01)
    heads = select_heads(scores, induction_ratio=0.125, echo_ratio=0.125)
    assert heads.induction == {1: [1]}
    assert heads.echo == {1: [3]}


def test_scores_are_those_of_the_true_kv_heads():
    """Falcon repeats its KV heads before it attends; only the real ones are cached and scored."""
    torch.manual_seed(0)
    scores = search_heads(MODELS["falcon_new"]().eval(), unit_length=11)
    assert scores.induction.shape == scores.echo.shape == (2, 2)


def test_group_reduce_mean_halves_the_lone_head(wired):
    mean = search_heads(wired, unit_length=60, group_reduce="mean").induction[1, 1]
    assert float(mean) == pytest.approx(0.5, abs=0.02)


def test_needle_score_finds_the_induction_head(wired, copy_llama):
    needle = search_heads(wired, unit_length=60, needles=3).needle
    assert float(needle[1, 1]) == 1.0
    assert float(needle.sum()) == 1.0
    needle = search_heads(copy_llama, unit_length=60, needles=3).needle
    assert set(needle.flatten().topk(4).indices.tolist()) == {4, 5, 6, 7}  # layer 1


def test_trained_induction_heads(copy_llama):
    scores = search_heads(copy_llama, unit_length=128)
    assert bool((scores.induction[1] > 0.5).all())
    assert bool((scores.induction[[0, 2]] < 0.05).all())


def test_seed_samples_and_batches(copy_llama):
    first = search_heads(copy_llama, unit_length=40, samples=4, batch_size=1, seed=5)
    batched = search_heads(copy_llama, unit_length=40, samples=4, batch_size=3, seed=5)
    torch.testing.assert_close(first.induction, batched.induction)
    again = search_heads(copy_llama, unit_length=40, samples=4, seed=5)
    assert torch.equal(first.induction, again.induction)
    other = search_heads(copy_llama, unit_length=40, samples=4, seed=6)
    assert not torch.equal(first.induction, other.induction)


def test_model_is_left_as_it_was(copy_llama):
    copy_llama.train()
    copy_llama.set_attn_implementation("eager")
    search_heads(copy_llama, unit_length=8)
    assert copy_llama.training
    assert copy_llama.config._attn_implementation == "eager"
    copy_llama.eval()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1)), "GPT2LMHeadModel"),
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2, n_layer=1)), "Bloom"),
    ],
)
def test_other_encodings_are_refused(model, named):
    with pytest.raises(ValueError, match=named):
        search_heads(model())


def test_not_finite_is_an_error():
    model = MODELS["llama"]()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="layer 1"):
        search_heads(model, unit_length=8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repeats": 1},
        {"samples": 0},
        {"unit_length": 3},
        {"seed": -1},
        {"group_reduce": "median"},
        {"unit_length": 5000},
    ],
)
def test_search_arguments(copy_llama, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        search_heads(copy_llama, **kwargs)


def test_small_vocabularies_shorten_the_unit(copy_llama, tokenizer, tiny_llama):
    sequences = repeated_ids(copy_llama.config)
    assert (sequences.unit_length, sequences.lead) == (511, 1)
    unit = sequences.ids[0, 1:512]
    assert unit.unique().numel() == 511
    assert torch.equal(sequences.ids[0, 1:], unit.repeat(4))
    assert repeated_ids(tiny_llama.config, tokenizer).unit_length == 255  # by the context


LONG_SEARCH = """
import resource, torch
from slim_ra.lse import attention_lse
from slim_ra.observe import Attention
from slim_ra.scores import repeat_scores
from slim_ra.sequences import RepeatedIds

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

generator = torch.Generator().manual_seed(0)
query, key = (torch.randn(1, heads, 10001, 16, generator=generator) for heads in (8, 8))
small = [part[:, :, :64] for part in (query, key)]
attention_lse(*small, small[1], scale=0.25, causal=True)  # loads the kernels
before = peak()
_, lse = attention_lse(query, key, key, scale=0.25, causal=True)
sequences = RepeatedIds(torch.zeros(1, 10001), 2500, 4, 1)
scores = torch.stack(repeat_scores(Attention(0, query, key, lse, 0.25), sequences))
print(bool(scores.isfinite().all()), peak() - before)
"""


def test_long_search_never_holds_the_matrix():
    """8 heads at 10001 tokens: T x T in fp32 would be 3.2 GB."""
    # In a process of its own, whose peak no other test has raised before.
    done = subprocess.run(
        [sys.executable, "-c", LONG_SEARCH], capture_output=True, text=True, check=True
    )
    finite, extra = done.stdout.split()
    assert finite == "True"
    assert int(extra) <= 64 << 20


CASES = [
    {},
    {"causal": True},
    {"causal": True, "window": 5},
    {"causal": True, "softcap": 0.5},
    {"bias": True},
    {"bias": True, "causal": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_attention_lse(case, heads, monkeypatch):
    monkeypatch.setattr(lse_module, "TILE_BYTES", 2000)  # several tiles
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads[0], 13, 8, generator=generator)
    key, value = (torch.randn(2, heads[1], 13, 8, generator=generator) for _ in range(2))
    case = dict(case)
    if case.pop("bias", None):
        case["bias"] = torch.randn(2, heads[0], 1, 13, generator=generator)
    output, lse = attention_lse(query, key, value, scale=0.3, **case)
    full = heads[0] // heads[1]
    logits = query @ key.repeat_interleave(full, 1).mT * 0.3
    if "softcap" in case:
        logits = 0.5 * torch.tanh(logits / 0.5)
    logits = logits + case.get("bias", 0)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    if "causal" in case:
        hidden = (distance < 0) | (distance >= case.get("window", 99))
        logits = logits.masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(output, logits.softmax(-1) @ value.repeat_interleave(full, 1))


def test_different_value_size_and_chunked_causality():
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 5)
    output, _ = attention_lse(query, key, value, scale=1.0, causal=True)
    mask = torch.ones(3, 7).tril(4).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=1.0
    )
    torch.testing.assert_close(output, expected)


def test_merge_is_attention_over_the_union():
    query, key, value = (torch.randn(1, 2, n, 4) for n in (3, 10, 10))
    whole, lse = attention_lse(query, key, value, scale=1.0)
    parts = [
        attention_lse(query, key[:, :, cut], value[:, :, cut], scale=1.0)
        for cut in (slice(0, 1), slice(1, 7), slice(7, 10))
    ]
    nothing = (torch.zeros_like(whole), torch.full_like(lse, -torch.inf))
    got, got_lse = merge([*parts, nothing])
    torch.testing.assert_close(got, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(got_lse, lse)


def test_merging_a_weighted_token_is_the_softmax_with_its_slot():
    """The compensation token: a logit more, raised by the log of how many tokens it stands for."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 16, generator=generator) for n in (1, 50, 50))
    mean_key, mean_value = torch.randn(2, 2, 4, 1, 16, generator=generator)
    for count in (1, 30, 100_000):
        logits = query @ torch.cat([key, mean_key], 2).mT * 0.25
        logits[..., -1] += math.log(count)
        expected = logits.softmax(-1) @ torch.cat([value, mean_value], 2)
        slot = (query * mean_key).sum(-1) * 0.25 + math.log(count)
        got, lse = merge([attention_lse(query, key, value, scale=0.25), (mean_value, slot)])
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_top_heads_counts_and_ties():
    scores = torch.arange(40.0).view(5, 8)
    for ratio in (0.0, 0.01, 0.0125, 0.14, 0.3125, 1.0):
        picked = top_heads(scores, ratio)
        assert sum(map(len, picked.values())) == round(40 * ratio)
        assert all(row == sorted(row) and row for row in picked.values())
    assert top_heads(scores, 0.0, min_heads=1) == {4: [7]}
    assert top_heads(torch.ones(2, 2), 0.25) == {0: [0, 1], 1: [0, 1]}
    assert top_heads(scores, 0.05, layers=[1, 2]) == {2: [7]}


def test_budget_picks_the_best_heads():
    scores = HeadScores(torch.arange(10.0).view(5, 2), torch.zeros(5, 2))
    heads = select_by_bytes(scores, 0.5, kept=0.2)
    assert heads.union() == {3: [1], 4: [0, 1]}  # .2 + .8 * 3/10 <= .5
    with pytest.raises(ValueError, match="budget"):
        select_by_bytes(scores, 0.1, kept=0.2)


def test_needle_ratio_needs_a_needle_score():
    scores = HeadScores(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needle"):
        select_heads(scores, induction_ratio=0.5, echo_ratio=0.0, needle_ratio=0.5)
    scores = HeadScores(torch.tensor([[1.0, 0]]), torch.zeros(1, 2), torch.tensor([[0, 1.0]]))
    heads = select_heads(scores, induction_ratio=0.5, echo_ratio=0.0, needle_ratio=0.5)
    assert heads.induction == {0: [0, 1]}
