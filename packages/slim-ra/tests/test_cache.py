from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slim_core.errors import StructureError
from slim_ra import (
    AlibiWindows,
    RazorCache,
    RazorPolicy,
    RetrievalHeads,
    disable,
    enable,
    legacy_windows,
    razor,
    write_profile,
)
from slim_ra.arguments import cache_argument
from slim_ra.geometry import HeadGeometry
from slim_ra.memory import predict

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
ROTARY = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**{**SMALL, **k})),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **k})),
    "qwen3": lambda **k: Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **k})),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**{**SMALL, **k}, sliding_window=None)),
    "gemma2": lambda **k: Gemma2ForCausalLM(
        Gemma2Config(
            **{**SMALL, **k}, sliding_window=32, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
        )
    ),
    "gpt_oss": lambda **k: GptOssForCausalLM(
        GptOssConfig(
            **{**SMALL, **k}, sliding_window=32, num_local_experts=2, num_experts_per_tok=1
        )
    ),
}
OLD = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 512,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
}
FALCON = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}
OWN_ATTENTION = {  # rotary models that do not call the attention interface of transformers,
    # or, GPT-J and CodeGen, not before transformers 5.24
    "gptj": lambda **k: GPTJForCausalLM(GPTJConfig(**OLD, **k)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**OLD)),
    "falcon_rotary": lambda: FalconForCausalLM(FalconConfig(**FALCON, multi_query=False)),
    "falcon_rotary_mqa": lambda: FalconForCausalLM(FalconConfig(**FALCON)),
    "falcon_rotary_new": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
}
ALIBI = {
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=128, hidden_size=64, n_head=8, n_layer=3, pad_token_id=0, eos_token_id=None
        )
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(
            d_model=64,
            n_heads=8,
            n_layers=3,
            vocab_size=128,
            max_seq_len=512,
            pad_token_id=0,
            eos_token_id=None,
        )
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FALCON, alibi=True, multi_query=False)),
    "falcon_mqa": lambda: FalconForCausalLM(FalconConfig(**FALCON, alibi=True)),
    "falcon_new": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, alibi=True, new_decoder_architecture=True, num_kv_heads=2)
    ),
}


