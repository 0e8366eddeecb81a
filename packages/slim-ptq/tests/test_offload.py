"""Models that accelerate offloads: the same integers, and weights back where they came from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.errors import StructureError
from slim_ptq import AntiOutlier, AntiOutlierConfig, Calibrator, FakeQuantizeCalibrator, QuantConfig
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.offload import discard, input_device, is_dispatched, keep_like, resident

accelerate = pytest.importorskip("accelerate")

DISK_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(params=["device_map", "cpu_offload", "disk_offload"])
def offloaded(request: Any, saved_model: Any, tmp_path: Path) -> Callable[[str], Any]:
    """Opens a tiny model with its weights offloaded."""

    def load(family: str) -> Any:
        folder = tmp_path / "offload"
        if request.param == "device_map":
            return AutoModelForCausalLM.from_pretrained(
                saved_model(family), device_map=DISK_MAP, offload_folder=folder
            )
        model = AutoModelForCausalLM.from_pretrained(saved_model(family))
        if request.param == "cpu_offload":
            return accelerate.cpu_offload(model, execution_device="cpu")
        return accelerate.disk_offload(model, folder, execution_device="cpu")

    return load


CONFIGS: dict[str, Callable[[], QuantConfig]] = {
    "w8a8_dynamic, kv": lambda: QuantConfig(mm_tensor=False, is_dynamic=True).kv_quant(),
    "w8a8, fa": lambda: QuantConfig(mm_tensor=False).fa_quant(),
    "w8a16, gptq": lambda: QuantConfig(8, 16, mm_tensor=False, w_method="GPTQ"),
}


def run(model: Any, config: QuantConfig, samples: Any, out: Path) -> dict[str, torch.Tensor]:
    calibrator = Calibrator(model, config, calib_data=samples)
    calibrator.run()
    calibrator.save(str(out), save_type=["ascendV1"])
    return load_file(str(next(out.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantization_is_that_of_the_model_in_memory(
    offloaded: Any,
    saved_model: Any,
    tiny_calib: Any,
    tmp_path: Path,
    kind: str,
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    model = offloaded("llama")
    assert is_dispatched(model)
    expected = run(plain, CONFIGS[kind](), tiny_calib, tmp_path / "plain")
    found = run(model, CONFIGS[kind](), tiny_calib, tmp_path / "offloaded")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(tiny_calib[0][0]).logits, plain(tiny_calib[0][0]).logits)


def test_suppression_goes_back_to_the_store(
    offloaded: Any, saved_model: Any, tiny_calib: Any
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved_model("qwen2"))
    model = offloaded("qwen2")
    for item in (plain, model):
        AntiOutlier(item, tiny_calib, AntiOutlierConfig(anti_method="m4")).process()
    block = model.model.layers[1]
    assert all(parameter.is_meta for parameter in block.parameters())
    with resident(block):
        for name, parameter in plain.model.layers[1].named_parameters():
            assert torch.equal(block.get_parameter(name), parameter), name
    with torch.no_grad():
        assert torch.equal(model(tiny_calib[0][0]).logits, plain(tiny_calib[0][0]).logits)


def test_a_checkpoint_opens_on_an_offloaded_model(
    offloaded: Any, saved_model: Any, tiny_calib: Any, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    AntiOutlier(plain, tiny_calib, AntiOutlierConfig(anti_method="m6")).process()
    tensors = run(plain, QuantConfig(mm_tensor=False), tiny_calib, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    model = FakeQuantizeCalibrator(offloaded("llama"), None, "cpu", description, tensors).model
    with torch.no_grad():
        assert torch.equal(model(tiny_calib[0][0]).logits, plain(tiny_calib[0][0]).logits)
    assert model.model.layers[1].mlp.up_proj.codes.is_meta


def test_the_files_of_the_float_model_are_not_touched(
    offloaded: Any, saved_model: Any, tiny_calib: Any, tmp_path: Path
) -> None:
    source = saved_model("llama") / "model.safetensors"
    before = source.read_bytes()
    model = offloaded("llama")
    AntiOutlier(model, tiny_calib, AntiOutlierConfig(anti_method="m4")).process()
    run(model, QuantConfig(mm_tensor=False), tiny_calib, tmp_path / "out")
    assert source.read_bytes() == before


def double_and_fail(block: nn.Module) -> None:
    with resident(block, changed=True):
        block.mlp.up_proj.weight = nn.Parameter(block.mlp.up_proj.weight * 2)
        raise RuntimeError


def test_nothing_is_written_back_after_an_error(offloaded: Any) -> None:
    block = offloaded("llama").model.layers[1]
    with resident(block):
        before = copy.deepcopy(block.mlp.up_proj.weight)
    with pytest.raises(RuntimeError):
        double_and_fail(block)
    with resident(block):
        assert torch.equal(block.mlp.up_proj.weight, before)


def test_discarded_buffers_leave_nothing(offloaded: Any, tmp_path: Path) -> None:
    model = offloaded("llama")
    linear = model.model.layers[1].mlp.up_proj
    stored = len(list(tmp_path.rglob("*.dat")))
    other = nn.Module()
    other.register_buffer("weight", torch.ones(3))
    keep_like(other, linear, "other.")
    assert other.weight.is_meta
    with resident(other):
        assert torch.equal(other.weight, torch.ones(3))
    discard(other)
    assert len(list(tmp_path.rglob("*.dat"))) == stored


def test_a_model_on_one_device_is_as_it_was(saved_model: Any, tiny_calib: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved_model("llama"), device_map={"": "cpu"})
    Calibrator(model, QuantConfig(mm_tensor=False), calib_data=tiny_calib).run()
    assert input_device(model) == torch.device("cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, FakeQuantLinear)


def test_offloaded_fused_experts_are_refused(tiny_model: Any, tiny_calib: Any) -> None:
    model = tiny_model("qwen3_moe")
    if not any(parameter.ndim == 3 for parameter in model.parameters()):
        pytest.skip("this transformers keeps experts apart")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(StructureError, match=r"fused experts .* are offloaded"):
        Calibrator(model, QuantConfig(mm_tensor=False), calib_data=tiny_calib)
