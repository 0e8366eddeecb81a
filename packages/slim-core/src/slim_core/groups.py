"""Layers that inference engines run as one: they must share type and activation parameters.

vllm-ascend, SGLang and MindIE stack q/k/v and gate/up into one matrix with one input scale, and
read the type of an expert layer from its first expert.  The engines find the parts by name, so
these names are part of the file format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FUSED = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("gate_up", ("gate_proj", "up_proj")),
    ("gate_up", ("w1", "w3")),
    ("qkv_a", ("q_a_proj", "kv_a_proj_with_mqa")),
)
_PART = {part: kind for kind, parts in _FUSED for part in parts}
_ROW_PARALLEL = ("o_proj", "down_proj", "w2")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)")
_ROUTER = re.compile(r".*\.(gate|router|shared_expert_gate|router\.\w+|gate\.wg)")


def input_group(name: str) -> str:
    """Return the name of the group that shares the input of this layer, or the layer's own name.

    >>> input_group("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.qkv'
    """
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{_PART[leaf]}" if leaf in _PART else name


def type_group(name: str) -> str:
    """Return the name of the group that shares the quantization type of this layer.

    >>> type_group("model.layers.1.mlp.experts.7.down_proj")
    'model.layers.1.mlp.experts'
    """
    expert = _EXPERT.fullmatch(name)
    return expert.group(1) if expert else input_group(name)


def is_expert(name: str) -> bool:
    """Whether the layer belongs to one of several experts."""
    return _EXPERT.fullmatch(name) is not None


def is_router(name: str) -> bool:
    """Whether the layer chooses experts; routers are small, decide much and stay in float."""
    return _ROUTER.fullmatch(name) is not None


def is_row_parallel(name: str) -> bool:
    """Whether engines split the input channels of the layer over devices."""
    return name.rpartition(".")[2] in _ROW_PARALLEL


def group_by(names: Iterable[str], key: str = "type") -> dict[str, list[str]]:
    """Return the members of each group, by ``"type"`` or by ``"input"``, in their order."""
    find = type_group if key == "type" else input_group
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(find(name), []).append(name)
    return groups
