"""The int8 key-value cache: where it is filled from, its scales, its files, and its emulation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

from slim_core.attention_types import attention_tensors
from slim_core.errors import CalibrationError, FormatError, PlanError, RecipeError, StructureError
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import (
    Calibrator,
    FakeQuantizeCalibrator,
    QuantConfig,
    dequantize,
    load_model,
    quantize,
)
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.kv import CacheQuantizer, CacheRanges, attach, cache_scheme, find_cache_sources
from slim_ptq.structure import cache_argument, find_linears

TinyModel = Callable[..., Any]
HIDDEN, HEAD = 64, 16

# family -> channels of keys and of values in the output of their layer; None: all of them
CHANNELS: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "llama": (None, None),
    "qwen3": (None, None),
    "gemma": (None, None),
    "phi": (None, None),
    "phi3": (list(range(64, 96)), list(range(96, 128))),
    "gpt2": (list(range(64, 128)), list(range(128, 192))),
    "chatglm": (list(range(64, 96)), list(range(96, 128))),
    "falcon": (list(range(64, 80)), list(range(80, 96))),
    "bloom": (
        [48 * head + 16 + i for head in range(4) for i in range(16)],
        [48 * head + 32 + i for head in range(4) for i in range(16)],
    ),
    "gpt_neox": (
        [48 * head + 16 + i for head in range(4) for i in range(16)],
        [48 * head + 32 + i for head in range(4) for i in range(16)],
    ),
}


def sources_of(model: nn.Module, ids: torch.Tensor) -> Any:
    return find_cache_sources(model, find_linears(model), lambda: model(ids))


@pytest.mark.parametrize("family", CHANNELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sources_are_found_in_every_layout(
    tiny_model: TinyModel, tiny_ids: Any, family: str, attention: str
) -> None:
    model = tiny_model(family)
    model.config._attn_implementation = attention
    found = sources_of(model, tiny_ids(8))
    assert [source.part for source in found] == ["k_proj", "v_proj"] * 2
    for source, channels in zip(found, CHANNELS[family] * 2, strict=True):
        assert (None if source.channels is None else source.channels.tolist()) == channels


class GroupedAttention(nn.Module):
    """One fused projection, for each group two queries, a key and a value, as InternLM2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(32, 2 * 4 * 8)
        self.wo = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = self.wqkv(x).view(*x.shape[:2], 2, 4, 8)
        query = grouped[..., :2, :].reshape(*x.shape[:2], 4, 8).transpose(1, 2)
        key, value = (
            grouped[..., part, :].transpose(1, 2).repeat_interleave(2, dim=1) for part in (2, 3)
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
        out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value)
        return self.wo(out.transpose(1, 2).reshape(x.shape))


def test_interleaved_groups_and_einsum() -> None:
    block = GroupedAttention()
    found = find_cache_sources(block, ["wqkv", "wo"], lambda: block(torch.randn(1, 5, 32)))
    assert [source.linear for source in found] == ["wqkv", "wqkv"]
    assert found[0].channels.tolist() == [*range(16, 24), *range(48, 56)]
    assert found[1].channels.tolist() == [*range(24, 32), *range(56, 64)]
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_latent_attention_is_refused(tiny_model: TinyModel, tiny_ids: Any) -> None:
    with pytest.raises(StructureError, match=r"keys .* 2 linear layers .*kv_a_proj_with_mqa"):
        sources_of(tiny_model("deepseek_v3"), tiny_ids(8))


