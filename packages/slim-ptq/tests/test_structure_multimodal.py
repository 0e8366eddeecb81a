"""The language part of multimodal models: blocks, links, and names in the checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from slim_ptq.structure import (
    checkpoint_names,
    find_blocks,
    find_linears,
    trace_block,
    unfuse_experts,
)

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
TOWER = {"depth": 3, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
TOWER |= {"hidden_size": 32, "patch_size": 4}


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl():
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": ROPE},
        vision_config={**TOWER, "fullatt_block_indexes": [1]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_moe():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, **moe, "rope_scaling": ROPE},
        vision_config={**TOWER, "deepstack_visual_indexes": [1]},
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


@pytest.fixture(params=[llava, qwen2_5_vl, qwen3_vl_moe])
def model(request):
    torch.manual_seed(0)
    built = request.param().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0.0, 0.1)
    return built


def test_the_blocks_are_those_of_the_language_part(model, capture_block, tiny_ids):
    blocks = find_blocks(model)
    assert [name.rpartition(".")[2] for name in blocks] == ["0", "1"]
    assert "language_model" in blocks[0]
    unfuse_experts(model)
    args, kwargs = capture_block(model, blocks[0], tiny_ids().clamp(min=6))
    trace = trace_block(model.get_submodule(blocks[0]), args, kwargs)
    assert trace.rejected == ()
    sources = {link.source for link in trace.links}
    assert {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm"} <= sources


@pytest.mark.parametrize("loaded", [False, True])
def test_names_are_those_that_saving_writes(model, loaded, tmp_path):
    model.save_pretrained(tmp_path)
    if loaded:
        model = type(model).from_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    unfused = unfuse_experts(model)
    rename = checkpoint_names(model)
    found = {rename(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in expected.items():
        if ".experts." not in name:
            assert torch.equal(found[name], tensor), name
    # These checkpoints hold fused experts; engines want one entry an expert below the same parent.
    for path in unfused:
        parent = rename(f"{path}.3.up_proj.weight").removesuffix(".3.up_proj.weight")
        assert f"{parent}.gate_up_proj" in expected
    assert len(found) == len(model.state_dict())
    assert all(rename(f"{name}.weight_scale").endswith("_scale") for name in find_linears(model))