def build(maker, **kwargs):
    torch.manual_seed(0)
    model = maker(**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def tokens(batch, length, seed=0):
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def through(model, cache):
    """The keyword argument that gives a model, or its ``generate``, a cache."""
    return {cache_argument(model): cache}


def steps(model, ids, cache, prefill, chunk=0, mask=None):
    """Logits of a prompt, single tokens, and one last chunk."""
    last = ids.shape[1] - chunk
    bounds = [0, prefill, *range(prefill + 1, last + 1)] + ([ids.shape[1]] if chunk else [])
    out = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            seen = None if mask is None else mask[:, :stop]
            places = None
            if mask is not None:
                places = (seen.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                kwargs = {"position_ids": places} if "rotary" in str(model).lower() else {}
            else:
                kwargs = {}
            out.append(
                model(
                    ids[:, start:stop], **through(model, cache), attention_mask=seen, **kwargs
                ).logits
            )
    return torch.cat(out, 1)


def everything(config):
    geometry = RazorPolicy.from_profile(RetrievalHeads({}), config).geometry
    return {layer: list(range(geometry.kv_heads)) for layer in range(geometry.layers)}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("lossless", ["all heads", "long window"])
def test_lossless_limit(name, lossless):
    model = build(ROTARY[name])
    if name in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")  # the only stock one with softcap or sinks
    ids = tokens(2, 260)
    full = steps(model, ids, DynamicCache(config=model.config), 200, chunk=20)
    heads = everything(model.config) if lossless == "all heads" else {}
    policy = RazorPolicy.from_profile(RetrievalHeads(heads), model.config, window=300)
    for mode in ("incremental", "prefill"):
        with razor(model, policy, mode=mode) as new_cache:
            got = steps(model, ids, new_cache(), 200, chunk=20)
        scale = max(1.0, float(full.abs().max()))
        assert float((got[:, :240] - full[:, :240]).abs().max()) <= 1e-5 * scale
        assert float((got - full).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_an_attention_of_their_own(name):
    model = build(OWN_ATTENTION[name])
    ids = tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    kv_heads = len(everything(model.config)[0])
    whole = RazorPolicy.from_profile(RetrievalHeads({0: [0]}), model.config, window=300)
    short = RazorPolicy.from_profile(RetrievalHeads({1: [0]}), model.config, window=8)
    for use in (None, mask):
        real = mask.bool()
        full = steps(model, ids, DynamicCache(config=model.config), 80, chunk=12, mask=use)
        with razor(model, whole) as new_cache:
            got = steps(model, ids, new_cache(), 80, chunk=12, mask=use)
        assert float((got - full)[real].abs().max()) <= 1e-5 * max(1.0, float(full.abs().max()))
    with razor(model, short) as new_cache:
        cache = new_cache()
        batch = steps(model, ids, cache, 80, chunk=12, mask=mask)
        single = steps(model, ids[1:, 13:], new_cache(), 67, chunk=12)
    assert float((batch[1, 13:] - single[0]).abs().max()) <= 1e-4
    assert [row["groups"][0]["heads"] for row in cache.report()] == [
        list(range(kv_heads)) if layer != 1 else [0] for layer in range(3)
    ]
    assert cache.nbytes() == predict(short, 120, batch=2, itemsize=4).razor


@pytest.mark.parametrize("name", ["gptj", "falcon_rotary", "bloom"])
def test_what_patched_models_refuse(name):
    # Dropout is what the attention interface refuses, to which GPT-J went over in 5.24.
    options = {"attn_pdrop": 0.1} if name == "gptj" else {}
    model = build({**OWN_ATTENTION, **ALIBI}[name], **options)
    profile = RetrievalHeads({}) if name != "bloom" else AlibiWindows(torch.full((8,), 9))
    with razor(model, RazorPolicy.from_profile(profile, model.config)) as new_cache:
        model.train()
        with pytest.raises(StructureError, match="eval"):
            model(tokens(1, 5), **through(model, new_cache()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_identical(name, beams):
    model = build(ROTARY[name])
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, num_beams=beams)
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **settings)
    policy = RazorPolicy.from_profile(RetrievalHeads({0: [1]}), model.config, window=300)
    with razor(model, policy) as new_cache:
        got = model.generate(ids, **through(model, new_cache()), **settings)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["incremental", "prefill"])
def test_padded_batch_equals_single_runs(kv_heads, mode):
    model = build(ROTARY["llama"], num_key_value_heads=kv_heads)
    policy = RazorPolicy.from_profile(
        RetrievalHeads({0: [0], 2: [kv_heads - 1]}), model.config, buffer_min=8, buffer_ratio=4
    )
    ids = tokens(4, 90)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 31, 44)):
        mask[row, :pad] = 0
    with razor(model, policy, mode=mode) as new_cache:
        batch = steps(model, ids, new_cache(), 60, chunk=10, mask=mask)
        for row in range(4):
            pad = int((mask[row] == 0).sum())
            single = steps(model, ids[row : row + 1, pad:], new_cache(), 60 - pad, chunk=10)
            assert float((batch[row, pad:] - single[0]).abs().max()) <= 1e-4


def test_greedy_padded_generate_equals_single_runs(copy_llama):
    ids = torch.randint(1, 512, (1, 40), generator=torch.Generator().manual_seed(2))
    long = torch.cat([ids, ids, ids[:, :5]], 1)
    short = long[:, 17:]
    both = torch.cat([long, torch.nn.functional.pad(short, (17, 0))])
    mask = (torch.arange(85) >= torch.tensor([[0], [17]])).long()
    settings = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    policy = RazorPolicy.from_profile(
        RetrievalHeads({1: [0, 1, 2, 3]}), copy_llama.config, window=24
    )
    with razor(copy_llama, policy) as new_cache:
        batch = copy_llama.generate(
            both, attention_mask=mask, **through(copy_llama, new_cache()), **settings
        )
        for row, prompt in enumerate((long, short)):
            single = copy_llama.generate(
                prompt,
                **through(copy_llama, new_cache()),
                **settings,
                attention_mask=torch.ones_like(prompt),
            )
            assert torch.equal(batch[row, 85:], single[0, prompt.shape[1] :])
    assert torch.equal(batch[0, 85:], ids[0, 5:35])  # and the copy is right