def test_a_model_without_attention_is_refused() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(StructureError, match="no attention was seen"):
        find_cache_sources(block, ["0", "2"], lambda: block(torch.randn(1, 3, 8)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_global_and_follow_the_formulas(symmetric: bool) -> None:
    linear = nn.Linear(4, 6, bias=False)
    root = nn.Sequential(linear)
    batches = [torch.randn(2, 3, 4) * scale for scale in (1.0, 3.0, 0.5)]
    source = type("Source", (), {"linear": "0", "part": "k_proj", "channels": None})()
    ranges = CacheRanges([source])
    with ranges.watching(root), torch.no_grad():
        for batch in batches:
            root(batch)
    outputs = torch.cat([linear(batch).detach().reshape(-1, 6) for batch in batches])
    scale, offset = ranges.params(source, cache_scheme(symmetric=symmetric), "0")
    if symmetric:
        torch.testing.assert_close(scale, outputs.abs().amax(0) / 127)
        assert not offset.any()
    else:
        low, high = outputs.amin(0).clamp(max=0), outputs.amax(0).clamp(min=0)
        torch.testing.assert_close(scale, (high - low) / 255)
        assert torch.equal(offset, torch.round(-low / scale) - 128)


def test_the_quantizer_rounds_cached_channels_alone() -> None:
    linear = nn.Linear(3, 5)
    channels = torch.tensor([1, 4])
    scale, offset = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 0.0])
    x = torch.randn(2, 7, 3)
    plain = linear(x).detach()
    attach(linear, CacheQuantizer("v_proj", scale, offset, channels))
    found = copy.deepcopy(linear)(x)  # the hook and its numbers are copied with the layer
    codes = torch.clamp(torch.round(plain[..., channels] / scale + offset), -128, 127)
    assert torch.equal(found[..., channels], (codes - offset) * scale)
    rest = [0, 2, 3]
    assert torch.equal(found[..., rest], plain[..., rest])
    assert set(linear.state_dict()) == {"weight", "bias"}


def calibrated(model: Any, config: QuantConfig, samples: Any) -> Any:
    calibrator = Calibrator(model, config, calib_data=samples)
    calibrator.run()
    return calibrator


def test_scales_of_the_classic_interface(tiny_model: TinyModel, tiny_calib: Any) -> None:
    """Acceptance check: global absmax of the output of k_proj of the float model over 127."""
    model = tiny_model("llama")
    seen = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out.detach().reshape(-1, 32))
    )
    with torch.no_grad():
        for ids, mask in tiny_calib:
            model(ids, mask)
    handle.remove()
    calibrated(model, QuantConfig(mm_tensor=False).kv_quant(), tiny_calib)
    quantizer = model.model.layers[0].self_attn.k_proj.get_submodule("kv_cache_k_proj")
    torch.testing.assert_close(quantizer.scale, torch.cat(seen).abs().amax(0) / 127)
    assert not quantizer.offset.any()


