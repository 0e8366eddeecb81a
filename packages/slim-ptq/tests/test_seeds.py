"""The classic scripts of users, with only imports, paths and device changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from slim_core.checkpoint import open_checkpoint
from slim_core.quantized import QuantizedCheckpoint
from slim_core.verify import verify_checkpoint
from slim_ptq import CalibrationData, Calibrator, LayerSelector, PrecisionTest, QuantConfig
from slim_ptq.modules import FakeQuantLinear

PROMPTS = [
    "Which city is the capital of the country?",
    "Please write a poem:",
    "I want to learn a programming language, how do I start?",
    "Please write a report about making language models fast:",
    "The places most worth a visit",
]


@pytest.fixture(scope="module")
def model_path(
    saved_model: Callable[..., Path],
    letter_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a directory like that of ChatGLM2: remote code, weights, tokenizer of bytes."""
    path = Path(
        shutil.copytree(saved_model("chatglm"), tmp_path_factory.mktemp("glm") / "chatglm2")
    )
    letter_tokenizer.save_pretrained(path)
    return path


def prepare(path: Path) -> tuple[Any, list[list[torch.Tensor]]]:
    """Load model and tokenizer and make the calibration data, as the scripts do."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=True)
    model = AutoModel.from_pretrained(
        path, local_files_only=True, trust_remote_code=True, torch_dtype=torch.float32
    )
    dataset_calib = []
    for prompt in PROMPTS:
        inputs = tokenizer([prompt], return_tensors="pt").to(model.device)
        dataset_calib.append([inputs.data["input_ids"], inputs.data["attention_mask"]])
    return model, dataset_calib


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_w8a8(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, dataset_calib = prepare(model_path)
    first = "transformer.encoder.layers.0"
    quant_config = QuantConfig(
        a_bit=8,
        w_bit=8,
        disable_names=[
            f"{first}.self_attention.query_key_value",
            f"{first}.self_attention.dense",
            f"{first}.mlp.dense_h_to_4h",
        ],
        dev_id=model.device.index,
        dev_type="cpu",
        act_method=3,
        pr=0.5,
        mm_tensor=False,
    )
    with torch.no_grad():
        expected = model(dataset_calib[0][0]).logits
    calibrator = Calibrator(model, quant_config, calib_data=dataset_calib, disable_level="L0")
    calibrator.run()
    calibrator.save("./quant_weight", save_type=["numpy", "safe_tensor"])

    with torch.no_grad():
        found = model(dataset_calib[0][0]).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    out = tmp_path / "quant_weight"
    assert {file.name for file in out.iterdir()} == {
        "quant_model_weight_w8a8.safetensors",
        "quant_model_description_w8a8.json",
        *(f"{kind}.npy" for kind in ("quant_weight", "quant_bias", "deq_scale", "fp_bias")),
        *(f"{kind}.npy" for kind in ("input_scale", "input_offset", "anti_fp_norm")),
        *(f"{kind}.npy" for kind in ("weight_scale", "weight_offset")),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["quant_weight"]
    assert verify_checkpoint(out).problems == ()
    layers = QuantizedCheckpoint(out).layers
    assert set(layers.values()) == {"W8A8"}
    assert f"{first}.mlp.dense_4h_to_h" in layers
    assert not set(quant_config.disable_names) & layers.keys()
    assert len(layers) == 5


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_sparse(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, dataset_calib = prepare(model_path)
    first = "transformer.encoder.layers.0"
    quant_config = QuantConfig(
        w_bit=4,
        disable_names=[
            f"{first}.self_attention.query_key_value",
            f"{first}.self_attention.dense",
            f"{first}.mlp.dense_h_to_4h",
        ],
        act_method=3,
        dev_type="cpu",
        dev_id=model.device.index,
        pr=2.0,
        fraction=0.011,
        nonuniform=False,
        mm_tensor=False,
        co_sparse=True,
    )
    calibrator = Calibrator(model, quant_config, calib_data=dataset_calib, disable_level="L0")
    calibrator.run()
    calibrator.save("./quant_weight")

    out = tmp_path / "quant_weight"
    assert verify_checkpoint(out).problems == ()
    stored = QuantizedCheckpoint(out)
    assert set(stored.layers.values()) == {"W8A8S"}
    assert len(stored.layers) == 5
    for name in stored.layers:
        assert np.mean(np.abs(stored.layer(name).codes) <= 7) > 0.95


@pytest.mark.parametrize("use_sigma", [False, True])
def test_sparse_tuning(
    tiny_model: Callable[..., Any],
    tiny_calib: list[list[torch.Tensor]],
    tmp_path: Path,
    use_sigma: bool,
) -> None:
    """The script of the guide to the accuracy of sparse quantization, with its defaults."""
    model = tiny_model("llama", dtype=torch.float16)
    disable_names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    quant_config = QuantConfig(
        a_bit=8,
        w_bit=4,
        disable_names=disable_names,
        dev_type="cpu",
        dev_id=model.device.index,
        is_lowbit=True,
        co_sparse=False,
        fraction=0.01,
        do_smooth=True,
        use_sigma=use_sigma,
    )
    calibrator = Calibrator(model, quant_config, calib_data=tiny_calib, disable_level="L0")
    calibrator.run()
    calibrator.save(str(tmp_path / "out"), save_type=["safe_tensor"])
    with torch.no_grad():
        assert torch.isfinite(model(tiny_calib[0][0]).logits).all()
    stored = QuantizedCheckpoint(tmp_path / "out")
    assert set(stored.layers.values()) == {"W8A8S"}
    assert len(stored.layers) == 2 * 6
    assert not set(disable_names) & stored.layers.keys()


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
@pytest.mark.parametrize("with_data", [True, False])
def test_w8a16(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_data: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model, dataset_calib = prepare(model_path)
    quant_config = QuantConfig(
        w_bit=8,
        a_bit=16,
        disable_names=[],
        dev_id=model.device.index,
        dev_type="cpu",
        w_sym=False,
        mm_tensor=False,
    )
    data = {"calib_data": dataset_calib} if with_data else {}
    calibrator = Calibrator(model, quant_config, **data, disable_level="L0")
    calibrator.run()
    calibrator.save("./quant_weight", save_type=["numpy", "safe_tensor"])

    out = tmp_path / "quant_weight"
    description = json.loads((out / "quant_model_description_w8a16.json").read_text())
    assert description["model_quant_type"] == "W8A16"
    assert verify_checkpoint(out).problems == ()
    # The weight that is stored is near that of the model on the disk.
    name = "transformer.encoder.layers.1.mlp.dense_h_to_4h"
    stored, floats = QuantizedCheckpoint(out).layer(name), open_checkpoint(model_path)
    weight = floats.load(f"{name}.weight")
    step = stored.weight_scale
    assert np.abs((stored.codes - stored.weight_offset) * step - weight).max() <= step.max()
    assert stored.weight_offset.any()
    assert isinstance(model.get_submodule(name), FakeQuantLinear)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_accuracy_before_and_after_and_layers_to_fall_back(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optional steps: layers by difficulty, accuracy on BoolQ, a mixed calibration set."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "precision_tool" / "dataset" / "boolq"
    home.mkdir(parents=True)
    lines = [
        {"title": "Ice", "passage": "Ice is cold.", "question": f"is {n}", "answer": n % 2 == 0}
        for n in range(6)
    ]
    (home / "dev.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "mix.json").write_text(
        json.dumps(
            {"configurations": [{"dataset_name": "boolq", "dataset_path": str(home / "dev.jsonl")}]}
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    model, dataset_calib = prepare(model_path)
    mixed = CalibrationData(str(tmp_path / "mix.json"), "", tokenizer)
    mixed.set_sample_size({"boolq": 3})
    for sample in mixed.process():
        inputs = tokenizer([sample["prompt"]], return_tensors="pt")
        dataset_calib.append([inputs.data["input_ids"], inputs.data["attention_mask"]])

    precision_test = PrecisionTest(model, tokenizer, "boolq", 2, "cpu")
    before = precision_test.test()
    selector = LayerSelector(model, range_method="quantile")
    selector.run(dataset_calib)
    disable_names = selector.select_layers_by_disable_level(2)
    assert 2 <= len(disable_names) < 8
    quant_config = QuantConfig(disable_names=disable_names, dev_type="cpu", mm_tensor=False)
    Calibrator(model, quant_config, calib_data=dataset_calib, disable_level="L0").run()
    after = PrecisionTest(model, tokenizer, "boolq", 2, "cpu").test()
    assert (before.metric, before.count) == (after.metric, after.count) == ("accuracy", 6)
    assert abs(after.value - before.value) <= 0.5  # random weights: three answers may change
    assert not any(isinstance(model.get_submodule(n), FakeQuantLinear) for n in disable_names)