def test_bytes_equal_the_formula():
    geometry = dict(num_hidden_layers=6)
    for head_dim, expected in ((8, 134_784), (128, 2_156_544)):
        model = build(ROTARY["qwen3"], **geometry, head_dim=head_dim)
        heads = RetrievalHeads({0: [0, 3], 2: [1], 4: [0, 1, 2]})
        policy = RazorPolicy.from_profile(heads, model.config, window=32, sink_size=4)
        with razor(model, policy) as new_cache:
            cache = new_cache()
            steps(model, tokens(1, 240), cache, 240)
        predicted = predict(policy, 240, itemsize=4)
        assert cache.nbytes() == cache.allocated_nbytes() == predicted.razor == expected
        assert predicted.ratio == pytest.approx(0.3656, abs=1e-4)
        assert sum(row["nbytes"] for row in cache.report()) == expected


def test_predicted_ratios():
    paper = RazorPolicy(RetrievalHeads({0: list(range(15))}), HeadGeometry(1, 100, 100, 64, 6400))
    assert predict(paper, 20_000).ratio <= 0.325
    shipped = {layer: [0, 1] for layer in range(80)}
    shipped.update({layer: [0, 1, 2, 3, 4] for layer in range(16)})
    heads = RetrievalHeads(shipped)
    assert heads.count() == 208
    policy = RazorPolicy(heads, HeadGeometry(80, 64, 8, 128, 8192), sink_size=40)
    assert predict(policy, 131_072).ratio == pytest.approx(0.460, abs=1e-3)


def test_no_hidden_full_copy():
    """All tensors that live after a long prompt together stay near the formula."""
    import gc

    model = build(ROTARY["llama"])
    policy = RazorPolicy.from_profile(RetrievalHeads({0: [0]}), model.config, window=64)
    with razor(model, policy) as new_cache:
        gc.collect()
        before = {id(t) for t in live_tensors()}
        cache = new_cache()
        with torch.no_grad():
            model.model(tokens(1, 3000), **through(model.model, cache))
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in live_tensors()
            if id(t) not in before
        }
    assert sum(storages.values()) <= 1.25 * predict(policy, 3000, itemsize=4).razor


def live_tensors():
    import gc

    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def test_deferred_chunks_equal_one_prompt():
    model = build(ROTARY["llama"])
    policy = RazorPolicy.from_profile(RetrievalHeads({1: [2]}), model.config, buffer_min=16)
    ids = tokens(1, 120)
    with razor(model, policy) as new_cache:
        whole, parts = new_cache(), new_cache()
        expected = steps(model, ids, whole, 100)
        with torch.no_grad(), parts.defer():
            first = [
                model(ids[:, at : at + 25], **through(model, parts)).logits
                for at in range(0, 100, 25)
            ]
        assert parts.nbytes() < full_bytes(model, 100)
        rest = [
            model(ids[:, at : at + 1], **through(model, parts)).logits for at in range(100, 120)
        ]
    torch.testing.assert_close(torch.cat(first + rest, 1), expected, atol=1e-4, rtol=0)
    assert parts.nbytes() == whole.nbytes()


def full_bytes(model, length):
    geometry = RazorPolicy.from_profile(RetrievalHeads({}), model.config).geometry
    return 2 * 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * length


