"""Tests of the classic face against formulas written out here, and of its choices and errors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import (
    CalibrationError,
    InvalidTypeError,
    InvalidValueError,
    NumericalError,
    PatternError,
    SlimError,
    StructureError,
)
from slim_core.quantized import QuantizedCheckpoint
from slim_ptq import Calibrator, QuantConfig
from slim_ptq.layer_schemes import parse_level
from slim_ptq.modules import FakeQuantLinear

Samples = list[list[torch.Tensor]]
Factory = Callable[..., Any]

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def qwen2(tiny_model: Factory) -> Any:
    """Llama with biases on q, k and v."""
    return tiny_model("qwen2")


def saved(calibrator: Calibrator, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that the calibrator writes."""
    calibrator.save(str(path), save_type=["safe_tensor"])
    checkpoint = open_checkpoint(path)
    return {
        name: torch.from_numpy(checkpoint.load(name).astype(np.float32))
        if checkpoint.tensors[name].dtype.kind not in "iu"
        else torch.from_numpy(checkpoint.load(name))
        for name in checkpoint.tensors
    }


def calibrated(model: Any, samples: Any = None, **given: Any) -> Calibrator:
    extra = {key: given.pop(key) for key in ("disable_level", "mix_cfg") if key in given}
    config = QuantConfig(**{"mm_tensor": False, **given})
    calibrator = Calibrator(model, config, samples, **extra)
    calibrator.run()
    return calibrator


