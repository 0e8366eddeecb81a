from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from slim_ra import RACompressConfig, bound_windows, calibrated_windows, legacy_windows
from slim_ra.alibi import mpt_slopes, standard_slopes
from slim_ra.calibrated import needed_windows
from slim_ra.families import alibi_modules
from slim_ra.observe import observed
from slim_ra.weights import alibi_weights
from slim_ra.windows import windows_of_bound


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.attn, name, nn.Linear(hidden, hidden, bias=False))


class Mock(nn.Module):
    """Weights only: what a remote-code model looks like to the weight search."""

    def __init__(self, heads=4, hidden=16, layers=2):
        super().__init__()
        self.config = LlamaConfig(
            hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers
        )
        self.layers = nn.ModuleList(Block(hidden) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def bloom(heads=8, layers=3, hidden=64, scale=1.0, seed=0):
    torch.manual_seed(seed)
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=128,
            hidden_size=hidden,
            n_head=heads,
            n_layer=layers,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    )
    with torch.no_grad():
        for block in model.transformer.h:
            block.self_attention.query_key_value.weight.mul_(scale)
            block.input_layernorm.weight.uniform_(0.5, 1.5)
            block.input_layernorm.bias.normal_(0, 0.1)
    return model.eval()


def falcon(**kwargs):
    torch.manual_seed(0)
    return FalconForCausalLM(
        FalconConfig(
            hidden_size=64,
            num_attention_heads=8,
            vocab_size=128,
            num_hidden_layers=2,
            alibi=True,
            **kwargs,
        )
    ).eval()


def mpt(heads=8, **kwargs):
    torch.manual_seed(0)
    return MptForCausalLM(
        MptConfig(
            d_model=heads * 8,
            n_heads=heads,
            n_layers=2,
            vocab_size=128,
            max_seq_len=256,
            attn_config=kwargs,
        )
    ).eval()


FALCONS = [
    {"multi_query": False},
    {"multi_query": True},
    {"new_decoder_architecture": True, "num_kv_heads": 2},
]


def test_legacy_zero_weights():
    windows = legacy_windows(Mock()).windows
    assert windows.dtype == torch.int64
    assert windows.tolist() == [353, 1415, 5663, 22652]


def test_legacy_one_product_entry():
    model = Mock()
    with torch.no_grad():  # head 0 owns the first four input columns
        model.layers[1].attn.q_proj.weight[3, 0] = 4.0
        model.layers[1].attn.k_proj.weight[7, 0] = 4.0
    assert legacy_windows(model).windows.tolist() == [
        int((4 + 100 + math.log(1e-5)) / 0.25),
        1415,
        5663,
        22652,
    ]


def test_legacy_negative_product_adds_nothing():
    model = Mock()
    with torch.no_grad():
        model.layers[0].attn.q_proj.weight[:, :4] = 1.0
        model.layers[0].attn.k_proj.weight[:, :4] = -1.0
    assert legacy_windows(model).windows[0] == 353


def test_legacy_theta_and_alpha():
    model = Mock()
    assert legacy_windows(model, RACompressConfig(theta=1e-3)).windows[0] == int(93.0922 / 0.25)
    assert legacy_windows(model, RACompressConfig(alpha=0)).windows[0] == -46
    assert legacy_windows(model, RACompressConfig(alpha=0), clamp=True).windows[0] == 1


def test_legacy_published_lists():
    # The published table of a 32-head model has no content term and runs from 105 to 22652.
    windows = legacy_windows(Mock(heads=32, hidden=64)).windows.tolist()
    numerator = 100 + math.log(1e-5)
    assert windows == [int(numerator * 2 ** (head / 4)) for head in range(1, 33)]
    assert (windows[0], windows[-1]) == (105, 22652)
    base = 100 + math.log(1e-5) + 0.55
    assert [int(base / slope) for slope in standard_slopes(40)[32:35].tolist()] == [97, 115, 137]


def test_legacy_random_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=16,
        vocab_size=32,
    )
    assert legacy_windows(LlamaForCausalLM(config)).windows[:2].tolist() == [354, 1418]