def test_multi_turn(wired):
    policy = RazorPolicy.from_profile(RetrievalHeads({1: [1]}), wired.config, window=32)
    segment = 1 + torch.randperm(511, generator=torch.Generator().manual_seed(1))[None, :200]
    with razor(wired, policy) as new_cache:
        cache = new_cache()

        def ask(ids):
            said = wired.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **through(wired, cache),
                max_new_tokens=10,
                do_sample=False,
            )
            return said, said[0, ids.shape[1] :]

        said, answer = ask(torch.cat([segment, segment[:, 30:32]], 1))
        assert torch.equal(answer, segment[0, 32:42])
        assert cache.get_seq_length() == 211
        said, answer = ask(torch.cat([said, segment[:, 50:60]], 1))
        assert torch.equal(answer, segment[0, 60:70])
        assert cache.get_seq_length() == 231
    assert [g["tokens"] for g in cache.report()[1]["groups"]] == [231, 36]


def test_disable_restores_bits():
    for maker in (
        ROTARY["llama"], ALIBI["bloom"], OWN_ATTENTION["gptj"], OWN_ATTENTION["falcon_rotary"]
    ):  # fmt: skip
        model = build(maker)
        ids = tokens(2, 40)
        implementation = model.config._attn_implementation
        before = model(ids).logits
        enable(model)
        enable(model)  # twice changes nothing
        inside = model(ids).logits
        disable(model)
        disable(model)
        assert torch.equal(model(ids).logits, before)
        torch.testing.assert_close(inside, before, atol=1e-4, rtol=0)
        assert model.config._attn_implementation == implementation
        attention = next(m for m in model.modules() if "Attention" in str(type(m)))
        assert not {"forward", "_attn"} & vars(attention).keys()


def test_enabled_model_works_with_other_caches():
    model = build(ROTARY["gemma2"])
    model.set_attn_implementation("eager")
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.int64)
    mask[0, :11] = 0
    expected = steps(model, ids, DynamicCache(config=model.config), 50, chunk=7, mask=mask)
    enable(model)
    got = steps(model, ids, DynamicCache(config=model.config), 50, chunk=7, mask=mask)
    disable(model)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("maker", [ROTARY["llama"], ALIBI["bloom"]], ids=["llama", "bloom"])
def test_cache_on_a_model_that_was_not_enabled(maker):
    model = build(maker)
    profile = RetrievalHeads({}) if model.config.model_type == "llama" else legacy_windows(model)
    cache = RazorCache(model.config, RazorPolicy.from_profile(profile, model.config))
    with pytest.raises(StructureError, match="not set up"):
        model(tokens(1, 5), **through(model, cache))


@pytest.mark.parametrize("layers", [1, 3])
def test_cache_with_another_attention_raises_in_the_first_pass(layers):
    model = build(ROTARY["llama"], num_hidden_layers=layers)
    with razor(model, RazorPolicy.from_profile(RetrievalHeads({}), model.config)) as new_cache:
        model.config._attn_implementation = "sdpa"
        with pytest.raises(StructureError, match="did not attend"):
            model(tokens(1, 5), **through(model, new_cache()))
        copied = RazorCache(copy.deepcopy(model.config), new_cache().policy)
        with pytest.raises(StructureError, match="not set up"):
            model(tokens(1, 5), **through(model, copied))
    assert not model.base_model._forward_hooks


