"""Int8 attention: scales by head, the hooks, both interfaces, and what cannot be reached."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from slim_core.errors import (
    CalibrationError,
    InvalidTypeError,
    InvalidValueError,
    PatternError,
    StructureError,
)
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import (
    Calibrator,
    FakeQuantizeCalibrator,
    FAQuantizer,
    QuantConfig,
    load_model,
    quantize,
)
from slim_ptq.attention import find_quantizers, install_quantizers, reachable_attention
from slim_ptq.attention.head_range import HeadRange, shortest_interval
from slim_ptq.calibration.text import TokenWindows

TinyModel = Callable[..., Any]
LOGGER = logging.getLogger("test")
CONFIG = SimpleNamespace(num_attention_heads=4, hidden_size=64, num_key_value_heads=2)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.sampled_from([0.5, 0.9])
)
def test_the_shortest_interval_is_the_shortest(values: list[float], share: float) -> None:
    row = torch.tensor([values])
    low, high = shortest_interval(row, share)
    inside = max(int(len(values) * share), 1)
    ordered = sorted(row[0].tolist())
    best = min(ordered[i + inside - 1] - ordered[i] for i in range(len(ordered) - inside + 1))
    assert float(high - low) == pytest.approx(best, abs=1e-4)
    assert int(((row >= low) & (row <= high)).sum()) >= inside


def test_keys_leave_out_outliers_and_values_do_not() -> None:
    states = torch.linspace(-1, 1, 20000).reshape(1, 1, 200, 100)
    states[0, 0, 0, 0] = 50.0
    shortest, extremes = HeadRange(shortest=True), HeadRange(shortest=False)
    shortest.update(states)
    extremes.update(states)
    assert float(shortest.params()[0]) <= 1 / 127 + 1e-6
    assert float(extremes.params()[0]) == pytest.approx(50 / 127)
    assert extremes.params()[0].shape == (1, 1)


def test_ranges_grow_over_batches() -> None:
    seen = HeadRange(shortest=False)
    for scale in (1.0, 4.0, 2.0):
        seen.update(torch.tensor([[[[-scale, 0.5]], [[0.1, 0.2]]]]))
    scale, offset = seen.params()
    torch.testing.assert_close(scale, torch.tensor([[4 / 127], [0.2 / 127]]))
    assert not offset.any()


def test_what_the_constructor_wants() -> None:
    with pytest.raises(InvalidTypeError, match="num_attention_heads"):
        FAQuantizer(SimpleNamespace(hidden_size=4), LOGGER)
    with pytest.raises(InvalidTypeError, match="hidden_size"):
        FAQuantizer(SimpleNamespace(num_attention_heads=4, hidden_size="64"), LOGGER)
    with pytest.raises(InvalidTypeError, match="logger"):
        FAQuantizer(CONFIG, "log")


def test_keys_and_values_as_many_as_heads_by_default(caplog: pytest.LogCaptureFixture) -> None:
    FAQuantizer(SimpleNamespace(num_attention_heads=4, hidden_size=64), LOGGER)
    assert "num_key_value_heads" in caplog.text


def test_quant_observes_then_rounds() -> None:
    quantizer = FAQuantizer(CONFIG, LOGGER)
    states = torch.randn(2, 4, 5, 16)
    assert quantizer.quant(states, qkv="q") is states
    quantizer.observe()
    for part in "qkv":
        assert quantizer.quant(states, qkv=part) is states
    assert quantizer.missing == []
    scales = {part: scale for part, (scale, _) in quantizer.params().items()}
    quantizer.emulate(scales)
    step = states.abs().amax((0, 2, 3))[None, :, None, None] / 127
    expected = torch.clamp(torch.round(states / step), -128, 127) * step
    torch.testing.assert_close(quantizer.quant(states, "v"), expected)
    with pytest.raises(InvalidValueError, match="4 heads"):
        quantizer.quant(states[:, :2], "v")
    with pytest.raises(InvalidValueError, match="qkv"):
        quantizer.quant(states, "o")
    with pytest.raises(InvalidValueError, match="shape"):
        quantizer.quant(states[0], "v")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "opt", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hooks_change_nothing_until_scales_are_fixed(
    tiny_model: TinyModel, tiny_ids: Any, family: str, attention: str
) -> None:
    model = tiny_model(family)
    model.config._attn_implementation = attention
    ids, mask = tiny_ids(12, batch=2), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        names = reachable_attention(model, [""])
        found = install_quantizers(model, names)
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
        for quantizer in found.values():
            quantizer.observe()
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert len(found) == 2
    assert all(quantizer.missing == [] for quantizer in found.values())


def test_code_without_attention_functions_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(StructureError, match="BloomAttention"):
        reachable_attention(tiny_model("bloom"), ["transformer.h.0"])


def calibrated(model: Any, config: QuantConfig, samples: Any) -> Any:
    calibrator = Calibrator(model, config, calib_data=samples)
    calibrator.run()
    return calibrator


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_save_and_open_again(
    tiny_model: TinyModel, tiny_calib: Any, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(tiny_calib[0][0]).logits
    calibrated(model, QuantConfig(mm_tensor=False).fa_quant(), tiny_calib).save(
        str(tmp_path / "out"), save_type=["ascendV1"]
    )
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    tensors = load_file(str(next((tmp_path / "out").glob("*.safetensors"))))
    assert description["fa_quant_type"] == "FAQuant"
    assert "kv_cache_type" not in description
    owner = "model.layers.1.self_attn"
    for part, heads in (("fa_q", 4), ("fa_k", 2), ("fa_v", 2)):
        scale, offset = tensors[f"{owner}.{part}.scale"], tensors[f"{owner}.{part}.offset"]
        assert (scale.shape, offset.shape) == ((heads, 1), (heads, 1))
        assert (scale.dtype, offset.dtype) == (torch.float32, torch.int8)
        assert description[f"{owner}.{part}.scale"] == "FAQuant"
        assert not offset.any()
    opened = FakeQuantizeCalibrator(before, None, "cpu", description, tensors).model
    model.config.save_pretrained(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").problems == ()
    with torch.no_grad():
        expected = model(tiny_calib[0][0]).logits
        assert not torch.equal(expected, plain)
        assert torch.equal(opened(tiny_calib[0][0]).logits, expected)
        assert torch.equal(load_model(tmp_path / "out")(tiny_calib[0][0]).logits, expected)


def test_scale_of_values_is_their_largest(tiny_model: TinyModel, tiny_calib: Any) -> None:
    model = tiny_model("llama")
    seen = []
    handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out.detach().reshape(-1, 2, 16))
    )
    with torch.no_grad():
        for ids, mask in tiny_calib:
            model(ids, mask)
    handle.remove()
    calibrated(model, QuantConfig(mm_tensor=False).fa_quant(), tiny_calib)
    scale = find_quantizers(model)["model.layers.0.self_attn"].scale("v")
    torch.testing.assert_close(scale[:, 0], torch.cat(seen).abs().amax((0, 2)) / 127)


def test_npy_files(tiny_model: TinyModel, tiny_calib: Any, tmp_path: Path) -> None:
    calibrator = calibrated(
        tiny_model("llama"), QuantConfig(mm_tensor=False).fa_quant(), tiny_calib
    )
    calibrator.save(str(tmp_path), save_type=["numpy"])
    scales = np.load(tmp_path / "fa_quant_scale.npy", allow_pickle=True).item()
    offsets = np.load(tmp_path / "fa_quant_offset.npy", allow_pickle=True).item()
    assert len(scales) == len(offsets) == 6
    assert scales["model.layers.0.self_attn.fa_q.scale"].shape == (4, 1)


@pytest.mark.parametrize(("amp", "left"), [(0, 2), (1, 1), (5, 0)])
def test_amp_leaves_the_hardest_in_float(
    tiny_model: TinyModel, tiny_calib: Any, amp: int, left: int
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # keys of the second block get an outlier that its head must hold
        model.model.layers[1].self_attn.v_proj.weight[3] *= 100
    calibrated(model, QuantConfig(mm_tensor=False).fa_quant(fa_amp=amp), tiny_calib)
    found = find_quantizers(model)
    assert len(found) == left
    if amp == 1:
        assert list(found) == ["model.layers.0.self_attn"]


def test_disable_names_leave_attention_in_float(tiny_model: TinyModel, tiny_calib: Any) -> None:
    model = tiny_model("llama")
    config = QuantConfig(mm_tensor=False, disable_names=["model.layers.0.self_attn"]).fa_quant()
    calibrated(model, config, tiny_calib)
    assert list(find_quantizers(model)) == ["model.layers.1.self_attn"]


class EditedAttention(nn.Module):
    """Attention whose code was edited by its user."""

    def __init__(self, inner: nn.Module, config: Any, parts: str) -> None:
        super().__init__()
        self.inner, self.parts = inner, parts
        self.fa_quantizer = FAQuantizer(config, LOGGER)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        heads = hidden_states.unflatten(-1, (4, -1)).transpose(1, 2)
        for part in self.parts:
            heads = self.fa_quantizer.quant(heads, qkv=part)
        return self.inner(heads.transpose(1, 2).flatten(2), **kwargs)


def edited(model: Any, parts: str) -> Any:
    for layer in model.model.layers:
        layer.self_attn = EditedAttention(layer.self_attn, model.config, parts)
    return model


def test_quantizers_of_users_are_used(tiny_model: TinyModel, tiny_calib: Any) -> None:
    model = edited(tiny_model("llama"), "qkv")
    calibrated(model, QuantConfig(mm_tensor=False).fa_quant(), tiny_calib)
    found = find_quantizers(model)
    assert "model.layers.0.self_attn" in found
    assert found["model.layers.0.self_attn"].scale("q").shape == (4, 1)


def test_quantizers_that_are_not_called_are_an_error(
    tiny_model: TinyModel, tiny_calib: Any
) -> None:
    model = edited(tiny_model("llama"), "qv")
    with pytest.raises(StructureError, match=r"layers\.0\.self_attn: k"):
        calibrated(model, QuantConfig(mm_tensor=False).fa_quant(), tiny_calib)
    with torch.no_grad():
        assert torch.isfinite(model(tiny_calib[0][0]).logits).all()


def test_samples_are_needed(tiny_model: TinyModel) -> None:
    with pytest.raises(CalibrationError, match="attention quantization needs samples"):
        Calibrator(tiny_model("llama"), QuantConfig(8, 16, mm_tensor=False).fa_quant())


def test_caches_and_attention_exclude_each_other() -> None:
    with pytest.raises(InvalidValueError, match="exclude each other"):
        QuantConfig(mm_tensor=False).kv_quant().fa_quant()
    with pytest.raises(InvalidValueError, match="exclude each other"):
        QuantConfig(mm_tensor=False, use_kvcache_quant=True).fa_quant()


@pytest.fixture
def tokens(tiny_ids: Any) -> TokenWindows:
    """Four samples of equal length, three and one of them in a batch."""
    rows = [tiny_ids(20, seed=s) for s in range(4)]
    return TokenWindows((torch.cat(rows[:3]), rows[3]), "test")


def test_both_interfaces_give_the_same_scales(
    saved_model: Any, tiny_model: TinyModel, tiny_ids: Any, tokens: TokenWindows, tmp_path: Path
) -> None:
    quantize(
        saved_model("qwen2"),
        tmp_path / "modern",
        recipe=Recipe.build(attention={}),
        calibration=tokens,
    )
    samples = [[tiny_ids(20, seed=s)] for s in range(4)]
    calibrated(tiny_model("qwen2"), QuantConfig(mm_tensor=False).fa_quant(), samples).save(
        str(tmp_path / "classic"), save_type=["ascendV1"]
    )
    modern, classic = (
        load_file(str(next((tmp_path / name).glob("*.safetensors"))))
        for name in ("modern", "classic")
    )
    names = [name for name in modern if ".fa_" in name]
    assert len(names) == 12
    for name in names:
        torch.testing.assert_close(modern[name], classic[name], rtol=1e-5, atol=0)


def test_recipes_exclude_and_fall_back(
    saved_model: Any, tokens: TokenWindows, tmp_path: Path
) -> None:
    model = saved_model("llama")
    recipe = Recipe.build(attention={"exclude": ["*layers.0.self_attn"]})
    quantize(model, tmp_path / "a", recipe=recipe, calibration=tokens)
    recipe = Recipe.build(scheme="float", attention={"fallback": 1})
    quantize(model, tmp_path / "b", recipe=recipe, calibration=tokens)
    for name in "ab":
        found = load_file(str(next((tmp_path / name).glob("*.safetensors"))))
        assert len([key for key in found if ".fa_" in key]) == 6
    recipe = Recipe.build(attention={"exclude": ["*selfattn"]})
    with pytest.raises(PatternError, match=r"attention\.exclude"):
        quantize(model, tmp_path / "c", recipe=recipe, calibration=tokens)


def test_unreachable_attention_is_said_before_any_work(
    saved_model: Any, tokens: TokenWindows, tmp_path: Path
) -> None:
    with pytest.raises(StructureError, match=r"transformer\.h\.0\.self_attention"):
        quantize(
            saved_model("bloom"),
            tmp_path / "out",
            recipe=Recipe.build(attention={}),
            calibration=tokens,
        )