CONFIGS: dict[str, Callable[[], QuantConfig]] = {
    "w8a8": lambda: QuantConfig(mm_tensor=False),
    "w8a16": lambda: QuantConfig(8, 16, mm_tensor=False),
    "w8a8_dynamic": lambda: QuantConfig(mm_tensor=False, is_dynamic=True),
    "w8a8s": lambda: QuantConfig(4, 8, co_sparse=True, mm_tensor=False),
    "float": lambda: QuantConfig(mm_tensor=False, disable_names=["*"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_save_and_open_again(
    tiny_model: TinyModel, tiny_calib: Any, tmp_path: Path, kind: str, family: str
) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    calibrator = calibrated(model, CONFIGS[kind]().kv_quant(kv_sym=kind != "w8a16"), tiny_calib)
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (description["kv_cache_type"], description["kv_quant_type"]) == ("C8", "C8")
    tensors = load_file(str(next((tmp_path / "out").glob("*.safetensors"))))
    stored = attention_tensors(description)
    assert len(stored) == 8  # scale and offset of keys and values of two blocks
    assert all(tensors[name].shape == (64 if family == "gpt_neox" else 32,) for name in stored)
    opened = FakeQuantizeCalibrator(before, None, "cpu", description, tensors).model
    with torch.no_grad():
        expected = model(tiny_calib[0][0]).logits
        assert torch.equal(opened(tiny_calib[0][0]).logits, expected)
    model.config.save_pretrained(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").problems == ()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(tiny_calib[0][0]).logits, expected)


def test_safe_tensor_and_npy(tiny_model: TinyModel, tiny_calib: Any, tmp_path: Path) -> None:
    calibrator = calibrated(
        tiny_model("llama"), QuantConfig(mm_tensor=False, use_kvcache_quant=True), tiny_calib
    )
    calibrator.save(str(tmp_path), save_type=["safe_tensor", "numpy"])
    description = json.loads((tmp_path / "quant_model_description_w8a8.json").read_text())
    assert description["kv_quant_type"] == "C8"
    scales = np.load(tmp_path / "kv_cache_scale.npy", allow_pickle=True).item()
    names = {name for name in description if name.endswith("kv_cache_scale")}
    assert scales.keys() == names
    tensors = load_file(str(tmp_path / "quant_model_weight_w8a8.safetensors"))
    assert all(torch.equal(scales[name], tensors[name]) for name in names)
    offsets = np.load(tmp_path / "kv_cache_offset.npy", allow_pickle=True).item()
    assert not any(offset.any() for offset in offsets.values())


def test_generation_step_by_step_equals_one_pass(
    tiny_model: TinyModel, tiny_calib: Any, tiny_ids: Any
) -> None:
    """Prefill and decoding see the same rounded keys and values."""
    model = tiny_model("llama")
    config = QuantConfig(8, 16, mm_tensor=False).kv_quant(kv_sym=False)
    calibrated(model, config, tiny_calib)
    ids = tiny_ids(10, seed=3)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        name = cache_argument(model)
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            out = model(token, **{name: cache}, use_cache=True)
            cache = out[name]
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-4)


def test_samples_are_needed(tiny_model: TinyModel) -> None:
    config = QuantConfig(8, 16, mm_tensor=False).kv_quant()
    with pytest.raises(CalibrationError, match="KV-cache quantization needs samples"):
        Calibrator(tiny_model("llama"), config)


@pytest.fixture
def tokens(tiny_ids: Any) -> TokenWindows:
    """Four samples of equal length, three and one of them in a batch."""
    rows = [tiny_ids(20, seed=s) for s in range(4)]
    return TokenWindows((torch.cat(rows[:3]), rows[3]), "test")


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("scheme", ["w8a8", "float"])
def test_both_interfaces_give_the_same_numbers(
    saved_model: Any,
    tiny_model: TinyModel,
    tiny_ids: Any,
    tokens: TokenWindows,
    tmp_path: Path,
    family: str,
    scheme: str,
) -> None:
    recipe = Recipe.build(scheme=scheme, kv_cache={"symmetric": False})
    quantize(saved_model(family), tmp_path / "modern", recipe=recipe, calibration=tokens)
    disabled = ["*"] if scheme == "float" else []
    samples = [[tiny_ids(20, seed=s)] for s in range(4)]
    config = QuantConfig(mm_tensor=False, disable_names=disabled).kv_quant(kv_sym=False)
    calibrated(tiny_model(family), config, samples).save(
        str(tmp_path / "classic"), save_type=["ascendV1"]
    )
    modern, classic = (
        load_file(str(next((tmp_path / name).glob("*.safetensors"))))
        for name in ("modern", "classic")
    )
    names = [name for name in modern if "kv_cache" in name]
    assert len(names) == 8
    for name in names:
        torch.testing.assert_close(modern[name], classic[name], rtol=1e-5, atol=0)
    found = load_model(tmp_path / "modern")(samples[0][0]).logits
    assert torch.isfinite(found).all()


class RoundingCache(DynamicCache):
    """Rounds what goes in with given scales, shape (heads, 1, channels), by layer and part."""

    scales: dict[tuple[int, str], torch.Tensor]

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        rounded = (
            (states / scale).round().clamp(-128, 127) * scale
            for states, scale in (
                (key_states, self.scales[layer_idx, "k"]),
                (value_states, self.scales[layer_idx, "v"]),
            )
        )
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_keys_measured_and_rounded_after_the_rotary_embedding(
    saved_model: Any, tiny_model: TinyModel, tokens: TokenWindows, tmp_path: Path, family: str
) -> None:
    """The reference is the cache of transformers, which holds what an engine's cache holds."""
    recipe = Recipe.build(scheme="float", kv_cache={"after_rotary": True})
    quantize(saved_model(family), tmp_path / "out", recipe=recipe, calibration=tokens)
    model = tiny_model(family)
    scales: dict[tuple[int, str], torch.Tensor] = {}
    with torch.no_grad():
        for ids in tokens.batches:
            cache = DynamicCache()
            model(ids, use_cache=True, **{cache_argument(model): cache})
            for index in range(2):
                keys, values = held(cache, index)
                for part, states in (("k", keys), ("v", values)):
                    found = states.abs().amax((0, 2))[:, None] / 127
                    before = scales.get((index, part), found)
                    scales[index, part] = torch.maximum(before, found)
    stored = load_file(str(next((tmp_path / "out").glob("*.safetensors"))))
    for index in range(2):
        for part in "kv":
            (name,) = (
                n for n in stored if f".{index}." in n and f"{part}_proj.kv_cache_scale" in n
            )
            torch.testing.assert_close(stored[name], scales[index, part].flatten())
    rounding = RoundingCache()
    rounding.scales = scales
    ids = tokens.batches[0]
    with torch.no_grad():
        expected = model(ids, use_cache=True, **{cache_argument(model): rounding}).logits
        found = load_model(tmp_path / "out")(ids).logits
        plain = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4
    assert verify_checkpoint(tmp_path / "out").problems == ()


def held(cache: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of a layer, for transformers 4.57 and 5."""
    layer = cache.layers[index]
    return layer.keys, layer.values


def test_keys_that_cannot_be_reached_after_the_rotary_embedding(
    saved_model: Any, tokens: TokenWindows, tmp_path: Path
) -> None:
    recipe = Recipe.build(scheme="float", kv_cache={"after_rotary": True})
    with pytest.raises(StructureError, match="does not use the attention functions"):
        quantize(saved_model("bloom"), tmp_path / "out", recipe=recipe, calibration=tokens)
    assert not (tmp_path / "out").exists()


def test_dequantizing_leaves_the_cache_out(
    saved_model: Any, tokens: TokenWindows, tmp_path: Path
) -> None:
    recipe = Recipe.build(scheme="w8a16", kv_cache={})
    quantize(saved_model("phi3"), tmp_path / "q", recipe=recipe, calibration=tokens)
    dequantize(tmp_path / "q", tmp_path / "f")
    names = load_file(str(next((tmp_path / "f").glob("*.safetensors"))))
    assert names.keys() == load_file(str(saved_model("phi3") / "model.safetensors")).keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_cache": {}, "attention": {}}, "exclude each other"),
        ({"kv_cache": {}, "format": "float"}, "float format"),
        ({"kv_cache": {"dtype": "int4"}}, "kv_cache.dtype"),
        ({"kv_cache": {"symmetry": True}}, "kv_cache.symmetry"),
        ({"kv_cache": {"after_rotary": True}, "format": "safe_tensor"}, "ascend_v1 format only"),
    ],
)
def test_wrong_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.build(**values)


def test_a_recipe_without_data_is_refused_beforehand(saved_model: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="caches and attention need calibration data"):
        quantize(
            saved_model("llama"),
            tmp_path / "out",
            recipe=Recipe.build(scheme="w8a16", kv_cache={}),
        )


@pytest.mark.parametrize("damage", ["offset", "shape", "scale", "header", "width"])
def test_damaged_caches_are_found(
    tiny_model: TinyModel, tiny_calib: Any, tmp_path: Path, damage: str
) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    calibrated(model, QuantConfig(8, 16, mm_tensor=False).kv_quant(), tiny_calib).save(
        str(tmp_path), save_type=["ascendV1"]
    )
    description = json.loads((tmp_path / "quant_model_description.json").read_text())
    tensors = load_file(str(next(tmp_path.glob("*.safetensors"))))
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    if damage == "offset":
        del description[name.replace("scale", "offset")]
    elif damage == "shape":
        tensors[name] = tensors[name][:, None]
    elif damage == "scale":
        tensors[name][3] = 0.0
    elif damage == "header":
        del description["kv_cache_type"]
    else:
        for key in (name, name.replace("scale", "offset")):
            tensors[key] = tensors[key][:5].clone()
    with pytest.raises(FormatError, match="kv_cache"):
        FakeQuantizeCalibrator(before, None, "cpu", description, tensors)