def test_legacy_errors():
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=2)
    empty = nn.Module()
    empty.config = config
    with pytest.raises(ValueError, match="Found no ModuleList in model"):
        legacy_windows(empty)
    empty.layers = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    with pytest.raises(ValueError, match="Found no Linear node"):
        legacy_windows(empty)
    empty.layers = nn.ModuleList([nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))] * 2)
    with pytest.raises(ValueError, match="Found 4 Linears node"):
        legacy_windows(empty)
    fused = nn.Module()
    fused.query_key_value = nn.Linear(16, 47)
    empty.layers = nn.ModuleList([fused, fused])
    with pytest.raises(ValueError, match="divisible by 3"):
        legacy_windows(empty)


def test_learned_positions_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=32))
    for search in (legacy_windows, bound_windows):
        with pytest.raises(ValueError, match="GPT2LMHeadModel"):
            search(model)


def test_slopes_equal_those_of_the_models():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (1, 4, 6, 8, 12, 40):
        bias = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)
        torch.testing.assert_close(bias[:, 0, 1], standard_slopes(heads).float())
        bias = build_mpt_alibi_tensor(heads, 3)
        torch.testing.assert_close(-bias[:, 0, 1], mpt_slopes(heads).float())


def worst_outside(model, windows, ids):
    """Largest weight, and largest sum of weights, outside the window of each layer and head."""
    single, mass = [], []

    def observe(attention):
        logits = (
            attention.query
            @ attention.key.repeat_interleave(
                attention.query.shape[1] // attention.key.shape[1], 1
            ).mT
            * attention.scale
        )
        logits = logits + attention.bias[:, :, None]
        columns = torch.arange(logits.shape[-1])
        logits = logits.masked_fill(columns > columns[:, None], -torch.inf)
        weights = logits.double().softmax(-1)
        far = columns[:, None] - columns >= windows[attention.layer][:, None, None]
        weights = weights * far
        single.append(weights.amax())
        mass.append(weights.sum(-1).amax())

    with torch.inference_mode(), observed(model, observe):
        model.base_model(input_ids=ids, use_cache=False)
    return float(torch.stack(single).amax()), float(torch.stack(mass).amax())


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_bound_holds_on_random_bloom(scale):
    model = bloom(scale=scale)
    ids = torch.randint(0, 128, (1, 512), generator=torch.Generator().manual_seed(1))
    for mass in (False, True):
        windows = bound_windows(model, 1e-4, mass=mass).windows
        assert windows.shape == (3, 8)
        assert int(windows.min()) < 512  # otherwise nothing is tested
        assert worst_outside(model, windows, ids)[mass] <= 1e-4


def test_bounds_are_ordered():
    model = bloom(scale=3.0)
    tight, simple = (bound_windows(model, bound=name).windows for name in ("tight", "simple"))
    assert bool((tight <= simple).all())
    assert bool((tight < simple).any())
    assert bound_windows(model, bound="paper").windows.shape == (3, 8)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 0.9), st.floats(1e-9, 0.9), st.booleans())
def test_bound_is_monotone_in_epsilon(first, second, mass):
    small, large = sorted((first, second))
    content, slopes = torch.linspace(0, 9, 8, dtype=torch.float64), standard_slopes(8)
    tight = windows_of_bound(content, slopes, large, mass=mass)
    assert bool((tight <= windows_of_bound(content, slopes, small, mass=mass)).all())


@pytest.mark.parametrize("power", [1, 4, 8])
def test_mass_window_leaves_epsilon_at_most(power):
    slope = torch.tensor([2.0**-power], dtype=torch.float64)
    window = windows_of_bound(torch.zeros(1), slope, 1e-4, mass=True)
    tail = (-slope * torch.arange(int(window), 20000)).exp().sum()
    assert float(tail) <= 1e-4


@pytest.mark.parametrize("kwargs", FALCONS)
def test_falcon_layouts(kwargs):
    model = falcon(**kwargs)
    first = next(alibi_weights(model))
    torch.testing.assert_close(first.slopes, standard_slopes(8) / 8**0.5, rtol=2**-8, atol=0)
    ids = torch.randint(0, 128, (1, 300))
    assert worst_outside(model, bound_windows(model).windows, ids)[0] <= 1e-4
    _weights_reproduce_projection(model)