def test_refusals(tmp_path):
    model = build(ROTARY["llama"])
    policy = RazorPolicy.from_profile(RetrievalHeads({}), model.config, window=8)
    ids = tokens(2, 20)
    with razor(model, policy) as new_cache:
        cache = new_cache()
        model(ids, **through(model, cache))
        with pytest.raises(StructureError, match="cropped"):
            cache.crop(-1)
        late = torch.ones(2, 21)
        late[0, -1] = 0
        with pytest.raises(StructureError, match="padding"):
            model(ids[:, :1], **through(model, cache), attention_mask=late)
        right = torch.ones(2, 20)
        right[1, -3:] = 0
        with pytest.raises(StructureError, match="left"):
            model(ids, **through(model, new_cache()), attention_mask=right)
        with pytest.raises(StructureError, match="four dimensions"):
            model(ids, **through(model, new_cache()), attention_mask=torch.zeros(2, 1, 20, 20))
    for wrong in ("full", 3):
        with pytest.raises(ValueError, match="mode"):
            RazorCache(model.config, policy, mode=wrong)
    growing = RazorPolicy.from_profile(RetrievalHeads({}), model.config, grow=True)
    with pytest.raises(ValueError, match="grows"):
        RazorCache(model.config, growing, mode="prefill")
    with pytest.raises(TypeError, match="policy"):
        RazorCache(model.config, "win.pt")
    with pytest.raises(TypeError, match="config"):
        RazorCache({}, policy)
    with pytest.raises(StructureError, match="GPT2LMHeadModel"):
        enable(GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1)))
    baichuan = LlamaForCausalLM(LlamaConfig(**SMALL))
    baichuan.config.model_type = "baichuan"  # remote code with ALiBi and a cache of its own
    baichuan.config.position_embedding_type = "alibi"
    with pytest.raises(StructureError, match="BloomAttention, FalconAttention, MptAttention"):
        enable(baichuan)
    windows = AlibiWindows(torch.full((8,), 9))
    with (
        razor(model, RazorPolicy.from_profile(windows, model.config)) as new_cache,
        pytest.raises(StructureError, match="no ALiBi"),
    ):
        model(ids, **through(model, new_cache()))


def test_from_file(tmp_path):
    model = build(ROTARY["llama"])
    path = tmp_path / "win.pt"
    write_profile(path, RetrievalHeads({0: [1]}, {2: [3]}))
    ids = tokens(1, 60)
    with razor(model, str(path), window=10, protect_first_layers=1) as new_cache:
        cache = new_cache()
        model(ids, **through(model, cache))
        groups = [row["groups"] for row in cache.report()]
        assert [[g["tokens"] for g in row] for row in groups] == [[60], [14], [60, 14]]
        other = RazorCache.from_file(path, model.config, window=10, protect_first_layers=1)
        model(ids, **through(model, other))
        assert other.nbytes() == cache.nbytes()


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_full_windows_are_lossless(name):
    model = build(ALIBI[name])
    ids = tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    windows = AlibiWindows(torch.full((8,), 400))
    policy = RazorPolicy.from_profile(windows, model.config)
    for use in (None, mask):
        expected = steps(model, ids, DynamicCache(config=model.config), 80, chunk=12, mask=use)
        with razor(model, policy) as new_cache:
            cache = new_cache()
            got = steps(model, ids, cache, 80, chunk=12, mask=use)
        real = mask.bool()
        scale = max(1.0, float(expected.abs().max()))
        assert float((got - expected)[real].abs().max()) <= 1e-5 * scale
    kv_heads = policy.geometry.kv_heads
    assert cache.report()[0]["groups"][0]["heads"] == list(range(kv_heads))


def test_alibi_generate_and_bytes(tiny_bloom):
    ids = tokens(1, 100)
    settings = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, num_beams=2
    )
    expected = tiny_bloom.generate(ids, **settings)
    with razor(
        tiny_bloom, RazorPolicy.from_profile(legacy_windows(tiny_bloom), tiny_bloom.config)
    ) as new_cache:
        assert torch.equal(
            tiny_bloom.generate(ids, **through(tiny_bloom, new_cache()), **settings), expected
        )
    windows = torch.tensor([[8, 16, 32, 64, 80, 90, 200, 500]] * 3 + [[5] * 8])
    policy = RazorPolicy.from_profile(AlibiWindows(windows), tiny_bloom.config)
    with razor(tiny_bloom, policy) as new_cache:
        cache = new_cache()
        with torch.no_grad():
            tiny_bloom(ids, **through(tiny_bloom, cache))
        assert cache.nbytes() == 2 * 16 * 4 * int(windows.clamp(max=100).sum())
        assert cache.nbytes() == cache.allocated_nbytes() == predict(policy, 100, itemsize=4).razor
        tiny_bloom(ids[:, :1], **through(tiny_bloom, cache))
        assert cache.nbytes() == 2 * 16 * 4 * int(windows.clamp(max=101).sum())


