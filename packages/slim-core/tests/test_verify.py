"""Tests of verification: a sound checkpoint has no problem, and each planted one is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slim_core.errors import CheckpointError
from slim_core.export import CheckpointExport
from slim_core.formats import FORMATS
from slim_core.kronecker import identity_transforms
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.scheme import QuantScheme
from slim_core.verify import verify_checkpoint
from slim_core.verify_layer import layer_problems

BASE = "model.layers.0"
Q = f"{BASE}.self_attn.q_proj"
WEIGHTS = "quant_model_weight_w8a8.safetensors"
DESCRIPTION = "quant_model_description.json"


def layer(name: str, scheme: str = "w8a8") -> QuantizedLinear:
    parsed = QuantScheme.parse(scheme)
    assert parsed.weight is not None
    rng = np.random.default_rng(sum(map(ord, name)))
    weight = rng.normal(size=(8, 16)).astype(np.float32)
    scale, offset = weight_params(weight, parsed.weight)
    codes = quantize_weight(weight, scale, offset, parsed.weight)
    given: dict[str, Any] = {}
    if parsed.is_static:
        given["input_scale"] = np.array([0.02], np.float32)
        given["input_offset"] = np.array([-3], np.float32)
    bias = rng.normal(size=8).astype(np.float32)
    return QuantizedLinear(name, parsed, codes, scale, offset, bias=bias, **given)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Return a directory in which nothing is wrong."""
    with CheckpointExport(tmp_path, FORMATS["ascend_v1"], model_type="W8A8") as export:
        for part in ("q_proj", "k_proj", "v_proj"):
            export.add_layer(layer(f"{BASE}.self_attn.{part}"))
        export.add_layer(layer(f"{BASE}.mlp.down_proj", "w8a16_asym"))
        for number in range(2):
            export.add_layer(layer(f"{BASE}.mlp.experts.{number}.up_proj", "w8a8_dynamic"))
        export.add_float("model.norm.weight", np.ones(16, np.float32))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return tmp_path


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    file = directory / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def edit_json(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def test_nothing_is_wrong(sound: Path) -> None:
    found = verify_checkpoint(sound)
    assert found.problems == ()
    assert found.sound
    assert (found.layers, found.tensors) == (6, 3 * 8 + 3 * 4 + 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{Q}.weight"), f"{Q}.weight is described and not stored"),
        (lambda t: t.pop(f"{Q}.quant_bias"), f"{Q} has no quant_bias"),
        (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q} has no weight_scale"),
        (lambda t: t.update({"extra": np.ones(1)}), "extra is not in the description"),
        (lambda t: t[f"{Q}.weight"].__setitem__((0, 0), 99), f"{Q}.quant_bias does not follow"),
        (lambda t: t[f"{Q}.quant_bias"].__iadd__(1), f"{Q}.quant_bias does not follow"),
        (lambda t: t[f"{Q}.deq_scale"].__iadd__(1), f"{Q}.deq_scale is not input_scale times"),
        (
            lambda t: t.update({f"{Q}.deq_scale": np.ones(8, np.float32)}),
            f"{Q}.deq_scale must be int64, not float32",
        ),
        (
            lambda t: t[f"{Q}.weight_scale"].__setitem__((0, 0), np.nan),
            f"{Q}.weight_scale has NaN",
        ),
        (lambda t: t[f"{Q}.weight_scale"].__imul__(-1), "elements that are not positive"),
        (lambda t: t[f"{Q}.bias"].__setitem__(0, np.inf), f"{Q}.bias has NaN or infinite"),
        (
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].astype(np.int32)}),
            f"{Q}.weight must be int8",
        ),
        (
            lambda t: t.update({f"{Q}.weight_scale": np.ones((4, 1), np.float32)}),
            f"{Q}.weight_scale must have shape",
        ),
        (
            lambda t: t.update({f"{Q}.input_scale": np.float32([0.02, 0.02])}),
            f"{Q}.input_scale must have shape",
        ),
    ],
)
def test_damaged_tensors(sound: Path, change: Any, says: str) -> None:
    edit_tensors(sound, change)
    found = verify_checkpoint(sound)
    assert any(says in problem for problem in found.problems), found.problems


