"""Tests of writing checkpoints: layers through a format, the description last, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slim_core.checkpoint import open_checkpoint
from slim_core.export import CheckpointExport
from slim_core.formats import FORMATS
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme

DESCRIPTION = "quant_model_description.json"


def layer(name: str = "model.layers.0.mlp.up_proj") -> QuantizedLinear:
    return QuantizedLinear(
        name,
        QuantScheme.parse("w8a16"),
        np.arange(32, dtype=np.int8).reshape(4, 8),
        np.full((4, 1), 0.5, np.float32),
        np.zeros((4, 1), np.float32),
        bias=np.ones(4, np.float16),
        model_dtype="float16",
    )


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_files_description_and_modes(tmp_path: Path) -> None:
    with CheckpointExport(
        tmp_path, FORMATS["ascend_v1"], model_type="W8A16", group_size=32
    ) as export:
        assert export.add_layer(layer()) == 32 + 16 + 16 + 8
        assert export.add_float("model.norm.weight", np.ones(8, np.float16)) == 16
        export.add_float("other", np.ones(2, np.float16), "W8A16")
        export.describe("lm_head.weight", "FLOAT")
        assert DESCRIPTION not in names(tmp_path)
    assert names(tmp_path) == [DESCRIPTION, "quant_model_weight_w8a16.safetensors"]
    content = json.loads((tmp_path / DESCRIPTION).read_text())
    prefix = "model.layers.0.mlp.up_proj"
    assert content == {
        "version": "1.0.0",
        "model_quant_type": "W8A16",
        "group_size": 32,
        "metadata": {},
        "optional": {},
        "lm_head.weight": "FLOAT",
        f"{prefix}.weight": "W8A16",
        f"{prefix}.weight_scale": "W8A16",
        f"{prefix}.weight_offset": "W8A16",
        f"{prefix}.bias": "FLOAT",
        "model.norm.weight": "FLOAT",
        "other": "W8A16",
    }
    stored = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(stored.load(f"{prefix}.weight"), layer().codes)
    assert stored.tensors[f"{prefix}.bias"].dtype == np.float16
    assert (tmp_path / DESCRIPTION).stat().st_mode & 0o777 == 0o600
    weights = tmp_path / "quant_model_weight_w8a16.safetensors"
    assert weights.stat().st_mode & 0o777 == 0o400


def test_given_names(tmp_path: Path) -> None:
    with CheckpointExport(
        tmp_path,
        FORMATS["safe_tensor"],
        model_type="W8A16",
        weight_file="mine",
        description_file="mine.json",
    ) as export:
        export.add_layer(layer())
    assert names(tmp_path) == ["mine.json", "mine.safetensors"]


def test_the_float_format_has_no_description(tmp_path: Path) -> None:
    with CheckpointExport(tmp_path, FORMATS["float"], model_type="FLOAT") as export:
        export.add_layer(layer())
    assert names(tmp_path) == ["model.safetensors"]
    stored = open_checkpoint(tmp_path)
    weight = stored.load("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(weight, layer().codes.astype(np.float16) * 0.5)


def test_parts(tmp_path: Path) -> None:
    with CheckpointExport(
        tmp_path, FORMATS["ascend_v1"], model_type="W8A16", max_shard_bytes=100
    ) as export:
        for index in range(4):
            export.add_layer(layer(f"model.layers.{index}.mlp.up_proj"))
    parts = [name for name in names(tmp_path) if name.endswith(".safetensors")]
    assert len(parts) > 1
    assert f"quant_model_weight_w8a16-00001-of-{len(parts):05d}.safetensors" in parts
    assert len(open_checkpoint(tmp_path).tensors) == 16


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with CheckpointExport(
            tmp_path, FORMATS["ascend_v1"], model_type="W8A16", max_shard_bytes=100
        ) as export:
            for index in range(4):
                export.add_layer(layer(f"model.layers.{index}.mlp.up_proj"))
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == []


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        with CheckpointExport(tmp_path / place, FORMATS["ascend_v1"], model_type="W8A16") as export:
            export.add_layer(layer())
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
