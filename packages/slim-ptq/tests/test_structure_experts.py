"""Fused experts as linear layers, and names in the checkpoint."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slim_ptq.structure import (
    checkpoint_names,
    find_fused_experts,
    find_linears,
    unfuse_experts,
)

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]


class Fused(nn.Module):
    """Fused experts with every layout switch; weights ``[tokens, E]`` when ``dense``."""

    def __init__(self, *, transposed, interleaved, dense, gated=True, count=5, width=8, inner=6):
        super().__init__()
        wide = 2 * inner if gated else inner
        first, down = torch.randn(count, wide, width), torch.randn(count, width, inner)
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, nn.Parameter(first.mT.contiguous() if transposed else first))
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.switches = transposed, interleaved, dense, gated
        self.is_transposed = transposed  # as transformers says it
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, router_indices, routing_weights):
        transposed, interleaved, dense, gated = self.switches
        first, down = (self.gate_up_proj if gated else self.up_proj), self.down_proj
        first, down = (first, down) if transposed else (first.mT, down.mT)
        out = torch.zeros_like(hidden_states)
        for token in range(len(hidden_states)):
            for position, number in enumerate(router_indices[token].tolist()):
                inner = hidden_states[token] @ first[number]
                if gated and interleaved:
                    inner = self.act_fn(inner[::2]) * inner[1::2]
                elif gated:
                    gate, up = inner.chunk(2)
                    inner = self.act_fn(gate) * up
                else:
                    inner = self.act_fn(inner)
                weight = routing_weights[token, number if dense else position]
                out[token] += weight * (inner @ down[number])
        return out


class Holder(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_layout_of_fused_experts_is_reproduced(transposed, interleaved, dense, gated):
    torch.manual_seed(0)
    fused = Fused(transposed=transposed, interleaved=interleaved, dense=dense, gated=gated)
    holder = Holder(fused)
    assert unfuse_experts(holder) == ("experts",)
    states, index = torch.randn(7, 8), torch.tensor([[0, 3]] * 6 + [[3, 1]])  # 2 and 4 get no token
    weights = torch.rand(7, 5) if dense else torch.rand(7, 2)
    torch.testing.assert_close(
        holder.experts(states, index, weights), fused(states, index, weights), rtol=1e-5, atol=1e-5
    )
    for name, tensor in holder.experts.fused().items():
        assert torch.equal(tensor, fused.get_parameter(name))
    names = {"down_proj", "up_proj"} | ({"gate_proj"} if gated else set())
    assert set(find_linears(holder)) == {f"experts.{e}.{n}" for e in range(5) for n in names}
    assert holder.experts[2].down_proj.weight.untyped_storage().data_ptr() == (
        fused.down_proj.untyped_storage().data_ptr()
    )


def test_experts_that_compute_something_else_stay_fused_with_a_warning(caplog):
    fused = Fused(transposed=False, interleaved=False, dense=False)
    plain = fused.forward
    fused.forward = lambda hidden_states, router_indices, routing_weights: (
        plain(hidden_states, router_indices, routing_weights) + 1
    )
    holder = Holder(fused)
    with caplog.at_level(logging.WARNING):
        assert unfuse_experts(holder) == ()
    assert "experts: fused experts of class Fused stay in floating point" in caplog.text
    assert find_fused_experts(holder) == ("experts",)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_compute_the_same_with_unfused_experts(family, dtype, tiny_model, tiny_ids):
    model, ids = tiny_model(family, dtype=dtype), tiny_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        unfuse_experts(model)
        found = model(input_ids=ids).logits
    atol = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
    assert find_fused_experts(model) == ()
    assert unfuse_experts(model) == ()


def test_checkpoint_names_are_those_that_saving_writes(families, tiny_model, tmp_path):
    for family in families:
        model = tiny_model(family)
        model.save_pretrained(tmp_path / family)
        expected = load_file(tmp_path / family / "model.safetensors")
        unfuse_experts(model)
        rename = checkpoint_names(model)
        found = {rename(name): tensor for name, tensor in model.state_dict().items()}
        tied = {rename(name) for name in getattr(model, "_tied_weights_keys", None) or ()}
        assert set(expected) <= set(found)
        assert set(found) - set(expected) <= tied
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), (family, name)


def test_a_new_parameter_gets_the_prefix_of_its_module(tiny_model):
    model = tiny_model("mixtral")
    unfuse_experts(model)
    rename = checkpoint_names(model)
    new = "model.layers.0.mlp.experts.1.down_proj.weight"  # transformers 5; 4 has it as on disk
    saved = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    weight = new if new in model.state_dict() else saved
    assert rename(weight) == saved
    assert rename(f"{weight}_scale") == f"{saved}_scale"