def test_layers_of_one_matrix_with_other_input_parameters(sound: Path) -> None:
    other = layer(Q)
    tensors = FORMATS["ascend_v1"].encode(
        QuantizedLinear(
            Q,
            other.scheme,
            other.codes,
            other.weight_scale,
            other.weight_offset,
            np.array([0.04], np.float32),
            np.array([1], np.float32),
            other.bias,
        )
    )
    edit_tensors(sound, lambda t: t.update({f"{Q}.{k}": v for k, v in tensors.items()}))
    (problem,) = verify_checkpoint(sound).problems
    assert problem == (
        f"the layers of {BASE}.self_attn.qkv have different input_scale, input_offset or transforms"
    )


@pytest.mark.parametrize(
    ("scheme", "changes", "says"),
    [
        ("w4a4_flatquant_dynamic", {"clip_ratio": [0.5]}, None),
        ("w4a4_flatquant_dynamic", {"clip_ratio": [0.0]}, "clip_ratio must be above 0"),
        ("w4a4_flatquant_dynamic", {"clip_ratio": [1.5]}, "at most 1, not 1.5"),
        ("w4a4_flatquant_dynamic", {"left_trans": np.ones((8, 8))}, "left_trans has no inverse"),
        ("w4a4_mxfp4_flatquant", {}, None),
        ("w4a4_mxfp4_flatquant", {"clip_ratio": [0.5]}, "clip_ratio must be 1, since scales"),
    ],
)
def test_transforms(scheme: str, changes: dict[str, Any], says: str | None) -> None:
    parsed = QuantScheme.parse(scheme)
    assert parsed.weight is not None
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    scale, offset = weight_params(weight, parsed.weight)
    codes = quantize_weight(weight, scale, offset, parsed.weight)
    extras = identity_transforms(64, scale) | {
        name: np.asarray(value, np.float32) for name, value in changes.items()
    }
    made = QuantizedLinear("a.q_proj", parsed, codes, scale, offset, extras=extras)
    tensors = FORMATS["ascend_v1"].encode(made)
    found = list(layer_problems(made, tensors))
    assert len(found) == (says is not None)
    assert all((says or "") in problem for problem in found)


def test_experts_of_unlike_type(sound: Path) -> None:
    expert = f"{BASE}.mlp.experts.1.up_proj"

    def change(content: dict[str, Any]) -> None:
        for name in content:
            if name.startswith(expert) and not name.endswith("bias"):
                content[name] = "W8A16"

    edit_json(sound, DESCRIPTION, change)
    (problem,) = verify_checkpoint(sound).problems
    assert problem.startswith(f"{BASE}.mlp.experts mixes W8A16, W8A8_DYNAMIC")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (DESCRIPTION, lambda c: c.pop("model.norm.weight"), "model.norm.weight is not in the"),
        (DESCRIPTION, lambda c: c.pop("model_quant_type"), "has no model_quant_type"),
        (DESCRIPTION, lambda c: c.update(group_size="128"), "group_size must be an integer"),
        (DESCRIPTION, lambda c: c.update(version="1.0"), "must have version 1.0.0"),
        (DESCRIPTION, lambda c: c.update({"x.y.weight": "W8A16"}), "x.y.weight is described"),
        ("config.json", lambda c: c.update(quantization_config={}), "a quantization_config"),
        (
            "config.json",
            lambda c: c.update(text_config={"quantization_config": {}}),
            "a quantization_config",
        ),
        ("config.json", lambda c: c.update(dtype="bfloat16"), "deq_scale must be float32"),
    ],
)
def test_damaged_json(sound: Path, file: str, change: Any, says: str) -> None:
    edit_json(sound, file, change)
    found = verify_checkpoint(sound)
    assert any(says in problem for problem in found.problems), found.problems


def test_files_of_another_model(sound: Path) -> None:
    save_file({"model.norm.weight": np.ones(2)}, sound / "model.safetensors")
    assert not verify_checkpoint(sound).sound


def test_weights_beside_an_index(sound: Path, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(sound / WEIGHTS), WEIGHTS)}
    (sound / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert verify_checkpoint(sound).sound
    save_file({"stray.weight": np.ones(2)}, sound / "adapter.safetensors")
    (problem,) = verify_checkpoint(sound).problems
    assert problem == "adapter.safetensors is no part of the checkpoint, vLLM would load it too"


def test_two_sets_of_weights(sound: Path) -> None:
    save_file({"stray.weight": np.ones(2)}, sound / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"more than one checkpoint: adapter\.safetensors"):
        verify_checkpoint(sound)


def test_not_a_quantized_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no description"):
        verify_checkpoint(tmp_path)
