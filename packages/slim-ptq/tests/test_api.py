"""Tests of the modern calls: quantize, plan, load, evaluate and dequantize directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import slim_ptq
from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError, FormatError, PlanError, StructureError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import (
    AntiOutlier,
    AntiOutlierConfig,
    Calibrator,
    QuantConfig,
    dequantize,
    evaluate_text,
    load_model,
    quantize,
)
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.prepare import prepare

Factory = Callable[..., Any]
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def data(tiny_ids: Factory) -> TokenWindows:
    return TokenWindows((tiny_ids(16, seed=1, batch=4),), "ids")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


class TestPackage:
    def test_public_names(self) -> None:
        for name in slim_ptq.__all__:
            assert getattr(slim_ptq, name) is not None
            assert not isinstance(getattr(slim_ptq, name), type(sys)), f"{name} is a module"
        assert set(dir(slim_ptq)) >= set(slim_ptq.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = slim_ptq.nothing

    def test_importing_does_nothing(self) -> None:
        code = (
            "import logging, sys\n"
            "import slim_ptq\n"
            "assert 'torch' not in sys.modules\n"
            "assert not logging.getLogger().handlers\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


class TestQuantize:
    def test_the_report(self, saved_model: Factory, data: TokenWindows, tmp_path: Path) -> None:
        source = saved_model("qwen2")
        report = quantize(source, tmp_path / "out", calibration=data)
        assert report.scheme == "w8a8"
        assert report.format == "ascend_v1"
        assert [layer.name for layer in report.layers][:2] == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
        ]
        assert len(report.layers) == 14
        files = [*source.glob("*.safetensors")]
        assert report.bytes_before == sum(file.stat().st_size for file in files)
        written = (tmp_path / "out").glob("*.safetensors")
        assert report.bytes_after == sum(file.stat().st_size for file in written)
        for layer in report.layers:
            assert 0 < layer.weight_error < 0.02
            assert layer.output_error is not None
            assert 0 < layer.output_error < 0.1
        saved = json.loads((tmp_path / "out" / "slim_report.json").read_text())
        assert saved == json.loads(report.to_json())

    def test_parts(
        self, saved_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from slim_ptq import api

        monkeypatch.setattr(api, "_GIB", 50_000)
        quantize(saved_model("llama"), tmp_path / "out", scheme="w8a16", max_shard_gib=1)
        parts = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
        assert len(parts) > 1
        assert parts[0].startswith("quant_model_weight_w8a16-00001-of-")
        assert verify_checkpoint(tmp_path / "out").sound
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()

    def test_a_sharded_source(self, tiny_model: Factory, tmp_path: Path) -> None:
        model = tiny_model("llama")
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
        assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
        for name in ("whole", "parts"):
            quantize(tmp_path / name, tmp_path / f"{name}_out", scheme="w8a16")
        one, other = (open_checkpoint(tmp_path / f"{name}_out") for name in ("whole", "parts"))
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            np.testing.assert_array_equal(one.load(name), other.load(name))
        assert verify_checkpoint(tmp_path / "parts_out").sound

    def test_a_source_of_bin_files(
        self, saved_model: Factory, data: TokenWindows, tmp_path: Path
    ) -> None:
        source = saved_model("llama")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "config.json").write_bytes((source / "config.json").read_bytes())
        torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
        for scheme in ("w8a8", "w8a16"):
            for name, path in (("a", source), ("b", tmp_path / "bin")):
                quantize(path, tmp_path / f"{name}{scheme}", scheme=scheme, calibration=data)
            one, other = (open_checkpoint(tmp_path / f"{name}{scheme}") for name in "ab")
            assert one.tensors.keys() == other.tensors.keys()
            for name in one.tensors:
                np.testing.assert_array_equal(one.load(name), other.load(name))

    def test_side_files_come_along(self, tmp_path: Path) -> None:
        quantize(EXAMPLES / "tiny-llama", tmp_path / "out", scheme="w8a16")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            source = EXAMPLES / "tiny-llama" / name
            assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()

    def test_texts_as_calibration(self, tmp_path: Path) -> None:
        report = quantize(
            EXAMPLES / "tiny-llama",
            tmp_path / "out",
            calibration=["Once upon a time there was a king. " * 20],
            samples=2,
            length=32,
        )
        assert report.calibration == {"source": "texts", "samples": 2, "tokens": 64}

    def test_the_recipe_is_written_and_gives_the_same_again(
        self, saved_model: Factory, tmp_path: Path
    ) -> None:
        recipe = Recipe.build(scheme="w8a16_g32", exclude=["*.0.mlp.down_proj"])
        quantize(saved_model("llama"), tmp_path / "one", recipe=recipe)
        quantize(saved_model("llama"), tmp_path / "two", recipe=tmp_path / "one/slim_recipe.yaml")
        name = "quant_model_weight_w8a16.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
    def test_float_format_is_the_model_that_the_codes_stand_for(
        self, saved_model: Factory, tiny_ids: Factory, tmp_path: Path, family: str
    ) -> None:
        quantize(saved_model(family), tmp_path / "codes", scheme="w8a16")
        quantize(saved_model(family), tmp_path / "float", scheme="w8a16", format="float")
        dequantize(tmp_path / "codes", tmp_path / "back")
        one, other = open_checkpoint(tmp_path / "float"), open_checkpoint(tmp_path / "back")
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            np.testing.assert_array_equal(one.load(name), other.load(name))
        ids = tiny_ids(16)
        torch.testing.assert_close(
            logits(load_model(tmp_path / "float"), ids),
            logits(load_model(tmp_path / "codes"), ids),
        )


class TestPrepare:
    def test_a_plan_needs_no_data(self, saved_model: Factory) -> None:
        job = prepare(saved_model("llama"), scheme="w8a8", plan_only=True)
        assert job.plan.needs_calibration
        assert job.blockwise
        assert job.data is None
        assert all(parameter.is_meta for parameter in job.inventory.model.parameters())

    @pytest.mark.parametrize(
        ("recipe", "blockwise"),
        [
            ({"scheme": "w8a16"}, False),
            ({"scheme": "w8a8_dynamic"}, False),
            ({"scheme": "w8a8"}, True),
            ({"scheme": "w8a16", "fallback": 1}, True),
            ({"scheme": "w8a16", "smooth": {}}, True),
        ],
    )
    def test_which_pipeline(
        self, saved_model: Factory, data: TokenWindows, recipe: Any, blockwise: bool
    ) -> None:
        job = prepare(saved_model("llama"), recipe=Recipe.build(**recipe), calibration=data)
        assert job.blockwise is blockwise

    def test_a_format_beside_a_recipe(self, saved_model: Factory) -> None:
        job = prepare(
            saved_model("llama"), recipe=Recipe.build(scheme="w8a16"), format="safe_tensor"
        )
        assert job.plan.format == "safe_tensor"

    @pytest.mark.parametrize("family", ["gpt2", "llama"])  # two names of the setting
    def test_windows_are_no_longer_than_the_model_can_place(
        self, saved_model: Factory, tmp_path: Path, family: str
    ) -> None:
        file = tmp_path / "c.jsonl"
        file.write_text(json.dumps({"input_ids": [5] * 300}))
        job = prepare(saved_model(family), scheme="w8a8", calibration=file)
        assert job.data is not None
        assert [tuple(batch.shape) for batch in job.data.batches] == [(2, 128)]
        job = prepare(saved_model(family), scheme="w8a8", calibration=file, length=50)
        assert job.data is not None
        assert job.data.batches[0].shape[1] == 50

    def test_the_plan_lists_problems_without_data(self, saved_model: Factory) -> None:
        with pytest.raises(PlanError, match="need calibration data"):
            prepare(saved_model("llama"))


class TestLoad:
    def test_a_float_directory(
        self, saved_model: Factory, tiny_model: Factory, tiny_ids: Factory
    ) -> None:
        ids = tiny_ids(16)
        found = logits(load_model(saved_model("qwen2")), ids)
        torch.testing.assert_close(found, logits(tiny_model("qwen2"), ids))

    def test_it_generates(self, saved_model: Factory, tiny_ids: Factory, tmp_path: Path) -> None:
        quantize(saved_model("llama"), tmp_path / "out", scheme="w8a8_dynamic")
        model = load_model(tmp_path / "out")
        ids = model.generate(tiny_ids(5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert ids.shape == (1, 9)

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot load"):
            load_model(tmp_path)

    def test_a_layer_that_the_model_lacks(self, saved_model: Factory, tmp_path: Path) -> None:
        out = tmp_path / "out"
        quantize(saved_model("llama"), out, scheme="w8a16")
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        with pytest.raises(StructureError, match=r"no layer model\.layers\.1.*described"):
            load_model(out)

    def test_smoothed_norms_of_the_classic_face(
        self, tiny_model: Factory, tiny_calib: Any, tiny_ids: Factory, tmp_path: Path
    ) -> None:
        model = tiny_model("llama")
        config = model.config
        AntiOutlier(model, tiny_calib, AntiOutlierConfig(anti_method="m1")).process()
        calibrator = Calibrator(model, QuantConfig(mm_tensor=False), tiny_calib)
        calibrator.run()
        ids = tiny_ids(16)
        for kind in ("ascendV1", "safe_tensor"):
            out = tmp_path / kind
            calibrator.save(str(out), save_type=[kind])
            config.save_pretrained(out)
            assert verify_checkpoint(out).problems == ()
            norm = "model.layers.0.input_layernorm"
            stored = open_checkpoint(out).tensors
            assert f"{norm}.bias" in stored
            assert (f"{norm}.module.weight" in stored) is (kind == "safe_tensor")
            found = logits(load_model(out), ids)
            torch.testing.assert_close(found, logits(calibrator.model, ids), rtol=0, atol=1e-5)
            dequantize(out, tmp_path / f"{kind}_float")
            plain = open_checkpoint(tmp_path / f"{kind}_float").tensors
            assert plain.keys() == tiny_model("llama").state_dict().keys()


class TestDequantize:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16_g32"])
    def test_an_ordinary_model_again(
        self,
        saved_model: Factory,
        data: TokenWindows,
        tiny_ids: Factory,
        tmp_path: Path,
        family: str,
        scheme: str,
    ) -> None:
        quantize(saved_model(family), tmp_path / "out", scheme=scheme, calibration=data)
        dequantize(tmp_path / "out", tmp_path / "float")
        before, after = open_checkpoint(saved_model(family)), open_checkpoint(tmp_path / "float")
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in before.tensors.items():
            assert after.tensors[name].dtype == info.dtype
            np.testing.assert_allclose(after.load(name), before.load(name), atol=0.01)
        ids = tiny_ids(16)
        expected = logits(load_model(saved_model(family)), ids)
        found = logits(load_model(tmp_path / "float"), ids)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.1

    def test_a_shift_of_a_norm_has_no_place(self, saved_model: Factory, tmp_path: Path) -> None:
        out = tmp_path / "out"
        quantize(saved_model("llama"), out, scheme="w8a16")
        file = out / "quant_model_weight_w8a16.safetensors"
        bias = "model.norm.bias"
        tensors = load_file(file) | {bias: torch.ones(64)}
        file.unlink()
        save_file(tensors, file)
        description = json.loads((out / "quant_model_description.json").read_text())
        description |= {bias: "FLOAT", "metadata": {"added_norm_bias": [bias]}}
        (out / "quant_model_description.json").write_text(json.dumps(description))
        assert bias in QuantizedCheckpoint(out).norm_extras
        with pytest.raises(FormatError, match=r"model\.norm\.bias shifts a norm"):
            dequantize(out, tmp_path / "float")
        assert not (tmp_path / "float").exists()
        found = load_model(out).model.norm(torch.zeros(1, 64))  # to run it there is a place
        assert torch.equal(found, torch.ones(1, 64))


class TestQuality:
    def test_of_the_example(self, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("\n".join((EXAMPLES / "eval.txt").read_text().splitlines()[:40]))
        before = evaluate_text(EXAMPLES / "tiny-llama", text, window=128)
        report = quantize(EXAMPLES / "tiny-llama", tmp_path / "out", scheme="w8a16", text=text)
        after = evaluate_text(tmp_path / "out", text, window=128)
        assert after.tokens == before.tokens
        assert after.value == pytest.approx(before.value, rel=0.01)
        assert report.perplexity_text == "text.txt"
        assert report.perplexity_before is not None
        assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.01)

    def test_windows_that_the_model_cannot_place_are_cut(
        self, saved_model: Factory, tmp_path: Path
    ) -> None:
        out = Path(shutil.copytree(saved_model("gpt2"), tmp_path / "model"))
        letters = {letter: n for n, letter in enumerate(["<unk>", *map(chr, range(32, 127))])}
        backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(out)
        (tmp_path / "text.txt").write_text("a b c " * 100)
        found = evaluate_text(out, tmp_path / "text.txt", window=512)
        assert found == evaluate_text(out, tmp_path / "text.txt", window=128)

    def test_a_missing_text_is_said_first(self, saved_model: Factory, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="none"):
            evaluate_text(saved_model("llama"), tmp_path / "none.txt")
