"""Blocks, linears, routers, groups and links on tiny models of every family."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slim_core.errors import InvalidTypeError, NumericalError, StructureError
from slim_core.groups import input_group
from slim_ptq.structure import (
    LinkKind,
    NormForm,
    as_linear,
    find_blocks,
    find_linears,
    find_routers,
    is_router,
    trace_block,
    unfuse_experts,
    weight_of,
)

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"]
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "chatglm": "transformer.encoder.layers",
    "deepseek_v3": "model.layers",
}


def traced(model, capture_block, ids, number=-1):
    unfuse_experts(model)
    name = find_blocks(model)[number]
    args, kwargs = capture_block(model, name, ids)
    block = model.get_submodule(name)
    return block, trace_block(block, args, kwargs)


def interleaved(stride, start):
    """Rows of v in a layer that keeps the 16 rows of each of its four heads together."""
    return [head * stride + start + row for head in range(4) for row in range(16)]


def links_of(trace):
    return {link.source: link for link in trace.links}


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_found_in_order(family, tiny_model):
    stack = BLOCKS[family]
    assert find_blocks(tiny_model(family)) == (f"{stack}.0", f"{stack}.1")


def test_blocks_of_a_multimodal_model_are_those_of_its_language_part():
    class Tower(nn.Module):
        def __init__(self, width, layers):
            super().__init__()
            self.embed = nn.Embedding(32, width)
            blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))] * layers
            self.layers = nn.ModuleList(copy.deepcopy(block) for block in blocks)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.language = Tower(64, 5), Tower(8, 2)

        def get_input_embeddings(self):
            return self.language.embed

    assert find_blocks(Both()) == ("language.layers.0", "language.layers.1")


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(StructureError, match="no decoder blocks found in Sequential"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_conv1d_is_a_linear_with_its_weight_transposed():
    conv, x = Conv1D(6, 4), torch.randn(3, 4)
    linear = as_linear(conv)
    assert weight_of(conv).shape == (6, 4)
    torch.testing.assert_close(linear(x), conv(x))
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    with pytest.raises(InvalidTypeError, match="must be a linear layer, not Embedding"):
        weight_of(nn.Embedding(2, 2))


@pytest.mark.parametrize("family", EXPERTS)
def test_routers_and_gates_are_not_quantizable(family, tiny_model):
    model = tiny_model(family)
    unfuse_experts(model)
    routers = find_routers(model)
    assert routers
    assert all(is_router(name, model) for name in routers)
    assert not routers & set(find_linears(model))
    assert {name.rpartition(".")[2] for name in routers} <= {"gate", "shared_expert_gate"}
    experts = [name for name in find_linears(model) if ".experts." in name]
    assert experts


@pytest.mark.parametrize("family", DENSE)
def test_groups_and_links_of_a_llama_like_block(family, tiny_model, capture_block, tiny_ids):
    _, trace = traced(tiny_model(family), capture_block, tiny_ids())
    assert trace.groups == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    assert trace.group_of("mlp.up_proj") == ("mlp.gate_proj", "mlp.up_proj")
    assert not trace.rejected
    before_mlp = "pre_feedforward" if family == "gemma2" else "post_attention"
    assert {link.source: (link.kind, link.target_names) for link in trace.links} == {
        "input_layernorm": (LinkKind.NORM_LINEAR, trace.groups[0]),
        "self_attn.v_proj": (LinkKind.V_O, ("self_attn.o_proj",)),
        f"{before_mlp}_layernorm": (LinkKind.NORM_LINEAR, trace.groups[2]),
        "mlp.up_proj": (LinkKind.UP_DOWN, ("mlp.down_proj",)),
    }
    form = NormForm.ONE_PLUS if family.startswith("gemma") else NormForm.PLAIN
    assert links_of(trace)["input_layernorm"].norm_form is form


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_links_do_not_depend_on_attention_code_or_precision(
    family, attention, dtype, tiny_model, capture_block, tiny_ids
):
    model = tiny_model(family, dtype=dtype, attn_implementation=attention)
    _, trace = traced(model, capture_block, tiny_ids())
    assert len(trace.links) == 4
    assert not trace.rejected


def test_grouped_query_attention_repeats_the_channels_of_v(tiny_model, capture_block, tiny_ids):
    _, trace = traced(tiny_model("llama"), capture_block, tiny_ids())
    link = links_of(trace)["self_attn.v_proj"]
    heads = torch.arange(32).reshape(2, 1, 16).expand(2, 2, 16).flatten()
    assert link.repeat == 2
    assert torch.equal(link.targets[0].index, heads)
    values = torch.arange(64.0)
    expected = values.reshape(2, 2, 16).mean(1).flatten()
    assert torch.equal(link.to_source(values), expected)
    assert torch.equal(link.to_source(values, "max"), values.reshape(2, 2, 16).amax(1).flatten())


@pytest.mark.parametrize(
    ("family", "source", "rows"),
    [
        ("phi3", "self_attn.qkv_proj", range(96, 128)),
        ("gpt2", "attn.c_attn", range(128, 192)),
        ("chatglm", "self_attention.query_key_value", range(96, 128)),
        (
            "bloom",
            "self_attention.query_key_value",
            interleaved(48, 32),
        ),
        ("falcon", "self_attention.query_key_value", range(80, 96)),
        ("glm", "mlp.gate_up_proj", range(128, 256)),
        ("chatglm", "mlp.dense_h_to_4h", range(96, 192)),
        (
            "deepseek_v3",
            "self_attn.kv_b_proj",
            interleaved(32, 16),
        ),
    ],
)
def test_only_the_right_rows_of_a_fused_layer_are_linked(
    family, source, rows, tiny_model, capture_block, tiny_ids
):
    _, trace = traced(tiny_model(family), capture_block, tiny_ids())
    assert links_of(trace)[source].channels.tolist() == list(rows)


@pytest.mark.parametrize("family", ["phi", "falcon"])
def test_a_parallel_block_has_one_group_for_attention_and_mlp(
    family, tiny_model, capture_block, tiny_ids
):
    _, trace = traced(tiny_model(family), capture_block, tiny_ids())
    assert any("mlp" in trace.groups[0][-1] and "att" in name for name in trace.groups[0])
    assert links_of(trace)["input_layernorm"].target_names == trace.groups[0]


def test_an_activation_that_is_not_homogeneous_breaks_the_link(tiny_model, capture_block, tiny_ids):
    _, relu = traced(tiny_model("opt"), capture_block, tiny_ids())
    assert links_of(relu)["fc1"].kind is LinkKind.UP_DOWN
    _, gelu = traced(tiny_model("gpt2"), capture_block, tiny_ids())
    assert "mlp.c_fc" not in links_of(gelu)
    assert all("changes the output" in item.reason for item in gelu.rejected)


@pytest.mark.parametrize("family", EXPERTS)
def test_every_reader_of_a_norm_before_experts_is_a_target(
    family, tiny_model, capture_block, tiny_ids
):
    block, trace = traced(tiny_model(family), capture_block, tiny_ids())
    readers = {
        name
        for name, module in block.named_modules()
        if name.startswith(("mlp", "block_sparse_moe"))
        and getattr(module, "weight", None) is not None
        and not name.endswith(("down_proj", "w2"))
    }
    assert set(links_of(trace)["post_attention_layernorm"].target_names) == readers


def test_experts_without_tokens_are_grouped_and_linked_like_the_others(
    tiny_model, capture_block, tiny_ids
):
    one_token = tiny_ids(1)  # two experts of eight run
    _, trace = traced(tiny_model("qwen3_moe"), capture_block, one_token)
    norm = links_of(trace)["post_attention_layernorm"]
    assert len(norm.targets) == 17
    for number in range(8):
        expert = f"mlp.experts.{number}"
        assert trace.group_of(f"{expert}.up_proj") == (f"{expert}.gate_proj", f"{expert}.up_proj")
        assert links_of(trace)[f"{expert}.up_proj"].target_names == (f"{expert}.down_proj",)


def test_latent_attention_links_its_inner_norms(tiny_model, capture_block, tiny_ids):
    _, trace = traced(tiny_model("deepseek_v3"), capture_block, tiny_ids())
    assert trace.groups[0] == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    links = links_of(trace)
    assert links["self_attn.q_a_layernorm"].target_names == ("self_attn.q_b_proj",)
    assert links["self_attn.kv_a_layernorm"].target_names == ("self_attn.kv_b_proj",)


def test_tracing_leaves_block_and_arguments_as_they_were(
    families, tiny_model, capture_block, tiny_ids
):
    for family in families:
        model = tiny_model(family)
        unfuse_experts(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        name = find_blocks(model)[0]
        args, kwargs = capture_block(model, name, tiny_ids())
        kept = copy.deepcopy((args, {k: v for k, v in kwargs.items() if torch.is_tensor(v)}))
        trace_block(model.get_submodule(name), args, kwargs)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert torch.equal(args[0], kept[0][0])
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )


def test_a_reader_outside_the_linears_rejects_the_link(tiny_model, capture_block, tiny_ids):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 0.01 * x.abs()
    _, trace = traced(model, capture_block, tiny_ids())
    assert "post_attention_layernorm" not in links_of(trace)
    assert [item.link.source for item in trace.rejected] == ["post_attention_layernorm"]
    assert {"input_layernorm", "self_attn.v_proj", "mlp.up_proj"} <= set(links_of(trace))


def test_a_linear_that_did_not_run_rejects_all_links(tiny_model, capture_block, tiny_ids):
    model = tiny_model("llama")
    model.model.layers[1].mlp.adapter = nn.Linear(64, 64)
    _, trace = traced(model, capture_block, tiny_ids())
    assert not trace.links
    assert {item.reason for item in trace.rejected} == {
        "mlp.adapter was not run, so what it reads is not known"
    }


def test_a_block_that_gives_nan_is_an_error(tiny_model, capture_block, tiny_ids):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="output of LlamaDecoderLayer has NaN or infinity"):
        traced(model, capture_block, tiny_ids())


def test_layers_that_engines_fuse_read_the_same_tensor(
    families, tiny_model, capture_block, tiny_ids
):
    fused = 0
    for family in families:
        _, trace = traced(tiny_model(family), capture_block, tiny_ids())
        group_of = {name: group for group in trace.groups for name in group}
        for name in group_of:
            others = [n for n in group_of if n != name and input_group(n) == input_group(name)]
            assert set(others) < set(group_of[name]), (family, name)
            fused += len(others)
    assert fused > 100


def test_a_layer_below_a_router_is_not_quantizable_however_experts_are_kept():
    block = nn.ModuleDict({"router": nn.ModuleDict({"layer": nn.Linear(4, 3)})})
    block["up"] = nn.Linear(4, 4)
    assert find_routers(block) == {"router.layer"}
    assert set(find_linears(block)) == {"up"}
    assert set(find_linears(block, routers=True)) == {"up", "router.layer"}
