"""``AntiOutlier``: what it computes, what it leaves alone, and its errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from slim_core.errors import (
    CalibrationError,
    InvalidTypeError,
    InvalidValueError,
    NumericalError,
    PatternError,
    StructureError,
)
from slim_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig, smoothed_norms
from slim_ptq.structure import LinkKind, find_linears, weight_of

EXAMPLES = Path(__file__).parents[3] / "examples"
METHODS = ["m1", "m2", "m3", "m4", "m5", "m6"]
BETWEEN_LINEARS = ["m4", "m6"]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def process(model, samples, method="m1", **config):
    anti = AntiOutlier(model, samples, AntiOutlierConfig(anti_method=method, **config))
    anti.process()
    return anti


def norm_outputs(model, name, samples):
    """Largest magnitude of each channel that the norm gives over all samples."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, out: seen.append(out.detach().reshape(-1, out.shape[-1]))
    )
    for ids, mask in samples:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return torch.cat(seen).abs().amax(0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_m1_scales_columns_by_the_root_of_activation_over_weight(family, tiny_model, tiny_calib):
    model = tiny_model(family)
    before = copy.deepcopy(model)
    ids = tiny_calib[-1][0]
    process(model, tiny_calib, "m1")
    layer, old = model.model.layers[0], before.model.layers[0]
    absmax = norm_outputs(before, "model.layers.0.input_layernorm", tiny_calib)
    linears = [old.self_attn.q_proj, old.self_attn.k_proj, old.self_attn.v_proj]
    columns = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0)
    expected = (absmax / columns).sqrt()
    for name in ("q_proj", "k_proj", "v_proj"):
        new, original = (getattr(block.self_attn, name).weight for block in (layer, old))
        ratio = (new / original)[0]
        torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        old.input_layernorm.weight / layer.input_layernorm.weight, expected, rtol=1e-3, atol=0
    )
    change = (logits_of(model, ids) - logits_of(before, ids)).abs().max()
    assert change < 1e-5
    assert torch.equal(layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("method", ["m1", "m4"])
def test_every_family_keeps_its_outputs_and_has_its_norms_smoothed(
    method, families, tiny_model, tiny_calib, tiny_ids
):
    norms_a_block = {"phi": 1, "falcon": 1, "deepseek_v3": 4}
    for family in families:
        model, ids = tiny_model(family), tiny_ids(30, seed=9)
        expected = logits_of(model, ids)
        anti = process(model, tiny_calib, method)
        found = logits_of(model, ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=family)
        norms = smoothed_norms(model)
        assert len(norms) == 2 * norms_a_block.get(family, 2), family
        kinds = {item.source: item.kind for item in anti.result.scaled}
        assert norms == {n for n, kind in kinds.items() if kind is LinkKind.NORM_LINEAR}
        assert (LinkKind.V_O in kinds.values()) is (method in BETWEEN_LINEARS), family
        for item in anti.result.skipped:  # a GELU written out as products lies between these
            assert item.reason.startswith("scaling it changes the output"), family
            assert item.source.endswith((".fc1", ".c_fc", ".dense_h_to_4h")), family
        if method == "m1":
            assert all(float(item.scales.max()) > 1.0 for item in anti.result.scaled)


def test_all_experts_and_the_router_are_scaled_alike(tiny_model, tiny_calib):
    model = tiny_model("qwen3_moe")
    anti = process(model, tiny_calib)
    item = next(i for i in anti.result.scaled if i.source.endswith("0.post_attention_layernorm"))
    mlp = "model.layers.0.mlp"
    projections = ("gate_proj", "up_proj")
    experts = {f"{mlp}.experts.{e}.{name}" for e in range(8) for name in projections}
    assert set(item.targets) == {f"{mlp}.gate"} | experts
    assert {name for name in find_linears(model) if ".experts." in name} > experts


def test_samples_may_be_dicts_or_lists(tiny_model, tiny_calib):
    one, two = tiny_model("bloom"), tiny_model("bloom")
    process(one, tiny_calib)
    process(two, [{"input_ids": ids, "attention_mask": mask} for ids, mask in tiny_calib])
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)


