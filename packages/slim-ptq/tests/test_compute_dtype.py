"""In which dtype the blocks of a model run while it is calibrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import InvalidValueError, ResumeError
from slim_core.export import CheckpointExport
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.devices import compute_dtype
from slim_ptq.inventory import take_inventory
from slim_ptq.pipeline.blocks import BlockRunner

CPU = torch.device("cpu")
NORM = "model.layers.1.input_layernorm.weight"
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8", "fallback": 2, "kv_cache": {}, "rotate": {}},
    "smoothquant": {"scheme": "w8a8", "smooth": {"method": "smoothquant"}},
    "awq": {"scheme": "w4a16_g32", "smooth": {"method": "awq"}, "method": "hqq"},
    "attention": {"scheme": "w8a8", "attention": {"fallback": 1}, "observer": "histogram"},
    "gptq": {"scheme": "w4a16_g32", "method": "gptq"},
    "signround": {"scheme": "w4a16", "method": {"name": "signround", "iterations": 4}},
    "flatquant": {
        "scheme": "w4a4_flatquant_dynamic",
        "method": {"name": "flatquant", "epochs": 1},
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """Return a bfloat16 model, one norm of which is stored in float32."""
    path = tmp_path_factory.mktemp("models") / "bfloat16"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    exact = tensors[NORM].float() + torch.arange(64) * 2.0**-20
    assert not torch.equal(exact, exact.bfloat16().float())
    save_file({**tensors, NORM: exact}, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., Any]) -> TokenWindows:
    return TokenWindows(tuple(tiny_ids(16, seed=seed, batch=2) for seed in range(6)), "")


def run(source: Path, out: Path, data: TokenWindows, recipe: str = "w8a8", **options: Any) -> Any:
    return quantize(
        source, out, recipe=Recipe.build(**RECIPES[recipe]), calibration=data, **options
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_the_bits_give_much_the_same_checkpoint(
    source: Path, data: TokenWindows, tmp_path: Path, recipe: str
) -> None:
    run(source, tmp_path / "float32", data, recipe)
    report = run(source, tmp_path / "bfloat16", data, recipe, dtype="bfloat16")
    assert report.provenance["device"] == "cpu"
    assert report.provenance["dtype"] == "bfloat16"
    assert verify_checkpoint(tmp_path / "bfloat16").sound
    exact, found = (open_checkpoint(tmp_path / name) for name in ("float32", "bfloat16"))
    assert found.tensors.keys() == exact.tensors.keys()
    differs = False
    for name, info in found.tensors.items():
        assert (info.dtype, info.shape) == (exact.tensors[name].dtype, exact.tensors[name].shape)
        one, other = (np.asarray(part.load(name), np.float64) for part in (found, exact))
        differs |= not np.array_equal(one, other)
        if name.endswith(("input_scale", "kv_cache_scale")):
            np.testing.assert_allclose(one, other, rtol=0.03)
    assert differs or recipe == "awq"  # whose choice is among a few strengths


def test_what_nothing_edits_stays_what_is_stored(
    source: Path, data: TokenWindows, tmp_path: Path
) -> None:
    recipe = Recipe.build(scheme="w8a8", rules=[{"match": "*o_proj", "scheme": "float"}])
    quantize(source, tmp_path / "out", recipe=recipe, calibration=data, dtype="bfloat16")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    kept = [name for name in before.tensors if "norm" in name or "o_proj" in name]
    assert NORM in kept
    for name in kept:
        assert after.tensors[name].dtype == before.tensors[name].dtype
        np.testing.assert_array_equal(after.load(name), before.load(name))


def test_blocks_and_hidden_states_are_in_it(source: Path, data: TokenWindows) -> None:
    checkpoint = open_checkpoint(source)
    runner = BlockRunner(checkpoint, take_inventory(checkpoint), data, CPU, dtype=torch.bfloat16)
    with runner.loaded(1) as block:
        assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
        assert runner.example(1)[0][0].dtype == torch.bfloat16


def test_float32_by_name_is_what_the_cpu_does(
    source: Path, data: TokenWindows, tmp_path: Path
) -> None:
    run(source, tmp_path / "auto", data)
    run(source, tmp_path / "named", data, dtype="float32")
    for file in tmp_path.glob("auto/*.safetensors"):
        assert file.read_bytes() == (tmp_path / "named" / file.name).read_bytes()


class TestRefused:
    @pytest.mark.parametrize(
        ("dtype", "says"),
        [
            ("bf16", "dtype must be one of 'auto', 'float32', 'float16', 'bfloat16', not 'bf16'"),
            ("float16", "dtype must be float32 or bfloat16 for a model in bfloat16, not float16"),
        ],
    )
    def test_dtypes(
        self, source: Path, data: TokenWindows, tmp_path: Path, dtype: str, says: str
    ) -> None:
        with pytest.raises(InvalidValueError, match=says):
            run(source, tmp_path / "out", data, dtype=dtype)
        assert not list(tmp_path.iterdir())

    def test_less_than_the_model_has(
        self, saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
    ) -> None:
        with pytest.raises(InvalidValueError, match="dtype must be float32 for a model in float32"):
            run(saved_model("llama"), tmp_path / "out", data, dtype="bfloat16")

    def test_going_on_in_another_one(
        self,
        source: Path,
        data: TokenWindows,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(self: CheckpointExport) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointExport, "finish", full)
            with pytest.raises(OSError, match="No space"):
                run(source, tmp_path / "out", data, dtype="bfloat16")
        with pytest.raises(ResumeError, match="dtype"):
            run(source, tmp_path / "out", data, resume=True)
        run(source, tmp_path / "out", data, dtype="bfloat16", resume=True)


@pytest.mark.parametrize(
    ("device", "name", "expected"),
    [
        ("cpu", "auto", torch.float32),
        ("cuda:0", "auto", torch.float16),
        ("cuda:0", "float32", torch.float32),
        ("cpu", "float16", torch.float16),
    ],
)
def test_choice(device: str, name: str, expected: torch.dtype) -> None:
    assert compute_dtype(name, torch.device(device), "float16") == expected
