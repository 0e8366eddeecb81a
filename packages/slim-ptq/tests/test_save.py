"""Tests of what the classic face writes: files, modes, names, parts, and writes that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slim_core import export
from slim_core.checkpoint import open_checkpoint
from slim_core.errors import InvalidTypeError, InvalidValueError, OutputExistsError, SlimError
from slim_core.pickles import load_npy_dict
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig
from slim_ptq import save as save_module

Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def calibrator(tiny_model: Factory, tiny_calib: Any) -> Calibrator:
    made = Calibrator(tiny_model("qwen2"), QuantConfig(mm_tensor=False), tiny_calib)
    made.run()
    return made


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_safe_tensor_files(calibrator: Calibrator, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    calibrator.save(str(target), save_type=["safe_tensor"])
    weights = "quant_model_weight_w8a8.safetensors"
    description = "quant_model_description_w8a8.json"
    assert names(target) == {weights, description}
    assert (mode(target), mode(target / weights), mode(target / description)) == (
        0o750,
        0o400,
        0o600,
    )
    content = json.loads((target / description).read_text())
    tensors = open_checkpoint(target).tensors
    assert content.keys() == tensors.keys() | {"model_quant_type"}
    assert content["model_quant_type"] == "W8A8"
    for name, kind in content.items():
        if any(part in name for part in ("norm", "embed", "lm_head")):
            assert kind == "FLOAT"


def test_ascend_v1_files(calibrator: Calibrator, tmp_path: Path) -> None:
    target = tmp_path / "out"
    calibrator.save(str(target), save_type=["ascendV1"])
    assert names(target) == {"quant_model_weight_w8a8.safetensors", "quant_model_description.json"}
    content = json.loads((target / "quant_model_description.json").read_text())
    assert content["version"] == "1.0.0"
    assert content["group_size"] == 0
    assert verify_checkpoint(target).sound


@pytest.mark.parametrize("given", [None, []])
def test_safe_tensor_is_the_default(calibrator: Calibrator, tmp_path: Path, given: Any) -> None:
    calibrator.save(str(tmp_path / "out"), save_type=given)
    assert "quant_model_weight_w8a8.safetensors" in names(tmp_path / "out")


def test_group_size_is_an_integer(tiny_model: Factory, tmp_path: Path) -> None:
    config = QuantConfig(a_bit=16, is_lowbit=True, open_outlier=False, group_size=32)
    made = Calibrator(tiny_model("llama"), config)
    made.run()
    made.save(str(tmp_path / "out"), save_type=["ascendV1"])
    content = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert content["group_size"] == 32
    assert content["model_quant_type"] == "W8A16"


def test_numpy_and_safe_tensor_hold_the_same(calibrator: Calibrator, tmp_path: Path) -> None:
    calibrator.save(str(tmp_path / "out"), save_type=["numpy", "safe_tensor"])
    stored = open_checkpoint(tmp_path / "out")
    layer = "model.layers.0.self_attn.q_proj"
    for kind in ("input_scale", "input_offset", "quant_bias", "deq_scale", "weight_scale"):
        content = load_npy_dict(tmp_path / "out" / f"{kind}.npy")
        np.testing.assert_array_equal(content[layer], stored.load(f"{layer}.{kind}"))
    codes = load_npy_dict(tmp_path / "out" / "quant_weight.npy")[layer]
    np.testing.assert_array_equal(codes, stored.load(f"{layer}.weight"))  # not its bias
    assert mode(tmp_path / "out" / "quant_weight.npy") == 0o400
    # As users of the classic format read it.
    plain = np.load(tmp_path / "out" / "quant_weight.npy", allow_pickle=True).item()
    assert isinstance(plain[layer], torch.Tensor)


def test_ascend_v1_goes_alone(calibrator: Calibrator, tmp_path: Path) -> None:
    calibrator.save(str(tmp_path / "out"), save_type=["numpy", "ascendV1", "safe_tensor"])
    assert names(tmp_path / "out") == {
        "quant_model_weight_w8a8.safetensors",
        "quant_model_description.json",
    }


def test_names_may_be_given(calibrator: Calibrator, tmp_path: Path) -> None:
    calibrator.save(str(tmp_path / "out"), "mine.safetensors", "mine.json", ["safe_tensor"])
    assert names(tmp_path / "out") == {"mine.safetensors", "mine.json"}


def test_parts(calibrator: Calibrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "_GIB", 20_000)
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"], part_file_size=2)
    found = names(tmp_path / "out")
    parts = sorted(name for name in found if name.endswith(".safetensors"))
    count = len(parts)
    assert count > 2
    prefix = "quant_model_weight_w8a8"
    assert parts == [f"{prefix}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / f"{prefix}.safetensors.index.json").read_text())
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert verify_checkpoint(tmp_path / "out").sound


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"output_path": Path("out")}, InvalidTypeError, "output_path"),
        ({"output_path": 3}, InvalidTypeError, "output_path"),
        ({"output_path": ""}, SlimError, "output_path"),
        ({"save_type": "safe_tensor"}, InvalidTypeError, "save_type"),
        ({"save_type": ["safetensor"]}, InvalidValueError, "did you mean 'safe_tensor'"),
        ({"save_type": [None]}, InvalidTypeError, "save_type"),
        ({"safetensors_name": "weights"}, InvalidValueError, r"\.safetensors"),
        ({"safetensors_name": "../x.safetensors"}, InvalidValueError, "file name"),
        ({"safetensors_name": 3}, InvalidTypeError, "safetensors_name"),
        ({"json_name": "description.txt"}, InvalidValueError, r"\.json"),
        ({"part_file_size": 0}, InvalidValueError, "part_file_size"),
        ({"part_file_size": 4.0}, InvalidTypeError, "part_file_size"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_written(
    calibrator: Calibrator,
    tmp_path: Path,
    given: dict[str, Any],
    error: type[SlimError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        calibrator.save(**{"output_path": str(tmp_path / "out"), **given})
    assert not (tmp_path / "out").exists()


def test_before_run_there_is_nothing_to_save(tiny_model: Factory, tmp_path: Path) -> None:
    made = Calibrator(tiny_model("llama"), QuantConfig(a_bit=16))
    with pytest.raises(InvalidValueError, match=r"call run\(\) before save\(\)"):
        made.save(str(tmp_path / "out"))


def test_a_file_in_the_place_of_the_directory(calibrator: Calibrator, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("here")
    with pytest.raises(OutputExistsError, match="not a directory"):
        calibrator.save(str(tmp_path / "out"))


def test_saving_again_replaces_the_files_and_keeps_others(
    calibrator: Calibrator, tmp_path: Path
) -> None:
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "config.json").write_text("{}")
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    for name, content in before.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert names(tmp_path / "out") == before.keys() | {"config.json"}


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("error", [Interrupted(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_is_cut_short_leaves_no_half_checkpoint(
    calibrator: Calibrator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    existing: bool,
) -> None:
    target = tmp_path / "out"
    before: dict[str, bytes] = {}
    if existing:
        calibrator.save(str(target), save_type=["ascendV1"])
        before = {file.name: file.read_bytes() for file in target.iterdir()}
    add = export.ShardWriter.add
    calls = 0

    def failing(self: Any, name: str, array: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise error
        add(self, name, array)

    monkeypatch.setattr(export.ShardWriter, "add", failing)
    with pytest.raises(type(error)):
        calibrator.save(str(target), save_type=["ascendV1"])
    if existing:
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_failing_description_takes_the_new_directory_with_it(
    calibrator: Calibrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    assert list(tmp_path.iterdir()) == []
