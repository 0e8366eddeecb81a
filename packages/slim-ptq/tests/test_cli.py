"""Tests of the command line: what it prints, its exit codes, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from slim_core.checkpoint import open_checkpoint
from slim_core.verify import verify_checkpoint
from slim_ptq import __version__
from slim_ptq.cli import app

Factory = Callable[..., Any]
EXAMPLES = Path(__file__).parents[3] / "examples"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory, tiny_ids: Factory) -> Path:
    file = tmp_path_factory.mktemp("calib") / "calib.jsonl"
    lines = [json.dumps({"input_ids": tiny_ids(24, seed=n)[0].tolist()}) for n in range(6)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def quantized(saved_model: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cli") / "out"
    assert run("quantize", saved_model("llama"), target, "--scheme", "w8a16").exit_code == 0
    return target


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from slim_ptq.cli import app\n"
        "try:\n"
        "    app(['quantize', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--scheme" in result.stdout


def test_as_a_module(quantized: Path) -> None:
    command = [sys.executable, "-m", "slim_ptq", "verify", str(quantized)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{quantized}: 14 layers, 49 tensors: sound\n"


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"slim-ptq {__version__}\n")


class TestQuantize:
    def test_static(self, saved_model: Factory, calib: Path, tmp_path: Path) -> None:
        target = tmp_path / "out"
        result = run(
            "quantize",
            saved_model("llama"),
            target,
            "--calib",
            calib,
            "--samples",
            4,
            "--length",
            16,
        )
        assert result.exit_code == 0, result.output
        assert "w8a8" in result.stdout
        assert result.stdout.endswith(f"written to {target}\n")
        assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1])
        assert verify_checkpoint(target).sound
        report = json.loads((target / "slim_report.json").read_text())
        assert report["calibration"]["samples"] == 4
        assert report["calibration"]["tokens"] == 64

    def test_json(self, saved_model: Factory, tmp_path: Path) -> None:
        result = run(
            "quantize", saved_model("llama"), tmp_path / "out", "--scheme", "w8a16", "--json"
        )
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert report["scheme"] == "w8a16"
        assert len(report["layers"]) == 14

    def test_a_stream_of_json(self, saved_model: Factory, tmp_path: Path) -> None:
        result = run(
            *("quantize", saved_model("llama"), tmp_path / "out", "--scheme", "w8a16"),
            *("--events", "-"),
        )
        assert result.exit_code == 0
        *steps, report = map(json.loads, result.stdout.splitlines())
        stages = [step["stage"] for step in steps]
        assert stages.count("Quantizing weights") == steps[0]["total"]
        assert "Verifying" in stages
        assert report == json.loads((tmp_path / "out" / "slim_report.json").read_text())

    def test_recipe(self, saved_model: Factory, calib: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("scheme: w8a8_dynamic\nexclude: ['*.down_proj']\nformat: safe_tensor\n")
        target = tmp_path / "out"
        result = run("quantize", saved_model("llama"), target, "--recipe", recipe)
        assert result.exit_code == 0, result.output
        description = json.loads((target / "quant_model_description_w8a8_dynamic.json").read_text())
        assert description["model.layers.0.mlp.down_proj.weight"] == "FLOAT"
        assert description["model.layers.0.mlp.up_proj.weight"] == "W8A8_DYNAMIC"

    def test_the_directory_is_what_engines_need(
        self, quantized: Path, saved_model: Factory
    ) -> None:
        assert {file.name for file in quantized.iterdir()} >= {
            "config.json",
            "generation_config.json",
            "quant_model_description.json",
            "quant_model_weight_w8a16.safetensors",
            "slim_recipe.yaml",
            "slim_report.json",
            "slim_report.html",
        }
        assert not list(quantized.glob("*index.json"))
        assert "quantization_config" not in json.loads((quantized / "config.json").read_text())
        assert quantized.stat().st_mode & 0o777 == 0o750
        weights = quantized / "quant_model_weight_w8a16.safetensors"
        assert weights.stat().st_mode & 0o777 == 0o400

    @pytest.mark.parametrize(
        ("args", "code", "says"),
        [
            (["--scheme", "w8a9"], 2, "known are w8a8"),
            (["--scheme", "w8a8"], 2, "need calibration data"),
            (["--scheme", "w8a16", "--format", "gguf"], 2, "format"),
            (["--scheme", "w8a16", "--device", "tpu"], 2, "device"),
            (["--recipe", "none.yaml"], 1, "none.yaml"),
            (["--calib", "none.jsonl"], 1, "none.jsonl"),
            (["--samples", "many"], 2, "samples"),
            (["--unknown"], 2, "unknown"),
        ],
    )
    def test_mistakes(
        self, saved_model: Factory, tmp_path: Path, args: list[str], code: int, says: str
    ) -> None:
        result = run("quantize", saved_model("llama"), tmp_path / "out", *args)
        assert result.exit_code == code
        assert says in result.stderr
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()

    def test_an_output_that_is_there(self, saved_model: Factory, quantized: Path) -> None:
        result = run("quantize", saved_model("llama"), quantized, "--scheme", "w8a16")
        assert result.exit_code == 2
        assert "--overwrite" in result.stderr
        again = run("quantize", saved_model("llama"), quantized, "--scheme", "w8a16", "--overwrite")
        assert again.exit_code == 0

    def test_remote_code(self, saved_model: Factory, calib: Path, tmp_path: Path) -> None:
        args = ("quantize", saved_model("chatglm"), tmp_path / "out", "--calib", calib)
        refused = run(*args)
        assert refused.exit_code == 1
        assert "--trust-remote-code" in refused.stderr
        assert run(*args, "--trust-remote-code").exit_code == 0

    def test_a_missing_model(self, tmp_path: Path) -> None:
        result = run("quantize", tmp_path / "nowhere", tmp_path / "out", "--scheme", "w8a16")
        assert result.exit_code == 1
        assert "nowhere" in result.stderr


class TestPlan:
    def test_table(self, saved_model: Factory) -> None:
        result = run("plan", saved_model("llama"))
        assert result.exit_code == 0, result.output
        assert "model.layers.1.mlp.down_proj" in result.stdout
        assert "needs calibration data" in result.stdout

    def test_json(self, saved_model: Factory) -> None:
        result = run("plan", saved_model("qwen3_moe"), "--json")
        found = json.loads(result.stdout)
        schemes = {layer["name"]: layer["scheme"] for layer in found["layers"]}
        assert schemes["model.layers.0.self_attn.q_proj"] == "w8a8"
        assert schemes["model.layers.0.mlp.experts.3.up_proj"] == "w8a8_dynamic"
        assert found["bytes_after"] < found["bytes_before"]

    def test_sizes_are_those_of_the_files(self, saved_model: Factory, quantized: Path) -> None:
        result = run("plan", saved_model("llama"), "--scheme", "w8a16", "--json")
        found = json.loads(result.stdout)
        actual = sum(info.nbytes for info in open_checkpoint(quantized).tensors.values())
        assert found["bytes_after"] == actual

    def test_problems(self, saved_model: Factory) -> None:
        result = run("plan", saved_model("llama"), "--scheme", "w8a16_g48")
        assert result.exit_code == 2
        assert "model.layers.0.mlp.down_proj cannot be w8a16_g48" in result.stderr


class TestVerify:
    def test_json(self, quantized: Path) -> None:
        result = run("verify", quantized, "--json")
        assert json.loads(result.stdout) == {"sound": True, "problems": []}

    def test_damage(self, quantized: Path, tmp_path: Path) -> None:
        import shutil

        broken = Path(shutil.copytree(quantized, tmp_path / "broken"))
        file = broken / "quant_model_description.json"
        content = json.loads(file.read_text())
        del content["lm_head.weight"]
        file.write_text(json.dumps(content))
        result = run("verify", broken)
        assert result.exit_code == 1
        assert "problem: lm_head.weight is not in the description" in result.stdout
        assert json.loads(run("verify", broken, "--json").stdout)["sound"] is False

    def test_not_a_quantized_directory(self, saved_model: Factory) -> None:
        result = run("verify", saved_model("llama"))
        assert result.exit_code == 1
        assert "no description" in result.stderr


def test_dequantize(quantized: Path, saved_model: Factory, tmp_path: Path) -> None:
    result = run("dequantize", quantized, tmp_path / "float")
    assert result.exit_code == 0, result.output
    before, after = open_checkpoint(saved_model("llama")), open_checkpoint(tmp_path / "float")
    assert before.tensors.keys() == after.tensors.keys()
    assert {i.shape for i in after.tensors.values()} == {i.shape for i in before.tensors.values()}
    again = run("dequantize", quantized, tmp_path / "float")
    assert again.exit_code == 2
    assert "not empty" in again.stderr
    assert run("dequantize", quantized, tmp_path / "float", "--overwrite").exit_code == 0


class TestExample:
    """The model, the calibration text and the evaluation text that come with the repository."""

    def test_w8a8_and_back(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        model, target = EXAMPLES / "tiny-llama", tmp_path / "out"
        result = run(
            *("quantize", model, target, "--calib", EXAMPLES / "calib.jsonl", "--samples", 8),
            *("--length", 128, "--eval", EXAMPLES / "eval.txt", "--json"),
        )
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        before, after = report["perplexity_before"], report["perplexity_after"]
        assert after == pytest.approx(before, rel=0.01)
        assert after != before
        shown = run("evaluate", target, EXAMPLES / "eval.txt", "--json")
        assert json.loads(shown.stdout)["perplexity"] == pytest.approx(after, rel=1e-6)
        text = run("evaluate", target, EXAMPLES / "eval.txt")
        assert text.stdout.startswith("perplexity ")
        assert "Loading" not in capfd.readouterr().err + text.stderr

    def test_the_plan_fits_80_columns(self) -> None:
        result = run("plan", EXAMPLES / "tiny-llama")
        assert result.exit_code == 0
        assert all(len(line.rstrip()) <= 80 for line in result.stdout.splitlines())


def test_progress_bars_are_on_again_afterwards(quantized: Path, tmp_path: Path) -> None:
    from transformers.utils import logging

    text = tmp_path / "text.txt"
    text.write_text("x")
    logging.enable_progress_bar()
    run("evaluate", quantized, text)
    assert logging.is_progress_bar_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("command", ["evaluate", "eval"])
def test_accuracy_of_a_task(spelling_model: Path, tmp_path: Path, command: str) -> None:
    lines = [{"passage": "ab", "question": f"is {n}", "answer": True} for n in range(3)]
    lines += [{**lines[0], "answer": False}]  # one of the two must be wrong
    file = tmp_path / "dev.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    shown = run(command, spelling_model, file, "--task", "boolq", "--json")
    values = json.loads(shown.stdout)
    assert (values["task"], values["count"]) == ("boolq", 4)
    assert 0.25 <= values["accuracy"] <= 0.75
    text = run(command, spelling_model, file, "--task", "boolq", "--questions", 2)
    assert text.stdout.endswith("on 2 questions of dev.jsonl (boolq)\n")
    assert run(command, spelling_model, file, "--task", "boolk").exit_code == 2
