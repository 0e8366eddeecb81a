"""Low-bit types from a model to files, against their published formulas; both interfaces alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from slim_core.errors import InvalidValueError, PlanError
from slim_core.groups import group_by
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.scheme import KNOWN_SCHEMES
from slim_core.tables import NF4
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig, load_model, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.dequantizing import dequantize
from slim_ptq.mixed import resolve_mix, with_model_default
from slim_ptq.prepare import prepare

Factory = Callable[..., Any]

FLAT = "w4a4_flatquant_dynamic"
P, D = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
GROUPED = {"is_lowbit": True, "open_outlier": False, "group_size": 32}
# type -> scheme of a recipe, parameters of QuantConfig
FACES: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A16": ("w8a16_asym", {"a_bit": 16, "w_sym": False}),
    "W4A16": ("w4a16", {"w_bit": 4, "a_bit": 16}),
    "W4A16 in groups": ("w4a16_g32_asym", {"w_bit": 4, "a_bit": 16, "w_sym": False, **GROUPED}),
    "W4A8_DYNAMIC": ("w4a8_dynamic_g32", {"w_bit": 4, "is_dynamic": True, **GROUPED}),
    "NF4": ("nf4", {"w_bit": 4, "a_bit": 16, "w_method": "NF"}),
    "W8A8_DYNAMIC": ("w8a8_dynamic", {"is_dynamic": True}),
}


def classic(model: nn.Module, path: Path, form: str = "ascendV1", **given: Any) -> Path:
    """Quantize without data, save beside a config.json, and return the directory."""
    config = model.config
    calibrator = Calibrator(model, QuantConfig(**{"mm_tensor": False, **given}))
    calibrator.run()
    calibrator.save(str(path), save_type=[form])
    config.save_pretrained(path)
    return path


def tensors(path: Path, layer: str) -> dict[str, np.ndarray]:
    return QuantizedCheckpoint(path).tensors_of(layer)


def weight_of(model: nn.Module, layer: str) -> np.ndarray:
    weight: np.ndarray = model.get_submodule(layer).weight.detach().numpy()
    return weight


# --- closed formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [None, 32])
def test_asymmetric_weights_without_data(
    tiny_model: Factory, tmp_path: Path, bits: int, size: int | None
) -> None:
    model = tiny_model("llama")
    weight = weight_of(model, D)
    given = {"w_bit": bits, "a_bit": 16, "w_sym": False, **(GROUPED if size else {})}
    found = tensors(classic(model, tmp_path / "out", "safe_tensor", **given), D)
    assert set(found) == {"weight", "weight_scale", "weight_offset"}

    groups = weight.reshape(64, -1, size or 128)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    offset = np.rint(-low / scale) - 2 ** (bits - 1)
    codes = np.rint(groups / scale[..., None] + offset[..., None])
    codes = np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(found["weight_scale"], scale)
    np.testing.assert_array_equal(found["weight_offset"], offset)
    np.testing.assert_array_equal(found["weight"], codes.reshape(64, 128))


@pytest.mark.parametrize(("given", "axis", "size"), [({}, 1, 0), (GROUPED, 0, 32)])
def test_both_layouts_of_w4a16(
    tiny_model: Factory, tmp_path: Path, given: dict[str, Any], axis: int, size: int
) -> None:
    given = {"w_bit": 4, "a_bit": 16, **given}
    plain = classic(tiny_model("llama"), tmp_path / "plain", "safe_tensor", **given)
    packed = classic(tiny_model("llama"), tmp_path / "packed", **given)
    codes = tensors(plain, P)["weight"]
    stored = tensors(packed, P)["weight"].view(np.uint8)
    assert stored.shape == ((64, 32), (32, 64))[axis == 0]
    low, high = (codes.take(range(first, 64, 2), axis).view(np.uint8) & 15 for first in (0, 1))
    np.testing.assert_array_equal(stored, low + 16 * high)
    description = json.loads((packed / "quant_model_description.json").read_text())
    assert description["group_size"] == size
    assert description["model_quant_type"] == "W4A16"
    assert description[f"{P}.weight_scale"] == "W4A16"
    assert (plain / "quant_model_description_w4a16.json").is_file()


def test_two_stages_of_w4a8(tiny_model: Factory, tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = weight_of(model, D)
    given = {"w_bit": 4, "is_dynamic": True, **GROUPED}
    found = tensors(classic(model, tmp_path / "plain", "safe_tensor", **given), D)
    first = np.abs(weight).max(axis=1, keepdims=True) / np.float32(119)
    q1 = np.rint(weight / first).reshape(64, 4, 32)
    second = np.maximum(1, np.rint(np.abs(q1).max(axis=2) / np.float32(7)))
    codes = np.clip(np.rint(q1 / second[..., None]), -8, 7).reshape(64, 128)
    np.testing.assert_array_equal(found["weight_scale"], first)
    np.testing.assert_array_equal(found["weight_scale_second"], second)
    np.testing.assert_array_equal(found["weight"], codes)
    assert found["weight_offset_second"].dtype == np.int64
    assert not found["weight_offset_second"].any()

    packed = classic(tiny_model("llama"), tmp_path / "packed", **given)
    restored = codes * np.repeat(second, 32, axis=1) * first
    bias = tensors(packed, D)["scale_bias"]
    expected = 8 * restored.reshape(64, 16, 8).sum(axis=2)
    assert bias.shape == (64, 16)
    np.testing.assert_allclose(bias, expected, atol=1e-5 * np.abs(expected).max())
    assert tensors(packed, P)["scale_bias"].shape == (64, 1)
    assert tensors(packed, P)["weight"].shape == (32, 64)


def test_nf4(tiny_model: Factory, tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = weight_of(model, D)
    given = {"w_bit": 4, "a_bit": 16, "w_method": "NF"}
    found = tensors(classic(model, tmp_path / "out", **given), D)
    blocks = weight.reshape(-1, 64)
    peak = np.abs(blocks).max(axis=1)
    distance = np.abs(blocks[..., None] / peak[:, None, None] - np.array(NF4.levels))
    index = distance.argmin(axis=2).ravel()
    assert found["weight"].shape == (4096,)
    np.testing.assert_array_equal(found["weight"], 16 * index[0::2] + index[1::2])
    np.testing.assert_array_equal(found["weight_absmax"], peak)
    assert found["weight_shape"].tolist() == [64, 128]


def test_block_size_of_nf4(tiny_model: Factory, tmp_path: Path) -> None:
    config = QuantConfig(w_bit=4, a_bit=16, w_method="NF").weight_quant("NF", block_size=256)
    calibrator = Calibrator(tiny_model("llama"), config)
    calibrator.run()
    calibrator.save(str(tmp_path / "out"))
    assert tensors(tmp_path / "out", P)["weight_absmax"].shape == (16,)  # of 256, across rows
    with pytest.raises(PlanError, match="block size 4096 does not divide its 2048 elements"):
        Calibrator(tiny_model("llama"), config.weight_quant("NF", block_size=4096))


def test_mixed_activations(tiny_model: Factory, tiny_calib: Any, tmp_path: Path) -> None:
    found = {}
    for pdmix in (False, True):
        for form in ("ascendV1", "safe_tensor"):
            config = QuantConfig(mm_tensor=False, pdmix=pdmix)
            calibrator = Calibrator(tiny_model("qwen2"), config, tiny_calib)
            calibrator.run()
            path = tmp_path / f"{pdmix}{form}"
            calibrator.save(str(path), save_type=[form])
            found[pdmix, form] = path
    mixed = found[True, "ascendV1"]
    assert (mixed / "quant_model_weight_w8a8_mix.safetensors").is_file()
    description = json.loads((mixed / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == description[f"{P}.deq_scale"] == "W8A8_MIX"
    assert description[f"{P}.bias"] == "FLOAT"
    assert verify_checkpoint(mixed).problems == ()
    plain = tensors(found[False, "ascendV1"], P)
    for key, array in tensors(mixed, P).items():
        np.testing.assert_array_equal(array, plain[key])
    files = [
        {file.name: file.read_bytes() for file in found[pdmix, "safe_tensor"].iterdir()}
        for pdmix in (False, True)
    ]
    assert files[0] == files[1]


# --- both interfaces ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("form", ["ascendV1", "safe_tensor"])
def test_both_interfaces_write_the_same_tensors(
    tiny_model: Factory, saved_model: Factory, tmp_path: Path, kind: str, form: str
) -> None:
    scheme, given = FACES[kind]
    old = QuantizedCheckpoint(classic(tiny_model("qwen2"), tmp_path / "old", form, **given))
    modern = "ascend_v1" if form == "ascendV1" else form
    quantize(saved_model("qwen2"), tmp_path / "new", scheme=scheme, format=modern)
    new = QuantizedCheckpoint(tmp_path / "new")
    assert old.layers == new.layers
    assert old.description == new.description
    for layer in new.layers:
        ours, theirs = old.tensors_of(layer), new.tensors_of(layer)
        assert ours.keys() == theirs.keys()
        for local, array in ours.items():
            assert array.tobytes() == theirs[local].tobytes(), f"{layer}.{local}"


# --- every type through the modern interface ------------------------------------------------------

SCHEMES = {  # and the largest median error of the logits that random weights give
    "w8a8_mix": 0.05,
    "w4a16": 0.5,
    "w4a16_g32": 0.4,
    "w4a8_dynamic": 0.5,
    "w4a8_dynamic_g32": 0.4,
    "w4a4_dynamic": 0.7,
    "w4a4_flatquant_dynamic": 0.7,
    "nf4": 0.4,
    "w8a8fp8_dynamic": 0.15,
    "w4a16_mxfp4": 0.5,
    "w4a4_mxfp4_flatquant": 0.6,
    "w8a8_mxfp8": 0.15,
    "w4a8_mxfp": 0.5,
    "w4a4_mxfp4": 0.6,
}
SHAPES = {"qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4}}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "ascend_v1"),
        ("llama", "safe_tensor"),
        ("gpt2", "ascend_v1"),
        ("qwen3_moe", "ascend_v1"),
    ],
)
def test_from_a_saved_model_to_logits_and_back_to_float(
    saved_model: Factory,
    tiny_model: Factory,
    tiny_ids: Factory,
    tmp_path: Path,
    family: str,
    scheme: str,
    form: str,
) -> None:
    shapes = SHAPES.get(family, {})
    ids = tiny_ids(20, seed=1, batch=3)
    out = tmp_path / "out"
    report = quantize(
        saved_model(family, **shapes),
        out,
        scheme=scheme,
        method="minmax",  # FlatQuant would have to train
        format=form,
        calibration=TokenWindows((ids,), "ids") if scheme == "w8a8_mix" else None,
    )
    assert verify_checkpoint(out).problems == ()
    assert report.bytes_after < report.bytes_before
    with torch.no_grad():
        expected = tiny_model(family, **shapes)(ids).logits
        loaded = load_model(out)
        found = loaded(ids).logits
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(error.median()) < SCHEMES[scheme]

    dequantize(out, tmp_path / "float")
    again = load_model(tmp_path / "float")
    name = next(iter(QuantizedCheckpoint(out).layers))
    if family == "llama":
        torch.testing.assert_close(
            again.get_submodule(name).weight, loaded.get_submodule(name).weight
        )
    with torch.no_grad():
        error = (again(ids).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(error.median()) < SCHEMES[scheme]


# --- mixtures and refusals ------------------------------------------------------------------------


def test_targets_of_mixtures() -> None:
    w4a8 = QuantConfig(w_bit=4, is_dynamic=True, **GROUPED)
    mix = {"a": "w8a8", "b": "w8a8_dynamic", "c": "w4a8_dynamic", "d": "w8a16", "e": "float"}
    assert {k: str(v) for k, v in resolve_mix(mix, w4a8, list("abcde")).items()} == {
        "a": "w8a8",
        "b": "w8a8_dynamic",
        "c": "w4a8_dynamic_g32",
        "d": "w8a16_g32",
        "e": "float",
    }
    w8a8 = QuantConfig(mm_tensor=False, group_size=128)
    assert str(resolve_mix({"a": "w4a8_dynamic"}, w8a8, ["a"])["a"]) == "w4a8_dynamic_g128"
    w4a4 = QuantConfig(w_bit=4, a_bit=4, is_dynamic=True, mm_tensor=False)
    assert str(resolve_mix({"a": "w8a8_dynamic"}, w4a4, ["a"])["a"]) == "w8a8_dynamic"
    for target in ("w8a16", "w4a8_dynamic"):
        with pytest.raises(InvalidValueError, match="W4A4_FLATQUANT_DYNAMIC goes with w8a8, w8a8_"):
            resolve_mix({"a": target}, w4a4, ["a"])


def test_what_the_classic_interface_does_for_deepseek() -> None:
    w8a8, w4a8 = QuantConfig(), QuantConfig(w_bit=4, is_dynamic=True, **GROUPED)
    assert with_model_default({}, w8a8, "deepseek_v3") == {"*.mlp.*": "w8a8_dynamic"}
    assert with_model_default({}, w8a8, "llama") == {}
    mix = {"*experts*": "w4a8_dynamic"}
    assert with_model_default(mix, w8a8, "deepseek_v3") == mix
    assert with_model_default(mix, w4a8, "deepseek_v2") == {**mix, "*": "w8a8"}
    assert with_model_default({"*": "float"}, w4a8, "deepseek_v2") == {"*": "float"}


def test_a_mixture_with_a_second_kind_of_activations(
    tiny_model: Factory, tiny_calib: Any, tmp_path: Path
) -> None:
    calibrator = Calibrator(
        tiny_model("deepseek_v3"), QuantConfig(mm_tensor=False, pdmix=True), tiny_calib
    )
    calibrator.run()
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    kinds = QuantizedCheckpoint(tmp_path / "out").layers
    assert {kind for name, kind in kinds.items() if ".mlp." in name} == {"W8A8_DYNAMIC"}
    assert {kind for name, kind in kinds.items() if "attn" in name} == {"W8A8_MIX"}


def test_numpy_has_no_place_for_the_second_stage(
    tiny_model: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = QuantConfig(w_bit=4, is_dynamic=True, **GROUPED)
    calibrator = Calibrator(tiny_model("llama"), config)
    calibrator.run()
    with pytest.raises(InvalidValueError, match="numpy cannot hold W4A8_DYNAMIC"):
        calibrator.save(str(tmp_path / "npy"), save_type=["numpy"])
    assert not (tmp_path / "npy").exists()
    calibrator.save(str(tmp_path / "both"), save_type=["safe_tensor", "numpy"])
    assert "numpy is left out" in caplog.text
    assert not list((tmp_path / "both").glob("*.npy"))


def test_numpy_of_nf4_is_complete(tiny_model: Factory, tmp_path: Path) -> None:
    path = classic(tiny_model("llama"), tmp_path / "out", "numpy", w_bit=4, a_bit=16, w_method="NF")
    files = {
        file.stem: np.load(file, allow_pickle=True).item()
        for file in path.glob("*.npy")
        if file.stem in ("quant_weight", "weight_absmax", "weight_shape")
    }
    assert files["weight_shape"][D].tolist() == [64, 128]
    assert files["quant_weight"][D].shape == (4096,)
    assert files["weight_absmax"][D].shape == (128,)


def test_odd_sizes_are_known_before_any_work(saved_model: Factory, tmp_path: Path) -> None:
    source = saved_model("llama", intermediate_size=100)
    for scheme, reason in (
        ("w4a16_g32", "group size 32 does not divide its 100 input channels"),
        ("w4a8_dynamic", "its 100 input channels are no multiple of 16"),
        ("w4a4_dynamic", "its 100 input channels do not divide"),
        ("w8a8_mxfp8", "group size 32 does not divide its 100"),
    ):
        with pytest.raises(
            PlanError, match=f"down_proj cannot be {scheme} in ascend_v1: .*{reason}"
        ):
            quantize(source, tmp_path / "out", scheme=scheme)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", [name for name in KNOWN_SCHEMES if name != "float"])
def test_what_engines_run_as_one_shares_its_type_in_every_scheme(
    saved_model: Factory, tmp_path: Path, scheme: str
) -> None:
    """Said by the plan where a rule would tear layers apart, and by `verify` of the files."""
    sizes = {"moe_intermediate_size": 256, "hidden_size": 256, "head_dim": 64}
    source = saved_model("qwen3_moe", num_experts=4, num_hidden_layers=1, **sizes)
    attention, experts = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
    other = "w8a8_dynamic" if scheme == "w8a16" else "w8a16"
    for name, group in (
        (f"{attention}.k_proj", f"{attention}.qkv"),
        (f"{experts}.2.up_proj", experts),
        (f"{experts}.0.down_proj", experts),
    ):
        recipe = Recipe.build(scheme=scheme, rules=[{"match": name, "scheme": other}])
        with pytest.raises(PlanError, match=f"{group} is run as one matrix"):
            prepare(source, recipe=recipe, plan_only=True)
    recipe = Recipe.build(scheme=scheme, exclude=[f"{attention}.q_proj"])
    with pytest.raises(PlanError, match="qkv is run as one matrix"):
        prepare(source, recipe=recipe, plan_only=True)
    plan = prepare(source, scheme=scheme, plan_only=True).plan
    for members in group_by(plan.quantized).values():
        assert len({plan.quantized[name].scheme for name in members}) == 1
    assert len(group_by(plan.quantized)) == 3  # qkv, the output projection, the experts


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_mix", "w8a8s", FLAT, "w4a4_mxfp4_flatquant"])
def test_what_engines_run_as_one_shares_its_input_in_every_scheme(
    saved_model: Factory, tiny_ids: Factory, tmp_path: Path, scheme: str
) -> None:
    """Ranges and transforms are equal bit for bit, and `verify` sees it where they are not."""
    data = TokenWindows((tiny_ids(16, batch=2),), "ids")
    method = {"name": "flatquant", "epochs": 1} if "flatquant" in scheme else None
    recipe = Recipe.build(scheme=scheme, method=method)
    quantize(saved_model("llama"), tmp_path / "out", recipe=recipe, calibration=data)
    stored = QuantizedCheckpoint(tmp_path / "out")
    keys = ("input_scale", "input_offset", "left_trans", "right_trans", "clip_ratio")
    shared = [set(keys) & stored.tensors_of(name).keys() for name in stored.layers]
    assert all(shared)
    for members in group_by(stored.layers, "input").values():
        for key in shared[0]:
            assert len({stored.tensors_of(name)[key].tobytes() for name in members}) == 1

    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = f"{P}.{'left_trans' if method else 'input_offset'}"
    tensors[name] = tensors[name] + 1
    file.chmod(0o600)
    save_file(tensors, file)
    assert any(
        "self_attn.qkv have different" in problem
        for problem in verify_checkpoint(tmp_path / "out").problems
    )


def test_experts_of_a_layer_share_a_type(saved_model: Factory, tmp_path: Path) -> None:
    source = saved_model("qwen3_moe", **SHAPES["qwen3_moe"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: w8a8_dynamic\nrules: [{match: '*experts.1.*', scheme: w4a8_dynamic}]\n"
    )
    with pytest.raises(PlanError, match=r"mlp\.experts is run as one matrix"):
        quantize(source, tmp_path / "out", recipe=recipe)
    recipe.write_text(
        "scheme: w8a8_dynamic\nrules: [{match: '*experts.*', scheme: w4a8_dynamic}]\n"
    )
    quantize(source, tmp_path / "out", recipe=recipe)
    kinds = QuantizedCheckpoint(tmp_path / "out").layers
    assert {kind for name, kind in kinds.items() if "experts" in name} == {"W4A8_DYNAMIC"}
    assert {kind for name, kind in kinds.items() if "attn" in name} == {"W8A8_DYNAMIC"}