def inputs_of(model: Any, name: str, samples: Samples) -> list[torch.Tensor]:
    """Return what enters a layer of the float model, one tensor a sample."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].detach().clone())
    )
    with torch.no_grad():
        for sample in samples:
            model(*sample)
    handle.remove()
    return seen


def half_even(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.rint(x.numpy()))


class TestStaticNumbers:
    def test_weights(self, qwen2: Any, tiny_calib: Samples, tmp_path: Path) -> None:
        weight = qwen2.get_submodule(Q).weight.detach().clone()
        tensors = saved(calibrated(qwen2, tiny_calib), tmp_path)
        scale = weight.abs().amax(1, keepdim=True) / 127
        assert tensors[f"{Q}.weight_scale"].shape == (64, 1)
        torch.testing.assert_close(tensors[f"{Q}.weight_scale"], scale, rtol=1e-6, atol=0)
        codes = half_even(weight / scale).clamp(-127, 127).to(torch.int8)
        assert torch.equal(tensors[f"{Q}.weight"], codes)
        assert not tensors[f"{Q}.weight_offset"].any()
        assert tensors[f"{Q}.weight_offset"].shape == (64, 1)

    def test_input_range_of_the_first_layers(
        self, qwen2: Any, tiny_calib: Samples, tmp_path: Path
    ) -> None:
        seen = inputs_of(qwen2, Q, tiny_calib)
        low = sum(float(x.min()) for x in seen) / len(seen)
        high = sum(float(x.max()) for x in seen) / len(seen)
        assert low < 0 < high
        tensors = saved(calibrated(qwen2, tiny_calib), tmp_path)
        for part in "qkv":
            base = Q.replace("q_proj", f"{part}_proj")
            scale = tensors[f"{base}.input_scale"]
            assert scale.shape == (1,)
            assert float(scale) == pytest.approx((high - low) / 255, rel=1e-6)
            assert float(tensors[f"{base}.input_offset"]) == round(-low / float(scale)) - 128

    def test_deq_scale_is_the_bit_pattern_of_the_product(
        self, qwen2: Any, tiny_calib: Samples, tmp_path: Path
    ) -> None:
        tensors = saved(calibrated(qwen2, tiny_calib), tmp_path)
        product = (
            tensors[f"{Q}.input_scale"].numpy().astype(np.float32)
            * tensors[f"{Q}.weight_scale"].numpy().astype(np.float32).ravel()
        )
        stored = tensors[f"{Q}.deq_scale"]
        assert stored.dtype == torch.int64
        np.testing.assert_array_equal(stored.numpy(), product.view(np.int32).astype(np.int64))

    def test_quant_bias_holds_the_bias_and_the_offset(
        self, qwen2: Any, tiny_calib: Samples, tmp_path: Path
    ) -> None:
        bias = qwen2.get_submodule(Q).bias.detach().clone()
        calibrator = calibrated(qwen2, tiny_calib)
        tensors = saved(calibrator, tmp_path)
        deq = tensors[f"{Q}.input_scale"].double() * tensors[f"{Q}.weight_scale"].double().ravel()
        row_sum = tensors[f"{Q}.weight"].long().sum(1)
        expected = half_even(
            bias.double() / deq.float().double() - tensors[f"{Q}.input_offset"].double() * row_sum
        )
        assert tensors[f"{Q}.quant_bias"].dtype == torch.int32
        assert torch.equal(tensors[f"{Q}.quant_bias"].double(), expected)
        torch.testing.assert_close(tensors[f"{Q}.bias"], bias)
        description = QuantizedCheckpoint(tmp_path).description
        assert description[f"{Q}.bias"] == "FLOAT"
        assert description[f"{Q}.quant_bias"] == "W8A8"
        assert f"{DOWN}.bias" not in tensors

    def test_integer_pipeline(self, qwen2: Any, tiny_calib: Samples, tmp_path: Path) -> None:
        linear = copy.deepcopy(qwen2.get_submodule(Q))
        x = inputs_of(qwen2, Q, tiny_calib[:1])[0]
        calibrator = calibrated(qwen2, tiny_calib)
        t = {
            name.removeprefix(f"{Q}."): tensor
            for name, tensor in saved(calibrator, tmp_path).items()
            if name.startswith(f"{Q}.")
        }
        codes = half_even(x / t["input_scale"] + t["input_offset"]).clamp(-128, 127).long()
        deq = t["deq_scale"].to(torch.int32).view(torch.float32)
        y = (codes @ t["weight"].long().T + t["quant_bias"]).double() * deq.double()
        with torch.no_grad():
            expected = linear(x).double()
            fake = calibrator.model.get_submodule(Q)(x).double()
        # Elements beyond the mean extremes are clipped: few, and the rest is near.
        assert float((y - expected).abs().median()) < 0.01
        assert float((y - expected).norm() / expected.norm()) < 0.1
        assert float((y - fake).abs().max()) < 1e-4

    def test_one_scale_for_the_whole_weight(
        self, qwen2: Any, tiny_calib: Samples, tmp_path: Path
    ) -> None:
        weight = qwen2.get_submodule(Q).weight.detach().clone()
        tensors = saved(calibrated(qwen2, tiny_calib, mm_tensor=True), tmp_path)
        assert tensors[f"{Q}.weight_scale"].shape == tensors[f"{Q}.deq_scale"].shape == (1,)
        scale = weight.abs().max() / 127
        assert float(tensors[f"{Q}.weight_scale"]) == pytest.approx(float(scale), rel=1e-6)
        assert torch.equal(tensors[f"{Q}.weight"].double(), half_even(weight / scale).double())

    @pytest.mark.parametrize(
        ("dtype", "stored"), [(torch.float16, torch.int64), (torch.bfloat16, torch.float32)]
    )
    def test_scales_of_half_precision_models(
        self,
        tiny_model: Factory,
        tiny_calib: Samples,
        tmp_path: Path,
        dtype: torch.dtype,
        stored: torch.dtype,
    ) -> None:
        calibrator = calibrated(tiny_model("qwen2", dtype=dtype), tiny_calib)
        tensors = saved(calibrator, tmp_path)
        deq, scale = tensors[f"{Q}.deq_scale"], tensors[f"{Q}.input_scale"]
        assert deq.dtype == stored
        # The engine keeps the input scale in the dtype of the model: nothing is lost by that.
        assert float(scale) == float(scale.to(dtype))
        exact = scale.double() * tensors[f"{Q}.weight_scale"].double().ravel()
        if stored == torch.int64:
            deq = deq.to(torch.int32).view(torch.float32)
        # Formed in float32, also where float16 would be subnormal.
        torch.testing.assert_close(deq.double(), exact, rtol=1e-6, atol=0)

    def test_a_tiny_product_keeps_its_digits_in_float16(
        self, tiny_model: Factory, tiny_calib: Samples, tmp_path: Path
    ) -> None:
        model = tiny_model("llama", dtype=torch.float16)
        with torch.no_grad():
            model.get_submodule(Q).weight.mul_(5e-4)
        tensors = saved(calibrated(model, tiny_calib), tmp_path)
        deq = tensors[f"{Q}.deq_scale"].to(torch.int32).view(torch.float32).double()
        assert float(deq.max()) < 6e-8  # below the smallest float16
        exact = tensors[f"{Q}.input_scale"].double() * tensors[f"{Q}.weight_scale"].double().ravel()
        torch.testing.assert_close(deq, exact, rtol=1e-6, atol=0)


class TestWeightOnlyNumbers:
    def test_asymmetric_without_data(self, qwen2: Any, tmp_path: Path) -> None:
        weight = qwen2.get_submodule(Q).weight.detach().clone()
        tensors = saved(calibrated(qwen2, a_bit=16, w_sym=False), tmp_path)
        low = weight.amin(1, keepdim=True).clamp(max=0)
        high = weight.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        offset = half_even(-low / scale) - 128
        torch.testing.assert_close(tensors[f"{Q}.weight_scale"], scale, rtol=1e-6, atol=0)
        assert torch.equal(tensors[f"{Q}.weight_offset"], offset)
        codes = half_even(weight / scale + offset).clamp(-128, 127).to(torch.int8)
        assert torch.equal(tensors[f"{Q}.weight"], codes)
        local = {name.rpartition(".")[2] for name in tensors if name.startswith(f"{Q}.")}
        assert local == {"weight", "weight_scale", "weight_offset", "bias"}

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_per_group(self, qwen2: Any, tmp_path: Path, symmetric: bool) -> None:
        weight = qwen2.get_submodule(DOWN).weight.detach().clone()
        calibrator = calibrated(
            qwen2, a_bit=16, is_lowbit=True, open_outlier=False, group_size=32, w_sym=symmetric
        )
        tensors = saved(calibrator, tmp_path)
        groups = weight.reshape(64, 4, 32)
        if symmetric:
            scale, offset = groups.abs().amax(2) / 127, torch.zeros(64, 4)
        else:
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            scale = (high - low) / 255
            offset = half_even(-low / scale) - 128
        torch.testing.assert_close(tensors[f"{DOWN}.weight_scale"], scale, rtol=1e-6, atol=0)
        assert torch.equal(tensors[f"{DOWN}.weight_offset"], offset)
        codes = half_even(groups / scale[..., None] + offset[..., None]).clamp(-128, 127)
        assert torch.equal(tensors[f"{DOWN}.weight"].float(), codes.reshape(64, 128))

    def test_the_model_multiplies_by_the_stored_weight(self, qwen2: Any) -> None:
        layer = calibrated(qwen2, a_bit=16).model.get_submodule(Q)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        weight = (layer.codes.double() - layer.weight_offset) * layer.weight_scale.double()
        torch.testing.assert_close(
            layer(x).double(), x.double() @ weight.T + layer.bias, rtol=1e-4, atol=1e-5
        )


def test_per_token_activations_are_those_of_the_hardware(qwen2: Any, tmp_path: Path) -> None:
    linear = copy.deepcopy(qwen2.get_submodule(Q))
    calibrator = calibrated(qwen2, is_dynamic=True)  # no data
    layer = calibrator.model.get_submodule(Q)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    s_x = x.abs().amax(-1, keepdim=True) / 127
    q_x = half_even(x / s_x).clamp(-128, 127)
    s_w = linear.weight.detach().abs().amax(1) / 127
    q_w = half_even(linear.weight.detach() / s_w[:, None])
    expected = (q_x.double() @ q_w.double().T) * s_x * s_w + linear.bias.detach()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    local = {n.rpartition(".")[2] for n in saved(calibrator, tmp_path) if n.startswith(f"{Q}.")}
    assert local == {"weight", "weight_scale", "weight_offset", "bias"}


class TestActivationMethods:
    def test_all_give_a_working_model(
        self, tiny_model: Factory, tiny_calib: Samples, tiny_ids: Factory
    ) -> None:
        ids = tiny_ids(24, seed=9)
        with torch.no_grad():
            expected = tiny_model("llama")(ids).logits
            for method in (1, 2, 3):
                model = calibrated(tiny_model("llama"), tiny_calib, act_method=method).model
                error = (model(ids).logits - expected).norm() / expected.norm()
                assert 0 < float(error) < 0.1

    def test_histogram_loses_no_more_than_mean_extremes_on_heavy_tails(self) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = []
        for _ in range(4):
            x = torch.randn(1, 600, 64, generator=generator)
            x[0, :2] *= 6  # two loud tokens of 600
            samples.append([x])
        errors = {}
        for method in (1, 2):
            model = Lone()
            layer = calibrated(model, samples, act_method=method, disable_last_linear=False).model.a
            errors[method] = 0.0
            for (x,) in samples:
                codes = half_even(x / layer.input_scale + layer.input_offset).clamp(-128, 127)
                back = (codes - layer.input_offset) * layer.input_scale
                errors[method] += float((back - x).pow(2).sum())
        assert errors[2] <= errors[1]

    def test_pr_is_seeded_and_changes_only_later_layers(
        self, tiny_model: Factory, tiny_calib: Samples
    ) -> None:
        def scales(pr: float, seed: int = 0) -> dict[str, float]:
            model = tiny_model("llama")
            torch.manual_seed(seed)  # the choice does not hang on the state of the process
            calibrated(model, tiny_calib, pr=pr)
            return {
                name: float(module.input_scale)
                for name, module in model.named_modules()
                if isinstance(module, FakeQuantLinear)
            }

        half, again, full, none = scales(0.5), scales(0.5, seed=1), scales(1.0), scales(0.0)
        assert half == again
        assert half[Q] == full[Q] == none[Q]
        last = "model.layers.1.mlp.down_proj"
        assert len({half[last], full[last], none[last]}) == 3
        assert half[last] == pytest.approx(full[last], rel=0.05)


class Lone(nn.Module):
    """Two linear layers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False)
        for linear in (self.a, self.b):
            linear.weight.data.normal_(generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def kinds(calibrator: Calibrator) -> dict[str, str]:
    """Return the type of every linear layer."""
    return {
        name: module.scheme.ascend_type if isinstance(module, FakeQuantLinear) else "FLOAT"
        for name, module in calibrator.model.named_modules()
        if isinstance(module, (FakeQuantLinear, nn.Linear))
    }


class TestFallback:
    def test_level_0_leaves_only_the_head(self, qwen2: Any, tiny_calib: Samples) -> None:
        found = kinds(calibrated(qwen2, tiny_calib))
        assert {name for name, kind in found.items() if kind == "FLOAT"} == {"lm_head"}

    def test_disable_last_linear_goes_by_registration(
        self, qwen2: Any, tiny_calib: Samples
    ) -> None:
        found = kinds(calibrated(qwen2, tiny_calib, disable_last_linear=False))
        assert "FLOAT" not in found.values()

    def test_the_most_extreme_inputs_fall_back(
        self, tiny_model: Factory, tiny_calib: Samples
    ) -> None:
        model = tiny_model("llama")
        ratio = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                seen = inputs_of(model, name, tiny_calib)
                peak = max(float(x.abs().max()) for x in seen)
                std = max(
                    float((x - (x.amax((0, 1)) + x.amin((0, 1)))).std(unbiased=True)) for x in seen
                )
                ratio[name] = peak / std
        expected = sorted(ratio, key=lambda name: -ratio[name])
        # The hardest two that no engine runs together with others.
        alone = [name for name in expected if name.endswith(("down_proj", "o_proj"))]
        assert expected[:2] == alone[:2]
        found = kinds(calibrated(model, tiny_calib, disable_level="L2"))
        assert {n for n, kind in found.items() if kind == "FLOAT"} == {"lm_head", *expected[:2]}

    def test_siblings_stay_together(
        self, tiny_model: Factory, tiny_calib: Samples, plant_outliers: Callable[..., None]
    ) -> None:
        model = tiny_model("llama")
        layer = model.model.layers[1]
        readers = [layer.mlp.gate_proj, layer.mlp.up_proj]
        plant_outliers(layer.post_attention_layernorm, readers, [3], 200.0)
        found = kinds(calibrated(model, tiny_calib, disable_level="L1"))
        floats = {name for name, kind in found.items() if kind == "FLOAT"}
        mlp = "model.layers.1.mlp"
        assert floats == {"lm_head", f"{mlp}.gate_proj", f"{mlp}.up_proj"}

    def test_more_than_there_are(self, qwen2: Any, tiny_calib: Samples, tmp_path: Path) -> None:
        calibrator = calibrated(qwen2, tiny_calib, disable_level="L1000")
        assert set(kinds(calibrator).values()) == {"FLOAT"}
        calibrator.save(str(tmp_path / "out"))
        assert set(open_checkpoint(tmp_path / "out").tensors) == set(qwen2.state_dict())

    def test_without_data_the_level_does_not_count(self, qwen2: Any) -> None:
        found = kinds(calibrated(qwen2, None, a_bit=16, disable_level="L5"))
        assert [name for name, kind in found.items() if kind == "FLOAT"] == ["lm_head"]

    def test_disabled_layers_do_not_count(self, tiny_model: Factory, tiny_calib: Samples) -> None:
        floats = {
            name
            for name, kind in kinds(
                calibrated(
                    tiny_model("llama"), tiny_calib, disable_names=[DOWN], disable_level="L1"
                )
            ).items()
            if kind == "FLOAT"
        }
        assert DOWN in floats
        assert len(floats) == 3

    @pytest.mark.parametrize("level", ["l1", "L01", "5", "L-1", "L1.0", "", "L 1", "L٣"])
    def test_malformed_levels(self, level: str) -> None:
        with pytest.raises(InvalidValueError, match="disable_level"):
            parse_level(level)

    def test_levels(self) -> None:
        assert [parse_level(level) for level in ("L0", "L5", "L100")] == [0, 5, 100]
        with pytest.raises(InvalidTypeError, match="disable_level"):
            parse_level(5)


class TestDisableNames:
    def test_names_and_patterns(self, qwen2: Any, tiny_calib: Samples) -> None:
        found = kinds(calibrated(qwen2, tiny_calib, disable_names=[Q, "*.down_proj"]))
        floats = {name for name, kind in found.items() if kind == "FLOAT"}
        assert floats == {"lm_head", Q, DOWN, DOWN.replace("0", "1")}

    def test_a_near_miss_is_named(self, qwen2: Any, tiny_calib: Samples) -> None:
        config = QuantConfig(mm_tensor=False, disable_names=["model.layers.0.self_attn.qproj"])
        with pytest.raises(PatternError, match="qproj") as caught:
            Calibrator(qwen2, config, tiny_calib)
        assert repr(Q) in str(caught.value)
        assert isinstance(caught.value, ValueError)

    def test_modules_that_are_never_quantized_may_be_named(
        self, tiny_model: Factory, tiny_calib: Samples
    ) -> None:
        names = ["model.layers.0.self_attn", "model.layers.1.mlp.gate"]
        found = kinds(calibrated(tiny_model("qwen3_moe"), tiny_calib, disable_names=names))
        assert found["model.layers.0.self_attn.q_proj"] == "W8A8"


class TestMixed:
    MIX: dict[str, str] = {  # noqa: RUF012  (read only)
        "*down*": "w8a16",
        "*o_proj": "w8a8_dynamic",
        "*k_proj": "float",
        "*": "w8a8",
    }

    def test_types_by_name(self, tiny_model: Factory, tiny_calib: Samples, tmp_path: Path) -> None:
        calibrator = calibrated(tiny_model("llama"), tiny_calib, mix_cfg=self.MIX)
        found = kinds(calibrator)
        for index in range(2):
            base = f"model.layers.{index}"
            assert found[f"{base}.mlp.down_proj"] == "W8A16"
            assert found[f"{base}.self_attn.o_proj"] == "W8A8_DYNAMIC"
            assert found[f"{base}.self_attn.k_proj"] == "FLOAT"
            assert found[f"{base}.self_attn.q_proj"] == "W8A8"
        assert found["lm_head"] == "FLOAT"
        calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
        description = QuantizedCheckpoint(tmp_path / "out").description
        assert {name: description[f"{name}.weight"] for name in found} == found
        assert description["model_quant_type"] == "W8A8"

    def test_fallback_goes_before(self, tiny_model: Factory, tiny_calib: Samples) -> None:
        found = kinds(
            calibrated(
                tiny_model("llama"), tiny_calib, mix_cfg={"*": "w8a16"}, disable_names=[DOWN]
            )
        )
        assert found[DOWN] == found["lm_head"] == "FLOAT"
        assert found[Q] == "W8A16"

    def test_an_exact_name_goes_before_patterns_and_order_decides(
        self, tiny_model: Factory, tiny_calib: Samples
    ) -> None:
        mix = {"*": "w8a16", "*down*": "w8a8_dynamic", Q: "float"}
        found = kinds(calibrated(tiny_model("llama"), tiny_calib, mix_cfg=mix))
        assert found[Q] == "FLOAT"
        assert found[DOWN] == "W8A16"

    def test_experts_are_per_token_unless_it_says_otherwise(
        self, tiny_model: Factory, tiny_calib: Samples
    ) -> None:
        expert = "model.layers.0.mlp.experts.0.up_proj"
        assert kinds(calibrated(tiny_model("qwen3_moe"), tiny_calib))[expert] == "W8A8_DYNAMIC"
        mix = {"*.experts.*": "w8a8", "*.mlp.gate": "float"}
        found = kinds(calibrated(tiny_model("qwen3_moe"), tiny_calib, mix_cfg=mix))
        assert found[expert] == "W8A8"

    @pytest.mark.parametrize(
        ("mix", "error", "names"),
        [
            ([("*", "w8a8")], InvalidTypeError, "mix_cfg must be dict"),
            ({1: "w8a8"}, InvalidTypeError, "a key of mix_cfg"),
            ({"*": "w8a9"}, InvalidValueError, "w8a9"),
            ({"*": None}, InvalidValueError, "mix_cfg"),
            ({"*dwn_proj": "float"}, PatternError, "dwn_proj"),
        ],
    )
    def test_errors(self, qwen2: Any, mix: Any, error: type[SlimError], names: str) -> None:
        with pytest.raises(error, match=names):
            Calibrator(qwen2, QuantConfig(a_bit=16), mix_cfg=mix)

    def test_static_types_among_grouped_weights(self, tiny_model: Factory, qwen2: Any) -> None:
        config = QuantConfig(a_bit=16, is_lowbit=True, open_outlier=False, act_method=2)
        found = kinds_of_construction(qwen2, config, {"*down*": "w8a8_dynamic"})
        assert found[DOWN] == "w8a8_dynamic"
        with pytest.raises(CalibrationError, match="static"):
            Calibrator(tiny_model("llama"), config, mix_cfg={"*down*": "w8a8"})


def kinds_of_construction(model: Any, config: QuantConfig, mix: dict[str, str]) -> dict[str, str]:
    calibrator = Calibrator(model, config, mix_cfg=mix)
    calibrator.run()
    return {
        name: str(module.scheme)
        for name, module in calibrator.model.named_modules()
        if isinstance(module, FakeQuantLinear)
    }


class TestErrors:
    def test_arguments_stand_in_the_classic_order(self) -> None:
        assert list(inspect.signature(Calibrator).parameters) == [
            *("model", "cfg", "calib_data", "disable_level", "all_tensors", "mix_cfg")
        ]

    @pytest.mark.parametrize(
        ("change", "error", "names"),
        [
            ({"model": "llama"}, InvalidTypeError, "model"),
            ({"cfg": {"w_bit": 8}}, InvalidTypeError, "cfg"),
            ({"calib_data": ()}, InvalidTypeError, "calib_data must be list"),
            ({"calib_data": [(torch.ones(1, 3),)]}, InvalidTypeError, r"calib_data\[0\]"),
            ({"calib_data": [[]]}, CalibrationError, r"calib_data\[0\] is empty"),
            ({"calib_data": [[torch.ones(1, 0)]]}, CalibrationError, "without elements"),
            ({"disable_level": 5}, InvalidTypeError, "disable_level"),
            ({"disable_level": "5"}, InvalidValueError, "disable_level"),
            ({"all_tensors": []}, InvalidTypeError, "all_tensors"),
            ({"model": nn.ReLU()}, InvalidTypeError, "model must be one of"),
            ({"model": nn.LayerNorm(4)}, StructureError, "LayerNorm has no linear layer"),
        ],
    )
    def test_arguments(
        self,
        qwen2: Any,
        tiny_calib: Samples,
        change: dict[str, Any],
        error: type[SlimError],
        names: str,
    ) -> None:
        given = {"model": qwen2, "cfg": QuantConfig(), "calib_data": tiny_calib, **change}
        with pytest.raises(error, match=names):
            Calibrator(**given)

    @pytest.mark.parametrize("data", [None, []])
    def test_static_types_need_data(self, qwen2: Any, data: Any) -> None:
        with pytest.raises(ValueError, match="calib_data is empty"):
            Calibrator(qwen2, QuantConfig(), data)

    @pytest.mark.parametrize("given", [{"a_bit": 16}, {"is_dynamic": True}])
    def test_other_types_need_none(self, qwen2: Any, given: dict[str, Any]) -> None:
        assert "FLOAT" in kinds(calibrated(qwen2, None, **given)).values()

    def test_a_refused_configuration_leaves_the_model_float(
        self, qwen2: Any, tiny_calib: Samples
    ) -> None:
        with pytest.raises(PatternError):
            Calibrator(qwen2, QuantConfig(disable_names=["nowhere"]), tiny_calib)
        assert not any(isinstance(module, FakeQuantLinear) for module in qwen2.modules())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("given", [{}, {"a_bit": 16}, {"is_dynamic": True}])
    def test_a_damaged_weight_is_named_and_the_model_given_back(
        self, qwen2: Any, tiny_calib: Samples, value: float, given: dict[str, Any]
    ) -> None:
        with torch.no_grad():
            qwen2.get_submodule(DOWN).weight[3, 5] = value
        calibrator = Calibrator(qwen2, QuantConfig(mm_tensor=False, **given), tiny_calib)
        with pytest.raises(NumericalError, match=f"the weight of {DOWN} has 1 NaN or infinite"):
            calibrator.run()
        assert not any(isinstance(module, FakeQuantLinear) for module in qwen2.modules())
        with pytest.raises(InvalidValueError, match="run"):
            calibrator.save("nowhere")

    def test_a_damaged_activation_is_named_and_the_model_given_back(
        self, qwen2: Any, tiny_calib: Samples
    ) -> None:
        with torch.no_grad():
            qwen2.model.layers[1].post_attention_layernorm.weight[7] = float("inf")
        calibrator = Calibrator(qwen2, QuantConfig(mm_tensor=False), tiny_calib)
        with pytest.raises(
            NumericalError, match=r"the input of model\.layers\.1\.mlp\.gate_proj has"
        ):
            calibrator.run()
        assert {type(m) for n, m in qwen2.named_modules() if n.endswith("_proj")} == {nn.Linear}

    @pytest.mark.parametrize(
        "sample", [{"words": torch.ones(1, 3)}, [torch.full((1, 3), 999)], [[1, 2, 3]]]
    )
    def test_a_sample_that_the_model_does_not_take(
        self, qwen2: Any, tiny_calib: Samples, sample: Any
    ) -> None:
        calibrator = Calibrator(qwen2, QuantConfig(), [*tiny_calib, sample])
        with pytest.raises(CalibrationError, match=r"calib_data\[4\]") as caught:
            calibrator.run()
        assert caught.value.__cause__ is not None

    def test_a_group_size_that_does_not_divide_names_the_layer(self, tiny_model: Factory) -> None:
        model = tiny_model("llama", intermediate_size=80)
        config = QuantConfig(a_bit=16, is_lowbit=True, open_outlier=False, group_size=32)
        with pytest.raises(SlimError, match=DOWN):
            Calibrator(model, config).run()

    def test_run_is_done_once(self, qwen2: Any) -> None:
        calibrator = calibrated(qwen2, None, a_bit=16)
        with pytest.raises(InvalidValueError, match="quantized already"):
            calibrator.run()
        with pytest.raises(InvalidTypeError, match="int_infer"):
            Calibrator(qwen2, QuantConfig(a_bit=16)).run(int_infer=1)  # type: ignore[arg-type]


def test_samples_may_be_dicts(tiny_model: Factory, tiny_calib: Samples) -> None:
    dicts = [{"input_ids": ids, "attention_mask": mask} for ids, mask in tiny_calib]
    one = calibrated(tiny_model("llama"), tiny_calib).model
    other = calibrated(tiny_model("llama"), dicts).model
    assert one.get_submodule(DOWN).input_scale == other.get_submodule(DOWN).input_scale


def test_the_same_object_is_quantized_and_generates(qwen2: Any, tiny_calib: Samples) -> None:
    calibrator = calibrated(qwen2, tiny_calib)
    assert calibrator.model is qwen2
    ids = qwen2.generate(tiny_calib[0][0], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape == (1, 17)


def test_an_expert_that_no_token_reached_takes_the_range_of_another(
    tiny_model: Factory,
) -> None:
    samples = [[torch.tensor([[5, 6]])]]  # two tokens reach at most four of eight experts
    mix = {"*.experts.*": "w8a8"}
    model = calibrated(tiny_model("qwen3_moe"), samples, mix_cfg=mix).model
    scales = {
        float(module.input_scale)
        for name, module in model.named_modules()
        if ".layers.0." in name and name.endswith("up_proj")
    }
    assert 1 <= len(scales) <= 4