def fake_w8a8_logits(model, samples, ids):
    """Logits with int8 rows of weights and one int8 range for the input of each layer."""
    model = copy.deepcopy(model)
    ranges: dict[str, list[torch.Tensor]] = {}
    linears = {n: m for n, m in find_linears(model).items() if n != "lm_head"}
    handles = [
        m.register_forward_pre_hook(
            lambda _, a, n=n: ranges.setdefault(n, []).append(a[0].aminmax())
        )
        for n, m in linears.items()
    ]
    for sample in samples:
        logits_of(model, sample[0])
    for handle in handles:
        handle.remove()

    def quantized_input(low, high):
        scale = (high.clamp(min=0) - low.clamp(max=0)) / 255
        zero = (-low.clamp(max=0) / scale).round() - 128

        def hook(module, args):
            return (((args[0] / scale + zero).round().clamp(-128, 127) - zero) * scale,)

        return hook

    for name, module in linears.items():
        scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
        module.weight.data = (module.weight.data / scale).round() * scale
        low = min(pair.min for pair in ranges[name])
        high = max(pair.max for pair in ranges[name])
        module.register_forward_pre_hook(quantized_input(low, high))
    return logits_of(model, ids)


@pytest.mark.parametrize("method", METHODS)
def test_planted_outliers_no_longer_hurt(method, tiny_model, tiny_ids, plant_outliers):
    model, ids = tiny_model("llama"), tiny_ids(40, seed=3)
    samples = [[tiny_ids(100, seed=50 + n), torch.ones(1, 100, dtype=int)] for n in range(8)]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        plant_outliers(layer.input_layernorm, readers, [5, 40], 60.0)
        plant_outliers(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], [11], 60.0)
    exact = logits_of(model, ids)
    without = (fake_w8a8_logits(model, samples, ids) - exact).norm() / exact.norm()
    process(model, samples, method)
    torch.testing.assert_close(logits_of(model, ids), exact, rtol=1e-4, atol=1e-5)
    left = (fake_w8a8_logits(model, samples, ids) - exact).norm() / exact.norm()
    assert left < 0.15 * without


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trained_model_keeps_its_perplexity(method, dtype):
    path = EXAMPLES / "tiny-llama"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    text = (EXAMPLES / "eval.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = [ids[start : start + 256][None] for start in range(0, 256 * 12, 256)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def perplexity():
        with torch.no_grad():
            losses = [float(model(input_ids=window, labels=window).loss) for window in windows[4:]]
        return math.exp(sum(losses) / len(losses))

    before = perplexity()
    process(model, [[window, torch.ones_like(window)] for window in windows[:4]], method)
    assert perplexity() == pytest.approx(before, rel=1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("pattern", ["model.layers.0.self_attn.k_proj", "*.0.self_attn.?_proj"])
def test_a_disabled_layer_keeps_its_whole_link_as_it_is(pattern, tiny_model, tiny_calib):
    model = tiny_model("llama")
    anti = process(model, tiny_calib, disable_anti_names=[pattern])
    assert "model.layers.0.input_layernorm" not in smoothed_norms(model)
    assert len(smoothed_norms(model)) == 3
    (skipped,) = anti.result.skipped
    assert skipped.source == "model.layers.0.input_layernorm"
    assert skipped.reason.endswith("is in disable_anti_names")


def test_only_norms_of_the_named_class_are_smoothed(tiny_model, tiny_calib):
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm = nn.RMSNorm(64)
    AntiOutlier(model, tiny_calib, norm_class_name="RMSNorm").process()
    assert smoothed_norms(model) == {"model.layers.0.input_layernorm"}


def test_a_weight_that_another_block_shares_is_left_alone(tiny_model, tiny_calib, tiny_ids):
    model, ids = tiny_model("llama"), tiny_ids()
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    expected = logits_of(model, ids)
    anti = process(model, tiny_calib)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-5)
    assert {item.source for item in anti.result.skipped} == {
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
    }
    assert "shares the weight of model.layers.0.self_attn.q_proj" in anti.result.skipped[0].reason


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "bloom"])
def test_the_processed_model_can_be_saved_and_reloaded(
    family, tiny_model, tiny_calib, tiny_ids, tmp_path
):
    model = tiny_model(family)
    anti = process(model, tiny_calib)
    anti.save_model(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, tiny_ids()), logits_of(model, tiny_ids()))
    assert smoothed_norms(copy.deepcopy(model)) == smoothed_norms(model)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"w_bit": 5}, InvalidValueError, "w_bit must be one of 4, 8, not 5"),
        ({"w_bit": "8"}, InvalidTypeError, "w_bit must be int"),
        ({"a_bit": 4}, InvalidValueError, "a_bit must be one of 8, 16"),
        ({"a_bit": 16}, InvalidValueError, "a_bit=16 goes with anti_method 'm3' only"),
        ({"w_sym": False}, InvalidValueError, "w_sym=False goes with anti_method 'm3' only"),
        ({"w_sym": 1}, InvalidTypeError, "w_sym must be bool"),
        ({"anti_method": "m7"}, InvalidValueError, "anti_method must be one of 'm1', 'm2'"),
        ({"anti_method": 2}, InvalidValueError, "anti_method must be one of"),
        ({"shift": True}, InvalidValueError, "shift goes with anti_method 'm4' only, not 'm2'"),
        ({"group_size": -1}, InvalidValueError, "group_size must be at least 0"),
        ({"disable_anti_names": "q_proj"}, InvalidTypeError, "disable_anti_names must be list"),
        ({"disable_anti_names": [1]}, InvalidTypeError, r"disable_anti_names\[0\] must be str"),
        ({"flex_config": {"alpah": 1.0}}, InvalidValueError, "unknown key 'alpah'"),
        ({"flex_config": {"alpha": 2.0}}, InvalidValueError, r"flex_config\['alpha'\] must be in"),
        ({"dev_type": "tpu"}, InvalidValueError, "dev_type must be one of 'cpu', 'npu', 'gpu'"),
    ],
)
def test_a_wrong_configuration_is_an_error_before_any_work(values, error, message):
    with pytest.raises(error, match=message):
        AntiOutlierConfig(**values)


