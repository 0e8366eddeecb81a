import pytest

from slim_core.groups import group_by, input_group, is_expert, is_router, type_group

BLOCK = "model.layers.3"


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv"),
        (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up"),
        (("mlp.experts.7.w1", "mlp.experts.7.w3"), "mlp.experts.7.gate_up"),
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.qkv_a"),
        (("self_attn.o_proj",), "self_attn.o_proj"),
        (("mlp.down_proj",), "mlp.down_proj"),
    ],
)
def test_layers_that_share_an_input(names, group):
    assert {input_group(f"{BLOCK}.{name}") for name in names} == {f"{BLOCK}.{group}"}


def test_input_is_not_shared_between_blocks():
    assert input_group("model.layers.0.mlp.up_proj") != input_group("model.layers.1.mlp.up_proj")


def test_all_experts_of_a_block_share_their_type():
    experts = [
        f"{BLOCK}.mlp.experts.{i}.{p}" for i in (0, 11) for p in ("gate_proj", "down_proj", "w2")
    ]
    assert {type_group(name) for name in experts} == {f"{BLOCK}.mlp.experts"}
    assert all(is_expert(name) for name in experts)
    shared = f"{BLOCK}.mlp.shared_experts.up_proj"
    assert type_group(shared) == f"{BLOCK}.mlp.shared_experts.gate_up"
    assert not is_expert(shared)
    assert not is_expert(f"{BLOCK}.mlp.experts.gate_up_proj")


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate",
        "block_sparse_moe.gate",
        "mlp.shared_expert_gate",
        "feed_forward.router",
        "mlp.router.linear",
        "mlp.gate.wg",
    ],
)
def test_routers(name):
    assert is_router(f"{BLOCK}.{name}")


@pytest.mark.parametrize(
    "name", ["mlp.gate_proj", "mlp.gate_up_proj", "mlp.experts.0.gate_proj", "gated.proj"]
)
def test_what_is_no_router(name):
    assert not is_router(f"{BLOCK}.{name}")


def test_group_by_keeps_the_order():
    names = ["a.q_proj", "a.o_proj", "a.k_proj", "a.experts.0.w1", "a.experts.1.w2"]
    assert group_by(names) == {
        "a.qkv": ["a.q_proj", "a.k_proj"],
        "a.o_proj": ["a.o_proj"],
        "a.experts": ["a.experts.0.w1", "a.experts.1.w2"],
    }
    assert group_by(names, "input") == {
        "a.qkv": ["a.q_proj", "a.k_proj"],
        "a.o_proj": ["a.o_proj"],
        "a.experts.0.gate_up": ["a.experts.0.w1"],
        "a.experts.1.w2": ["a.experts.1.w2"],
    }
    assert group_by([]) == {}
