"""Mistakes and damage: typed errors that name the thing at fault, and no half-written output."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.checkpoint import ShardWriter
from slim_core.errors import (
    CalibrationError,
    CheckpointError,
    DeviceError,
    FileSecurityError,
    InvalidTypeError,
    InvalidValueError,
    NumericalError,
    OutputExistsError,
    PlanError,
    RecipeError,
    SlimError,
    StructureError,
)
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import dequantize, load_model, quantize
from slim_ptq.calibration.text import TokenWindows

Factory = Callable[..., Any]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def data(tiny_ids: Factory) -> TokenWindows:
    return TokenWindows((tiny_ids(16, batch=2),), "ids")


@pytest.fixture
def source(saved_model: Factory, tmp_path: Path) -> Path:
    """Return a copy of a model directory that a test may damage."""
    return Path(shutil.copytree(saved_model("llama"), tmp_path / "source"))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def left_over(directory: Path) -> list[str]:
    """Return what is in a directory beside the source model."""
    return [path.name for path in directory.iterdir() if path.name != "source"]


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "error", "says"),
        [
            ({"scheme": "w8a9"}, RecipeError, "scheme.*known are w8a8"),
            ({"scheme": "w8a8_dynamc"}, RecipeError, "did you mean 'w8a8_dynamic'"),
            ({"scheme": 8}, RecipeError, "scheme"),
            ({"format": "gguf"}, RecipeError, "format must be one of"),
            ({"device": "tpu"}, InvalidValueError, "device must be one of"),
            ({"device": "cuda:0"}, DeviceError, "no cuda device"),
            ({"max_shard_gib": 0}, InvalidValueError, "max_shard_gib"),
            ({"samples": 0, "calibration": ["a"]}, InvalidValueError, "samples"),
            ({"length": "long"}, InvalidTypeError, "length"),
            ({"batch": 0, "calibration": ["a"]}, InvalidValueError, "batch"),
            ({"output": 3}, InvalidTypeError, "output"),
            ({"model": None}, InvalidTypeError, "model"),
            ({"model": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
            ({"scheme": "w8a8", "recipe": Recipe.build()}, RecipeError, "not both"),
            ({}, PlanError, "static activation schemes need calibration data"),
            ({"scheme": "w8a16", "text": "/no/such/text"}, FileNotFoundError, "/no/such/text"),
        ],
    )
    def test_each_is_found_before_any_work(
        self,
        saved_model: Factory,
        tmp_path: Path,
        given: dict[str, Any],
        error: type[Exception],
        says: str,
    ) -> None:
        if given.get("device") == "cuda:0" and torch.cuda.is_available():
            pytest.skip("there is a cuda device")
        with pytest.raises(error, match=says):
            quantize(**{"model": saved_model("llama"), "output": tmp_path / "out", **given})
        assert left_over(tmp_path) == []

    @pytest.mark.parametrize(
        ("recipe", "says"),
        [
            ({"exclude": ["*.dwn_proj"]}, "dwn_proj"),
            ({"rules": [{"match": "lm_head", "scheme": "w8a16"}]}, "lm_head"),
            ({"scheme": "w8a16_g48"}, f"{DOWN} cannot be w8a16_g48"),
            ({"rules": [{"match": "*q_proj", "scheme": "float"}]}, "share one scheme"),
            ({"exclude": ["*"]}, "leaves every layer in floating point"),
            (
                {"scheme": "w8a16_g32", "rules": [{"match": "*o_proj", "scheme": "w8a16_g64"}]},
                r"one group size.*\[32, 64\]",
            ),
        ],
    )
    def test_all_problems_of_a_plan_are_listed(
        self, saved_model: Factory, data: TokenWindows, tmp_path: Path, recipe: Any, says: str
    ) -> None:
        with pytest.raises(PlanError, match=says):
            quantize(
                saved_model("llama"),
                tmp_path / "out",
                recipe=Recipe.build(**recipe),
                calibration=data,
            )
        assert left_over(tmp_path) == []

    def test_one_run_names_every_mistake(self, saved_model: Factory, tmp_path: Path) -> None:
        recipe = Recipe.build(scheme="w8a16_g48", exclude=["*.foo", "*.bar"])
        with pytest.raises(PlanError) as caught:
            quantize(saved_model("llama"), tmp_path / "out", recipe=recipe)
        assert len(caught.value.problems) >= 4

    def test_smoothing_and_fallback_need_data(self, saved_model: Factory, tmp_path: Path) -> None:
        for recipe in ({"smooth": {}}, {"fallback": 2}):
            with pytest.raises(PlanError, match="calibration data"):
                quantize(
                    saved_model("llama"),
                    tmp_path / "out",
                    recipe=Recipe.build(scheme="w8a8_dynamic", **recipe),
                )


class TestTokenWindows:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "is empty"),
            ("\n\n", "is empty"),
            ('{"input_ids": [1, 2]}\n{"input_ids": [1,', "line 2: not JSON"),
            ('{"input_ids": [1, 2]}\n\n[1, 2]\n', "line 3: must be a JSON object, not list"),
            ('{"input_ids": [1]}\n{"prompt": "x"}', "line 2: must have one of text, messages"),
            ('{"text": ""}', "line 1: must have one of"),
            ('{"text": 3}', "line 1: text must be a str"),
            ('{"input_ids": 3}', "line 1: input_ids must be a list of token numbers"),
            ('{"input_ids": [1, -1]}', "line 1: input_ids"),
            ('{"input_ids": [1, true]}', "line 1: input_ids"),
            ('{"input_ids": [1, 2.5]}', "line 1: input_ids"),
            ('{"input_ids": [99999999999999999999]}', "line 1: input_ids"),
            ('{"messages": "hello"}', "line 1: messages must be a list"),
            ('{"messages": [{"content": "x"}]}', "line 1: messages must be a list"),
            ('{"input_ids": [5, 128]}', "token 128, and the model knows 128 tokens"),
            ('{"text": "no tokenizer here"}', "no tokenizer"),
        ],
    )
    def test_malformed_lines_are_numbered(
        self, saved_model: Factory, tmp_path: Path, content: str, says: str
    ) -> None:
        file = tmp_path / "calib.jsonl"
        file.write_text(content)
        with pytest.raises(CalibrationError, match=says):
            quantize(saved_model("llama"), tmp_path / "out", calibration=file)
        assert not (tmp_path / "out").exists()

    def test_bytes_that_are_no_text(self, saved_model: Factory, tmp_path: Path) -> None:
        file = tmp_path / "calib.txt"
        file.write_bytes(b"abc\xff\xfe")
        with pytest.raises(CalibrationError, match="not UTF-8"):
            quantize(saved_model("llama"), tmp_path / "out", calibration=file)

    @pytest.mark.parametrize("texts", [[], [""], ["a", 3]])
    def test_texts_in_memory(self, saved_model: Factory, tmp_path: Path, texts: Any) -> None:
        with pytest.raises(CalibrationError, match="calibration text"):
            quantize(saved_model("llama"), tmp_path / "out", calibration=texts)

    def test_a_missing_file(self, saved_model: Factory, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            quantize(saved_model("llama"), tmp_path / "out", calibration=tmp_path / "none.jsonl")

    def test_a_file_that_others_can_write(self, saved_model: Factory, tmp_path: Path) -> None:
        file = tmp_path / "calib.jsonl"
        file.write_text('{"input_ids": [1, 2, 3]}')
        file.chmod(0o666)
        with pytest.raises(FileSecurityError, match="can be written by others"):
            quantize(saved_model("llama"), tmp_path / "out", calibration=file)


class TestDamage:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic", "w8a16_g32"])
    def test_a_weight_that_is_not_finite(
        self, source: Path, data: TokenWindows, tmp_path: Path, value: float, scheme: str
    ) -> None:
        edit(source, lambda tensors: tensors[f"{DOWN}.weight"][3].fill_(value))
        with pytest.raises(NumericalError, match=f"the weight of {DOWN} has 128 NaN or infinite"):
            quantize(source, tmp_path / "out", scheme=scheme, calibration=data)
        assert left_over(tmp_path) == []

    def test_an_activation_that_is_not_finite(
        self, source: Path, data: TokenWindows, tmp_path: Path
    ) -> None:
        norm = "model.layers.1.post_attention_layernorm.weight"
        edit(source, lambda tensors: tensors[norm][5].fill_(float("inf")))
        with pytest.raises(
            NumericalError, match=r"the input of model\.layers\.1\.mlp\.gate_proj has"
        ):
            quantize(source, tmp_path / "out", calibration=data)
        assert left_over(tmp_path) == []

    def test_an_output_that_overflows_names_the_block(
        self, source: Path, data: TokenWindows, tmp_path: Path
    ) -> None:
        edit(source, lambda tensors: tensors[f"{DOWN}.weight"].mul_(6e38))
        with pytest.raises(NumericalError, match=r"model\.layers\.1"):
            quantize(source, tmp_path / "out", calibration=data)

    def test_a_missing_weight(self, source: Path, tmp_path: Path) -> None:
        edit(source, lambda tensors: tensors.pop(f"{DOWN}.weight"))
        with pytest.raises(CheckpointError, match=f"has no tensor {DOWN}.weight"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    def test_a_missing_norm(self, source: Path, tmp_path: Path) -> None:
        edit(source, lambda tensors: tensors.pop("model.norm.weight"))
        quantize(source, tmp_path / "out", scheme="w8a16")  # looks at linear layers only
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            load_model(tmp_path / "out")

    def test_a_weight_of_another_shape(
        self, source: Path, data: TokenWindows, tmp_path: Path
    ) -> None:
        edit(source, lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(64, 96)}))
        with pytest.raises(CheckpointError, match=f"{DOWN}.weight has shape"):
            quantize(source, tmp_path / "out", calibration=data)
        edit(source, lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(8)}))
        with pytest.raises(CheckpointError, match=f"{DOWN}.weight must be a matrix"):
            quantize(source, tmp_path / "out", calibration=data)

    def test_a_truncated_file(self, source: Path, tmp_path: Path) -> None:
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    @pytest.mark.parametrize("config", ["{", "[]", ""])
    def test_a_broken_configuration(self, source: Path, tmp_path: Path, config: str) -> None:
        (source / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    def test_no_configuration(self, source: Path, tmp_path: Path) -> None:
        (source / "config.json").unlink()
        with pytest.raises(SlimError, match=r"no config\.json"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    def test_code_of_the_model_is_not_run_unasked(
        self, saved_model: Factory, data: TokenWindows, tmp_path: Path
    ) -> None:
        with pytest.raises(StructureError, match="trust_remote_code"):
            quantize(saved_model("chatglm"), tmp_path / "out", calibration=data)

    def test_a_model_that_is_quantized_already(self, saved_model: Factory, tmp_path: Path) -> None:
        quantize(saved_model("llama"), tmp_path / "once", scheme="w8a16")
        with pytest.raises(CheckpointError, match="quantized already"):
            quantize(tmp_path / "once", tmp_path / "twice", scheme="w8a16")


class TestInputFiles:
    def test_weights_that_others_can_write(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors").chmod(0o666)
        with pytest.raises(FileSecurityError, match="can be written by others"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    def test_a_configuration_that_others_can_write(self, source: Path, tmp_path: Path) -> None:
        (source / "config.json").chmod(0o646)
        with pytest.raises(FileSecurityError, match=r"config\.json can be written by others"):
            quantize(source, tmp_path / "out", scheme="w8a16")

    def test_links_are_followed(self, source: Path, tmp_path: Path) -> None:
        cache = tmp_path / "source" / "blobs"
        cache.mkdir()
        (source / "model.safetensors").rename(cache / "abc")
        (source / "model.safetensors").symlink_to("blobs/abc")
        quantize(source, tmp_path / "out", scheme="w8a16")
        assert verify_checkpoint(tmp_path / "out").sound
        assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
        (cache / "abc").chmod(0o666)
        with pytest.raises(FileSecurityError, match="can be written by others"):
            quantize(source, tmp_path / "again", scheme="w8a16")

    def test_a_link_that_leads_nowhere(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors").unlink()
        (source / "model.safetensors").symlink_to("gone")
        with pytest.raises((FileSecurityError, CheckpointError), match=r"model\.safetensors"):
            quantize(source, tmp_path / "out", scheme="w8a16")


class TestOutput:
    def test_a_directory_with_files(self, saved_model: Factory, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(OutputExistsError, match="not empty") as caught:
            quantize(saved_model("llama"), tmp_path / "out", scheme="w8a16")
        assert isinstance(caught.value, FileExistsError)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

    def test_overwriting_replaces_all_of_it(self, saved_model: Factory, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.safetensors").write_text("old")
        quantize(saved_model("llama"), tmp_path / "out", scheme="w8a16", overwrite=True)
        assert not (tmp_path / "out" / "old.safetensors").exists()
        assert verify_checkpoint(tmp_path / "out").sound
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("where", ["source", "."])
    def test_the_model_itself_is_never_overwritten(
        self, source: Path, tmp_path: Path, where: str
    ) -> None:
        with pytest.raises(OutputExistsError, match="would be lost"):
            quantize(source, tmp_path / where, scheme="w8a16", overwrite=True)
        assert (source / "model.safetensors").exists()

    def test_dequantizing_never_overwrites_its_source(
        self, saved_model: Factory, tmp_path: Path
    ) -> None:
        quantize(saved_model("llama"), tmp_path / "out", scheme="w8a16")
        with pytest.raises(OutputExistsError, match="would be lost"):
            dequantize(tmp_path / "out", tmp_path / "out", overwrite=True)

    def test_a_file_in_its_place(self, saved_model: Factory, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("here")
        with pytest.raises(OutputExistsError, match="not a directory"):
            quantize(saved_model("llama"), tmp_path / "out", scheme="w8a16", overwrite=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_parent_that_cannot_be_written(self, saved_model: Factory, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(FileSecurityError, match="not writable"):
            quantize(saved_model("llama"), tmp_path / "closed" / "out", scheme="w8a16")


@pytest.fixture(params=["w8a8", "w8a16"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return one scheme of each pipeline."""
    return str(request.param)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")])
    def test_an_existing_output_stays_as_it_was(
        self,
        saved_model: Factory,
        data: TokenWindows,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        scheme: str,
        error: BaseException,
    ) -> None:
        target = tmp_path / "out"
        quantize(saved_model("llama"), target, scheme="w8a16")
        before = snapshot(target)
        calls = 0
        add = ShardWriter.add

        def failing_add(self: Any, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 10:
                raise error
            add(self, *args)

        monkeypatch.setattr(ShardWriter, "add", failing_add)
        with pytest.raises(type(error)):
            quantize(saved_model("llama"), target, scheme=scheme, calibration=data, overwrite=True)
        assert snapshot(target) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_full_disk(self, saved_model: Factory, tmp_path: Path) -> None:
        """A limit on the size of files makes real writes of the process fail."""
        limit = (
            "import resource, signal\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        )
        result = subprocess.run(
            child(saved_model("llama"), tmp_path / "out", prelude=limit),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 1
        message = result.stderr.strip().splitlines()[-1]
        assert "File too large" in message
        assert "quant_model_weight" in message
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]

    def test_killed_while_writing(self, saved_model: Factory, tmp_path: Path) -> None:
        slow = (  # slowed down, so that the signal comes between two tensors
            "import time\n"
            "from slim_core.export import ShardWriter\n"
            "add = ShardWriter.add\n"
            "def slow(*args):\n"
            "    print('writing', flush=True)\n"
            "    time.sleep(0.02)\n"
            "    add(*args)\n"
            "ShardWriter.add = slow\n"
        )
        target = tmp_path / "out"
        with subprocess.Popen(
            child(saved_model("llama"), target, prelude=slow),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(random.randint(1, 40)):
                assert process.stdout.readline() == "writing\n"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
        # What is left has a hidden name and does not stand in the way.
        quantize(saved_model("llama"), target, scheme="w8a16")
        assert verify_checkpoint(target).sound


def child(model: Path, target: Path, *, prelude: str) -> list[str]:
    """Return the command of a blockwise quantization in a process of its own."""
    code = (
        f"{prelude}import torch\n"
        "from slim_ptq import quantize\n"
        "from slim_ptq.calibration.text import TokenWindows\n"
        "data = TokenWindows((torch.arange(2, 34).reshape(2, 16),), 'ids')\n"
        f"quantize({str(model)!r}, {str(target)!r}, calibration=data)\n"
    )
    return [sys.executable, "-c", code]
