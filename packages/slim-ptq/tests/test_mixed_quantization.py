"""Several types in one model: mixed recipes, mixtures of experts, models that read images too.

Both interfaces must give the same integers, and what is loaded again must compute what was saved.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from slim_core.checkpoint import open_checkpoint
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig, load_model, quantize
from slim_ptq.calibration.text import TokenWindows

GROUP = {"w_bit": 8, "a_bit": 16, "is_lowbit": True, "open_outlier": False, "group_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w8a8_dynamic": {"is_dynamic": True},
    "w8a16": {"a_bit": 16},
    "w8a16_g32": GROUP,
}


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., torch.Tensor]) -> TokenWindows:
    return TokenWindows((tiny_ids(20, seed=3, batch=4).clamp(min=6),), "random tokens")


def classic(
    model: Any, out: Path, scheme: str, data: TokenWindows, **options: Any
) -> QuantizedCheckpoint:
    """Quantize with the classic interface and read what it saves."""
    config = QuantConfig(mm_tensor=False, disable_last_linear=True, **CONFIGS[scheme])
    samples = [[row[None], torch.ones_like(row[None])] for row in data.batches[0]]
    calibrator = Calibrator(model, config, calib_data=samples, **options)
    calibrator.run()
    calibrator.save(str(out), save_type=["ascendV1"])
    return QuantizedCheckpoint(out)


def same_integers(first: QuantizedCheckpoint, second: QuantizedCheckpoint) -> None:
    assert first.layers == second.layers
    for name in first.layers:
        one, two = first.layer(name), second.layer(name)
        assert np.array_equal(one.codes, two.codes), name
        assert np.allclose(one.weight_scale, two.weight_scale, rtol=1e-6), name


def distance(first: Any, second: Any, **inputs: Any) -> float:
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in (first, second))
    return float((found - expected).norm() / expected.norm())


class TestDownProjections:
    """In a static W8A8 model, as the documents advise where outliers sit in their input."""

    @pytest.mark.parametrize("kind", ["w8a16", "w8a8_dynamic"])
    def test_both_interfaces(
        self, saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path, kind: str
    ) -> None:
        path = saved_model("qwen2")
        rules = [{"match": "*.down_proj", "scheme": kind}]
        quantize(
            path,
            tmp_path / "new",
            recipe=Recipe.build(scheme="w8a8", rules=rules),
            calibration=data,
        )
        new = QuantizedCheckpoint(tmp_path / "new")
        model = load_model(path)
        old = classic(model, tmp_path / "old", "w8a8", data, mix_cfg={"*.down_proj": kind})
        same_integers(new, old)
        assert Counter(new.layers.values()) == {"W8A8": 12, kind.upper(): 2}
        for checkpoint in (new, old):
            assert verify_checkpoint(checkpoint.checkpoint.path).problems == ()
        ids = data.batches[0]
        assert distance(load_model(path), load_model(tmp_path / "new"), input_ids=ids) < 0.05

    @pytest.mark.parametrize("kind", ["w8a16", "w8a8_dynamic", "float"])
    def test_it_helps_where_their_input_has_outliers(
        self, tiny_model: Callable[..., Any], data: TokenWindows, tmp_path: Path, kind: str
    ) -> None:
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:  # one channel of the product of gate and up
                layer.mlp.up_proj.weight[5] *= 400
                layer.mlp.down_proj.weight[:, 5] /= 20
        model.save_pretrained(tmp_path / "model")
        rules = [{"match": "*.down_proj", "scheme": kind}]
        for name, recipe in {
            "plain": Recipe.build(scheme="w8a8"),
            "mixed": Recipe.build(scheme="w8a8", rules=rules),
        }.items():
            quantize(tmp_path / "model", tmp_path / name, recipe=recipe, calibration=data)
        plain, mixed = (
            distance(model, load_model(tmp_path / name), input_ids=data.batches[0])
            for name in ("plain", "mixed")
        )
        assert mixed < plain


class TestExperts:
    @pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
    @pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a16", "w8a16_g32"])
    def test_both_interfaces(
        self,
        saved_model: Callable[..., Path],
        data: TokenWindows,
        tmp_path: Path,
        family: str,
        scheme: str,
    ) -> None:
        changes = {"shared_expert_intermediate_size": 64} if family == "qwen2_moe" else {}
        path = saved_model(family, **changes)
        report = quantize(path, tmp_path / "new", scheme=scheme)
        new = QuantizedCheckpoint(tmp_path / "new")
        assert verify_checkpoint(tmp_path / "new").problems == ()
        experts = [name for name in new.layers if ".experts." in name]
        assert len(experts) >= 4 * 3
        assert set(new.layers.values()) == {scheme.removesuffix("_g32").upper()}
        assert not any(name.endswith((".gate", "shared_expert_gate")) for name in new.layers)
        assert all(layer.weight_error < 0.02 for layer in report.layers)
        floats = load_model(path)
        ids = data.batches[0]
        # Routers may choose another expert for a token: the distance is not that of rounding.
        assert distance(floats, load_model(tmp_path / "new"), input_ids=ids) < 0.2

        old = classic(floats, tmp_path / "old", scheme, data)
        same_integers(new, old)
        shown = (QuantizedCheckpoint(tmp_path / name).description for name in ("new", "old"))
        first, second = shown
        kinds = ("W8A8_DYNAMIC", "W8A16")
        assert {k: v for k, v in first.items() if v in kinds} == {
            k: v for k, v in second.items() if v in kinds
        }
        reloaded = load_model(tmp_path / "new")
        assert distance(floats, reloaded, input_ids=ids) < 1e-5  # floats is quantized by now

    def test_experts_of_another_type_than_attention(
        self, saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
    ) -> None:
        path = saved_model("qwen3_moe")
        rules = [{"match": "*.experts.*", "scheme": "w8a16_g32"}]
        recipe = Recipe.build(scheme="w8a8", rules=rules)
        quantize(path, tmp_path / "out", recipe=recipe, calibration=data)
        stored = QuantizedCheckpoint(tmp_path / "out")
        assert {kind for name, kind in stored.layers.items() if ".experts." in name} == {"W8A16"}
        assert {kind for name, kind in stored.layers.items() if "self_attn" in name} == {"W8A8"}
        assert verify_checkpoint(tmp_path / "out").problems == ()
        found = distance(load_model(path), load_model(tmp_path / "out"), input_ids=data.batches[0])
        assert found < 0.1


TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IMAGE = 5  # the token in the place of a piece of an image


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE
    )
    ids = torch.tensor([[2, *[IMAGE] * 4, 9, 10, 11]])
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": ids, "pixel_values": images}


def qwen2_vl() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.Qwen2VLConfig(
        text_config={
            **TEXT,
            "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    grid = torch.tensor([[1, 4, 4]])  # 16 patches, merged by fours
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[2, 3, *[IMAGE] * 4, 4, 9, 10]])
    model = transformers.Qwen2VLForConditionalGeneration(config)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers 5
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return model, inputs


@pytest.fixture(scope="module", params=[llava, qwen2_vl])
def multimodal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs = request.param()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    path = tmp_path_factory.mktemp("multimodal") / "model"
    model.eval().save_pretrained(path)
    return path, inputs


class TestLanguagePart:
    @pytest.mark.parametrize("scheme", ["w8a16", "w8a16_g32", "w8a8_dynamic", "w8a8"])
    def test_the_vision_tower_stays_as_it_is(
        self,
        multimodal: tuple[Path, dict[str, torch.Tensor]],
        data: TokenWindows,
        tmp_path: Path,
        scheme: str,
    ) -> None:
        path, inputs = multimodal
        out = tmp_path / "out"
        report = quantize(path, out, scheme=scheme, calibration=data)
        assert len(report.layers) == 14
        assert verify_checkpoint(out).problems == ()
        stored = QuantizedCheckpoint(out)
        assert all("language_model" in name or "model.layers" in name for name in stored.layers)
        floats = open_checkpoint(path)
        seen = 0
        for name in floats.tensors:
            if "vision" in name or "visual" in name or "projector" in name:
                seen += 1
                assert stored.description[name] == "FLOAT"
                assert np.array_equal(stored.checkpoint.load(name), floats.load(name))
        assert seen > 10
        model, quantized = load_model(path), load_model(out)
        # Static ranges were found on text alone, and images exceed them a little.
        assert 0 < distance(model, quantized, **inputs) < (0.2 if scheme == "w8a8" else 0.1)

    def test_both_interfaces(
        self,
        multimodal: tuple[Path, dict[str, torch.Tensor]],
        data: TokenWindows,
        tmp_path: Path,
    ) -> None:
        path, inputs = multimodal
        quantize(path, tmp_path / "new", scheme="w8a16")
        new = QuantizedCheckpoint(tmp_path / "new")
        model = load_model(path)
        towers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        towers = [name for name in towers if "language_model" not in name]
        config = QuantConfig(a_bit=16, mm_tensor=False, disable_names=towers)
        calibrator = Calibrator(model, config)
        calibrator.run()
        calibrator.save(str(tmp_path / "old"), save_type=["ascendV1"])
        same_integers(new, QuantizedCheckpoint(tmp_path / "old"))
        assert distance(model, load_model(tmp_path / "new"), **inputs) < 1e-5
        description = json.loads((tmp_path / "old" / "quant_model_description.json").read_text())
        assert description["model_quant_type"] == "W8A16"