def test_legacy_windows_change_nothing():
    model = BloomForCausalLM(
        BloomConfig(vocab_size=128, hidden_size=64, n_head=8, n_layer=3)
    ).eval()
    ids = tokens(1, 600)
    policy = RazorPolicy.from_profile(legacy_windows(model), model.config)
    expected = steps(model, ids, DynamicCache(config=model.config), 590)
    with razor(model, policy) as new_cache:
        cache = new_cache()
        got = steps(model, ids, cache, 590)
    assert cache.nbytes() < full_bytes(model, 600)
    assert float((got - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["falcon", "falcon_mqa", "falcon_new"])
def test_alibi_compensation_bytes_and_effect(name):
    model = build(ALIBI[name])
    ids = tokens(1, 140)
    errors = {}
    expected = steps(model, ids, DynamicCache(config=model.config), 120)
    for compensation in ("mean", "none"):
        policy = RazorPolicy.from_profile(
            AlibiWindows(torch.full((8,), 9)), model.config, compensation=compensation
        )
        with razor(model, policy) as new_cache:
            cache = new_cache()
            got = steps(model, ids, cache, 120)
        assert cache.nbytes() == predict(policy, 140, itemsize=4).razor
        errors[compensation] = float((got - expected).abs().mean())
    assert errors["mean"] < 0.25 * errors["none"]


def test_hybrid_models_keep_their_local_layers():
    model = build(ROTARY["gemma2"])
    policy = RazorPolicy.from_profile(RetrievalHeads({}), model.config, window=8, sink_size=2)
    with razor(model, policy) as new_cache:
        cache = new_cache()
        steps(model, tokens(1, 60), cache, 50)
    assert [type(layer).__name__ for layer in cache.layers].count("RazorLayer") == len(
        cache.razor_layers
    )
    assert len(cache.razor_layers) == 1
    assert cache.report()[0]["groups"][0]["tokens"] == 10


def test_wired_passkey(wired):
    generator = torch.Generator().manual_seed(0)
    passkey = torch.randperm(511, generator=generator)[:41] + 1
    others = torch.tensor([t for t in range(1, 512) if t not in set(passkey.tolist())])
    hay = others[torch.randint(len(others), (1500,), generator=generator)]
    prompt = torch.cat([torch.tensor([0]), hay[:300], passkey, hay[300:], passkey[:1]])[None]

    def accuracy(heads):
        policy = RazorPolicy.from_profile(RetrievalHeads(heads), wired.config, window=64)
        with razor(wired, policy) as new_cache:
            cache = new_cache()
            said = wired.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                **through(wired, cache),
                max_new_tokens=40,
                do_sample=False,
            )
        full = 2 * 4 * 2 * 4 * 128 * cache.get_seq_length()
        return float((said[0, -40:] == passkey[1:]).double().mean()), cache.nbytes() / full

    right = accuracy({1: [1]})
    assert right[0] == 1.0
    assert right[1] <= 0.165
    for wrong in ({1: [0]}, {1: [3]}, {}):
        assert accuracy(wrong)[0] <= 0.05


def test_beam_scores_are_those_of_their_sequences(copy_llama):
    """Beams swap rows of a folded cache; scoring the winner alone must give the same."""
    segment = torch.randint(1, 512, (1, 150), generator=torch.Generator().manual_seed(0))
    prompt = torch.cat([segment, segment[:, :16]], 1)
    policy = RazorPolicy.from_profile(RetrievalHeads({1: [0, 1]}), copy_llama.config, window=24)
    with razor(copy_llama, policy) as new_cache:
        found = copy_llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **through(copy_llama, new_cache()),
            max_new_tokens=24,
            num_beams=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        said = found.sequences[:, 166:]
        logits = steps(copy_llama, found.sequences[:, :-1], new_cache(), 166)[:, 165:]
    own = logits.log_softmax(-1).gather(2, said[..., None]).mean()
    assert float(own) == pytest.approx(float(found.sequences_scores[0]), abs=1e-4)