def test_defaults_are_those_of_the_classic_interface():
    config = AntiOutlierConfig()
    assert (config.w_bit, config.a_bit, config.anti_method, config.w_sym) == (8, 8, "m2", True)
    assert (config.dev_type, config.dev_id, config.disable_anti_names) == ("cpu", None, [])
    assert config.flex_config == {"alpha": None, "beta": None}


def test_wrong_arguments_are_errors_before_any_work(tiny_model, tiny_calib):
    model = tiny_model("llama")
    with pytest.raises(InvalidTypeError, match="model must be Module"):
        AntiOutlier("model", tiny_calib)
    with pytest.raises(InvalidTypeError, match="cfg must be AntiOutlierConfig"):
        AntiOutlier(model, tiny_calib, {"anti_method": "m1"})
    with pytest.raises(CalibrationError, match="calib_data is empty"):
        AntiOutlier(model, [])
    with pytest.raises(CalibrationError, match="calib_data is empty"):
        AntiOutlier(model)
    with pytest.raises(InvalidTypeError, match="calib_data"):
        AntiOutlier(model, (tiny_calib[0],))
    with pytest.raises(InvalidTypeError, match="norm_class_name must be str"):
        AntiOutlier(model, tiny_calib, norm_class_name=3)
    with pytest.raises(InvalidValueError, match="no module of class 'LlamaRmsNorm'") as caught:
        AntiOutlier(model, tiny_calib, norm_class_name="LlamaRmsNorm")
    assert caught.value.hint == "did you mean 'LlamaRMSNorm'?"
    with pytest.raises(PatternError, match=r"disable_anti_names: no layer is called 'layers\.9'"):
        AntiOutlier(model, tiny_calib, AntiOutlierConfig(disable_anti_names=["layers.9"]))
    with pytest.raises(StructureError, match="no decoder blocks"):
        AntiOutlier(nn.Sequential(nn.Linear(4, 4)), tiny_calib)


def test_a_second_run_is_an_error(tiny_model, tiny_calib):
    anti = process(tiny_model("llama"), tiny_calib)
    with pytest.raises(InvalidValueError, match="processed already"):
        anti.process()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nan_in_a_weight_names_the_layer(family, tiny_model, tiny_calib):
    model = tiny_model(family)
    name, linear = list(find_linears(model).items())[1]
    with torch.no_grad():
        weight_of(linear)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=rf"weight of {name} has 1 NaN"):
        AntiOutlier(model, tiny_calib).process()


def test_nan_that_a_block_makes_names_the_block(tiny_model, tiny_calib):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.1: the output of LlamaDecoderLayer"):
        AntiOutlier(model, tiny_calib).process()
