"""Layers as the slices that several devices hold: scales, files, and what is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from slim_core.errors import FormatError, InvalidValueError, StructureError
from slim_core.pickles import load_npy_dict
from slim_core.quantized import QuantizedCheckpoint
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, FakeQuantizeCalibrator, QuantConfig, dequantize, load_model
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.tensor_parallel import ParallelLinear

Factory = Callable[..., Any]
O_PROJ = "model.layers.0.self_attn.o_proj"
WEIGHTS, DESCRIPTION = (
    "quant_model_weight_w8a8.safetensors",
    "quant_model_description_w8a8.json",
)


def quantized(model: Any, calib: Any, devices: int = 2, **given: Any) -> Calibrator:
    made = Calibrator(model, QuantConfig(mm_tensor=False).simulate_tp(devices, **given), calib)
    made.run()
    return made


@pytest.fixture(scope="module")
def calibrator(tiny_model: Factory, tiny_calib: Any) -> Calibrator:
    return quantized(tiny_model("llama"), tiny_calib)


@pytest.fixture(scope="module")
def directory(calibrator: Calibrator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Path = tmp_path_factory.mktemp("parallel") / "out"
    calibrator.save(str(target))
    calibrator.model.config.save_pretrained(target)
    return target


def test_row_parallel_layers_become_slices_and_no_others(calibrator: Calibrator) -> None:
    for name, module in calibrator.model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            assert isinstance(module, ParallelLinear)
            assert len(module.tp_list) == 2
        if name.endswith(("q_proj", "gate_proj")):
            assert isinstance(module, FakeQuantLinear)


def test_each_slice_is_a_layer_of_its_own(tiny_model: Factory, tiny_calib: Any) -> None:
    made = quantized(tiny_model("llama"), tiny_calib)
    weight = tiny_model("llama").get_submodule(O_PROJ).weight
    layer = made.model.get_submodule(O_PROJ)
    for slice_, part in zip(layer.tp_list, weight.chunk(2, dim=1), strict=True):
        scale = part.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(slice_.weight_scale, scale)
        assert torch.equal(slice_.codes, (part / scale).round().to(torch.int8))
    ranges = [slice_.input_scale for slice_ in layer.tp_list]
    assert not torch.equal(*ranges)


def test_scales_of_what_devices_exchange(calibrator: Calibrator, tiny_calib: Any) -> None:
    """The largest magnitude over all samples by 127, of products and of rounded sums."""
    layer: Any = calibrator.model.get_submodule(O_PROJ)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    with torch.no_grad():
        for sample in tiny_calib:
            calibrator.model(*sample)
    handle.remove()
    x = torch.cat([given.flatten(0, -2) for given in inputs])
    parts = [slice_(half) for slice_, half in zip(layer.tp_list, x.chunk(2, -1), strict=True)]
    for part, scale in zip(parts, layer.reduce_scale, strict=True):
        torch.testing.assert_close(scale, part.abs().amax(0) / 127)
    rounded = [
        (part / scale).round() * scale
        for part, scale in zip(parts, layer.reduce_scale, strict=True)
    ]
    torch.testing.assert_close(layer.gather_scale, (rounded[0] + rounded[1]).abs().amax(0) / 127)


def test_one_scale_for_all_devices(tiny_model: Factory, tiny_calib: Any, tmp_path: Path) -> None:
    own = quantized(tiny_model("llama"), tiny_calib).model.get_submodule(O_PROJ)
    made = quantized(tiny_model("llama"), tiny_calib, enable_per_device_quant=False)
    layer: Any = made.model.get_submodule(O_PROJ)
    assert torch.equal(layer.reduce_scale, own.reduce_scale.amax(0, keepdim=True))
    made.save(str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(tensors[f"{O_PROJ}.reduce_scale"], layer.reduce_scale[0])
    assert not any(".reduce_scale." in name for name in tensors)


def test_without_rounding_the_sum_is_that_of_the_slices(
    tiny_model: Factory, tiny_calib: Any, tmp_path: Path
) -> None:
    made = quantized(tiny_model("llama"), tiny_calib, 4, enable_communication_quant=False)
    layer: Any = made.model.get_submodule(O_PROJ)
    x = torch.randn(3, 5, 64)
    expected = sum(s(part) for s, part in zip(layer.tp_list, x.chunk(4, -1), strict=True))
    torch.testing.assert_close(layer(x), expected)
    made.save(str(tmp_path / "out"))
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert "reduce_quant_type" not in description
    assert not any("reduce_scale" in name or "gather" in name for name in description)


def test_only_the_first_slice_has_the_bias(tiny_model: Factory, tiny_calib: Any) -> None:
    model = tiny_model("bloom")
    x = torch.randn(4, 64)
    dense = model.transformer.h[0].self_attention.dense
    expected = functional.linear(x, dense.weight, dense.bias)
    made = quantized(model, tiny_calib, enable_communication_quant=False)
    layer: Any = made.model.get_submodule("transformer.h.0.self_attention.dense")
    assert [slice_.bias is None for slice_ in layer.tp_list] == [False, True]
    for slice_ in layer.tp_list:  # wide enough that nothing of x is cut off
        slice_.input_scale.fill_(4 / 127)
        slice_.input_offset.zero_()
        slice_.deq_scale, slice_.quant_bias = slice_.layer("").folded()
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()


class TestFiles:
    def test_names_types_and_shapes(self, calibrator: Calibrator, directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        description = json.loads((directory / DESCRIPTION).read_text())
        own = {
            name.removeprefix(f"{O_PROJ}."): (tensor.dtype, tuple(tensor.shape))
            for name, tensor in tensors.items()
            if name.startswith(O_PROJ)
        }
        parameters = {
            "weight": (torch.int8, (64, 32)),
            "weight_scale": (torch.float32, (64, 1)),
            "weight_offset": (torch.float32, (64, 1)),
            "input_scale": (torch.float32, (1,)),
            "input_offset": (torch.float32, (1,)),
            "quant_bias": (torch.int32, (64,)),
            "deq_scale": (torch.int64, (64,)),
        }
        assert own == {
            f"tp_list.{i}.{name}": kind for i in range(2) for name, kind in parameters.items()
        } | {
            "weight": (torch.int8, (64, 64)),
            "reduce_scale.0": (torch.float32, (64,)),
            "reduce_scale.1": (torch.float32, (64,)),
            "gather_scale": (torch.float32, (64,)),
        }
        assert {description[f"{O_PROJ}.{name}"] for name in own} == {"W8A8"}
        assert description["reduce_quant_type"] == "per_channel"
        slices = [tensors[f"{O_PROJ}.tp_list.{i}.weight"] for i in range(2)]
        assert torch.equal(tensors[f"{O_PROJ}.weight"], torch.cat(slices, dim=1))

    def test_a_float_layer_stays_whole(
        self, tiny_model: Factory, tiny_calib: Any, tmp_path: Path
    ) -> None:
        config = QuantConfig(disable_names=[O_PROJ]).simulate_tp(2)
        made = Calibrator(tiny_model("llama"), config, tiny_calib)
        made.run()
        made.save(str(tmp_path / "out"))
        description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
        assert [n for n in description if n.startswith(O_PROJ)] == [f"{O_PROJ}.weight"]

    def test_numpy(self, calibrator: Calibrator, tmp_path: Path) -> None:
        calibrator.save(str(tmp_path / "out"), save_type=["numpy"])
        weights = load_npy_dict(tmp_path / "out" / "quant_weight.npy")
        layer: Any = calibrator.model.get_submodule(O_PROJ)
        assert torch.equal(torch.as_tensor(weights[f"{O_PROJ}.tp_list.1"]), layer.tp_list[1].codes)
        assert f"{O_PROJ}.gather_scale" in weights

    def test_ascend_v1_is_refused(self, calibrator: Calibrator, tmp_path: Path) -> None:
        with pytest.raises(InvalidValueError, match="ascendV1 cannot hold the slices"):
            calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
        assert not (tmp_path / "out").exists()


class TestReadBack:
    def test_the_same_logits(
        self, calibrator: Calibrator, directory: Path, tiny_model: Factory, tiny_ids: Factory
    ) -> None:
        ids = tiny_ids()
        with torch.no_grad():
            expected = calibrator.model(ids).logits
            assert torch.equal(load_model(directory)(ids).logits, expected)
            description = json.loads((directory / DESCRIPTION).read_text())
            tensors = load_file(directory / WEIGHTS)
            again = FakeQuantizeCalibrator(
                tiny_model("llama", seed=1), None, "cpu", description, tensors
            )
            again.model.load_state_dict(
                {name: t for name, t in tensors.items() if description[name] == "FLOAT"},
                strict=False,
            )
            assert torch.equal(again.model(ids).logits, expected)

    def test_dequantized(self, calibrator: Calibrator, directory: Path, tmp_path: Path) -> None:
        dequantize(directory, tmp_path / "float")
        tensors = load_file(tmp_path / "float" / "model.safetensors")
        layer: Any = calibrator.model.get_submodule(O_PROJ)
        weights = [slice_.weight for slice_ in layer.tp_list]
        torch.testing.assert_close(tensors[f"{O_PROJ}.weight"], torch.cat(weights, dim=1))
        assert not any("tp_list" in name or "gather" in name for name in tensors)

    def test_verified(self, directory: Path) -> None:
        assert verify_checkpoint(directory).problems == ()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t: t[f"{O_PROJ}.weight"].neg_(), "not that of its slices side by side"),
            (lambda t: t[f"{O_PROJ}.gather_scale"].zero_(), "not positive"),
            (lambda t: t.pop(f"{O_PROJ}.reduce_scale.1"), "reduce_scale.1 is not stored"),
            (
                lambda t: t.update({f"{O_PROJ}.gather_scale": torch.ones(3)}),
                "must be float32 of shape",
            ),
        ],
    )
    def test_damage_is_named(
        self, directory: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
    ) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / WEIGHTS)
        for name in (DESCRIPTION, "config.json"):
            (tmp_path / name).write_bytes((directory / name).read_bytes())
        assert any(said in problem for problem in verify_checkpoint(tmp_path).problems)

    def test_a_lost_slice_is_named(self, directory: Path, tmp_path: Path) -> None:
        description = json.loads((directory / DESCRIPTION).read_text())
        kept = {k: v for k, v in description.items() if ".o_proj.tp_list.0." not in k}
        (tmp_path / DESCRIPTION).write_text(json.dumps(kept))
        (tmp_path / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes())
        with pytest.raises(FormatError, match="numbered from 0 on, not 1"):
            QuantizedCheckpoint(tmp_path)


def test_a_size_that_does_not_divide_is_refused(tiny_model: Factory, tiny_calib: Any) -> None:
    model = tiny_model("llama", intermediate_size=100)
    with pytest.raises(InvalidValueError, match=r"tp_size 8 does not divide the 100 .*down_proj"):
        Calibrator(model, QuantConfig().simulate_tp(8), tiny_calib)


def test_a_model_without_such_layers_is_refused(tiny_model: Factory, tiny_calib: Any) -> None:
    config = QuantConfig(disable_names=["*o_proj", "*down_proj"]).simulate_tp(2)
    with pytest.raises(StructureError, match="no W8A8 layer that devices share"):
        Calibrator(tiny_model("llama"), config, tiny_calib)


def test_mixed_with_types_that_are_not_sliced(tiny_model: Factory, tiny_calib: Any) -> None:
    config = QuantConfig(mm_tensor=False).simulate_tp(2)
    made = Calibrator(tiny_model("llama"), config, tiny_calib, mix_cfg={"*down_proj": "w8a16"})
    made.run()
    mlp: Any = made.model.model.layers[0].mlp
    assert str(mlp.down_proj.scheme) == "w8a16"
    assert isinstance(made.model.get_submodule(O_PROJ), ParallelLinear)