@pytest.mark.parametrize("model", [bloom(), mpt(), mpt(heads=6)], ids=["bloom", "mpt", "mpt6"])
def test_weight_layouts(model):
    _weights_reproduce_projection(model)


def _weights_reproduce_projection(model):
    """q and k of the model's own run equal rows of the weights applied to the normed input."""
    seen = []
    inputs = []
    module, _ = alibi_modules(model)[0]
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.inference_mode(), observed(model, seen.append):
        model.base_model(input_ids=torch.randint(0, 128, (1, 20)), use_cache=False)
    hook.remove()
    weights = next(alibi_weights(model))
    hidden = inputs[0][0].double()
    query = torch.einsum("td,hed->hte", hidden, weights.query) + weights.query_bias[:, None]
    key = torch.einsum("td,hed->hte", hidden, weights.key) + weights.key_bias[:, None]
    torch.testing.assert_close(seen[0].query[0].double(), query, atol=1e-5, rtol=1e-4)
    group = query.shape[0] // seen[0].key.shape[1]
    expected = seen[0].key[0].double().repeat_interleave(group, 0)
    torch.testing.assert_close(expected, key, atol=1e-5, rtol=1e-4)
    assert weights.scale == seen[0].scale


def test_mpt_clip_limits_the_bound():
    loose = bound_windows(mpt()).windows
    clipped = bound_windows(mpt(clip_qkv=0.01)).windows
    assert bool((clipped <= loose).all())
    assert bool((clipped < loose).any())


def test_packed_rows_of_unknown_classes():
    """Baichuan's W_pack: rows q, k, v; no forward is needed."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Module()
            self.self_attn.W_pack = nn.Linear(16, 48, bias=False)
            self.input_layernorm = nn.RMSNorm(16)

    model = Mock()
    model.layers = nn.ModuleList([Packed(), Packed()])
    model.config.alibi = True
    model.config.max_position_embeddings = 64
    windows = bound_windows(model, 1e-3).windows
    assert windows.shape == (2, 4)
    first = next(alibi_weights(model))
    torch.testing.assert_close(
        first.key[1], model.layers[0].self_attn.W_pack.weight[20:24].detach().double()
    )
    assert legacy_windows(model).windows.shape == (4,)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1e-3, math.nan, math.inf])
def test_epsilon_range(wrong):
    with pytest.raises(ValueError, match="epsilon"):
        bound_windows(bloom(layers=1), wrong)


def test_calibrated_windows_equal_brute_force(tiny_bloom):
    ids = torch.randint(1, 2048, (2, 150), generator=torch.Generator().manual_seed(3))
    windows = calibrated_windows(tiny_bloom, [ids], 1e-3, delta=0.0).windows
    assert windows.shape == (4, 8)
    assert worst_outside(tiny_bloom, windows, ids)[1] <= 1e-3 + 1e-6
    assert worst_outside(tiny_bloom, windows - 1, ids)[1] > 1e-3
    share = calibrated_windows(tiny_bloom, [ids], 1e-3, delta=0.1).windows
    assert bool((share <= windows).all())


def test_calibrated_quantile_counts_queries(tiny_bloom):
    ids = torch.randint(1, 2048, (1, 200), generator=torch.Generator().manual_seed(4))
    windows = calibrated_windows(tiny_bloom, [ids], 1e-2, delta=0.05).windows
    enough = []
    with (
        torch.inference_mode(),
        observed(
            tiny_bloom,
            lambda a: enough.append(
                (needed_windows(a, 1e-2)[0] <= windows[a.layer][:, None]).double().mean(-1)
            ),
        ),
    ):
        tiny_bloom.base_model(input_ids=ids, use_cache=False)
    assert float(torch.stack(enough).min()) >= 0.95


def test_calibration_needs_text(tiny_bloom, tiny_llama):
    with pytest.raises(ValueError, match="T >= 2"):
        calibrated_windows(tiny_bloom, [])
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        calibrated_windows(tiny_llama, [torch.ones(1, 4, dtype=torch.int64)])
