"""Tests of reading quantized checkpoints back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slim_core.errors import CheckpointError, FormatError
from slim_core.export import CheckpointExport
from slim_core.formats import FORMATS
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.quantized import (
    ADDED_NORM_BIAS,
    QuantizedCheckpoint,
    find_description,
    is_quantized,
    scheme_of,
)
from slim_core.scheme import QuantScheme

NAME = "model.layers.0.mlp.down_proj"


def layer(scheme: str, name: str = NAME, **options: Any) -> QuantizedLinear:
    parsed = QuantScheme.parse(scheme)
    assert parsed.weight is not None
    rng = np.random.default_rng(len(name))
    weight = rng.normal(size=(8, 64)).astype(np.float32)
    scale, offset = weight_params(weight, parsed.weight)
    codes = quantize_weight(weight, scale, offset, parsed.weight)
    given: dict[str, Any] = {"bias": rng.normal(size=8).astype(np.float32), **options}
    if parsed.is_static:
        given["input_scale"] = np.array([0.02], np.float32)
        given["input_offset"] = np.array([-3], np.float32)
    return QuantizedLinear(name, parsed, codes, scale, offset, **given)


def write(path: Path, *layers: QuantizedLinear, form: str = "ascend_v1", **floats: Any) -> Path:
    path.mkdir(exist_ok=True)
    with CheckpointExport(path, FORMATS[form], model_type="W8A8") as export:
        for item in layers:
            export.add_layer(item)
        export.add_float("model.norm.weight", np.ones(4, np.float32))
        for name, array in floats.items():
            export.add_float(name.replace("__", "."), array)
    return path


@pytest.mark.parametrize("form", ["ascend_v1", "safe_tensor"])
@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "w8a8_tensor", "w8a8_dynamic", "w8a16", "w8a16_asym", "w8a16_g32", "w8a16_g32_asym"],
)
def test_layers_come_back_as_they_were(tmp_path: Path, form: str, scheme: str) -> None:
    written = layer(scheme)
    stored = QuantizedCheckpoint(write(tmp_path, written, form=form))
    assert stored.layers == {NAME: written.scheme.ascend_type}
    read = stored.layer(NAME)
    assert read.scheme == written.scheme
    for field in ("codes", "weight_scale", "weight_offset", "input_scale", "input_offset", "bias"):
        one, other = getattr(read, field), getattr(written, field)
        if other is None:
            assert one is None
        else:
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(read.dequantized(), written.dequantized())


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    write(tmp_path, layer("w8a8_dynamic"))
    file = find_description(tmp_path)
    for kind, hint in (("W4A4_MXFP4_DUALSCALE", "no engine reads it"), ("W5A5", None)):
        description = json.loads(file.read_text())
        description[f"{NAME}.weight"] = kind
        file.write_text(json.dumps(description))
        with pytest.raises(FormatError, match=f"down_proj.weight has the type '{kind}'") as caught:
            QuantizedCheckpoint(tmp_path)
        assert (hint or "") in (caught.value.hint or "")


def test_an_asymmetric_weight_whose_offsets_are_zero_reads_as_symmetric() -> None:
    tensors = {
        "weight": np.zeros((2, 4), np.int8),
        "weight_scale": np.ones((2, 1), np.float32),
        "weight_offset": np.zeros((2, 1), np.float32),
    }
    assert str(scheme_of("x", "W8A16", tensors)) == "w8a16"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "has no weight_scale of one or two dimensions"),
        ({"weight": np.zeros((2, 4), np.int8)}, "has no weight_scale of one or two dimensions"),
        ({"weight_scale": np.ones((2, 1), np.float32)}, "has no weight; its tensors are weight_s"),
        (
            {"weight": np.zeros(8, np.int8), "weight_scale": np.ones((2, 1), np.float32)},
            "weight must have two dimensions",
        ),
    ],
)
def test_a_layer_without_its_weight_or_scale_is_named(
    tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=rf"a\.b\W{message}|a\.b {message}"):
        scheme_of("a.b", "W8A16", tensors)


class TestDtypeOfTheModel:
    def test_of_the_configuration(self, tmp_path: Path) -> None:
        write(tmp_path, layer("w8a16"))
        for config in ({"dtype": "float16"}, {"torch_dtype": "float16"}, {"text_config": {}}):
            (tmp_path / "config.json").write_text(json.dumps(config))
            expected = "float32" if "text_config" in config else "float16"
            assert QuantizedCheckpoint(tmp_path).model_dtype == expected
        (tmp_path / "config.json").write_text('{"text_config": {"dtype": "bfloat16"}}')
        assert QuantizedCheckpoint(tmp_path).model_dtype == "bfloat16"

    def test_without_one_that_of_the_float_weights(self, tmp_path: Path) -> None:
        halves = {f"n{i}__weight": np.ones(2, np.float16) for i in range(3)}
        assert QuantizedCheckpoint(write(tmp_path, layer("w8a16"), **halves)).model_dtype == (
            "float16"
        )


class TestDescriptions:
    def test_the_fixed_name_goes_first(self, tmp_path: Path) -> None:
        for name in ("quant_model_description.json", "quant_model_description_w8a8.json"):
            (tmp_path / name).write_text("{}")
        assert find_description(tmp_path).name == "quant_model_description.json"
        assert is_quantized(tmp_path)

    def test_none(self, tmp_path: Path) -> None:
        assert not is_quantized(tmp_path)
        assert not is_quantized(tmp_path / "nowhere")
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(CheckpointError, match="no description"):
                find_description(place)

    def test_several(self, tmp_path: Path) -> None:
        for kind in ("w8a8", "w8a16"):
            (tmp_path / f"quant_model_description_{kind}.json").write_text("{}")
        with pytest.raises(CheckpointError, match="2 descriptions"):
            find_description(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "3"])
    def test_malformed(self, tmp_path: Path, text: str) -> None:
        write(tmp_path, layer("w8a16"))
        (tmp_path / "quant_model_description.json").write_text(text)
        with pytest.raises(CheckpointError, match="quant_model_description"):
            QuantizedCheckpoint(tmp_path)


class TestNormExtras:
    def test_copies_of_the_safe_tensor_layout(self, tmp_path: Path) -> None:
        extras = {
            f"{name}__{part}": np.zeros(4, np.float32)
            for name in ("a__norm", "b__norm")
            for part in ("weight", "bias", "module__weight", "module__bias")
        }
        stored = QuantizedCheckpoint(write(tmp_path, layer("w8a16"), **extras))
        assert stored.norm_extras == {
            f"{name}.{part}"
            for name in ("a.norm", "b.norm")
            for part in ("bias", "module.weight", "module.bias")
        }
        assert set(stored.layers) == {NAME}

    def test_biases_that_the_description_notes(self, tmp_path: Path) -> None:
        tmp_path.mkdir(exist_ok=True)
        with CheckpointExport(tmp_path, FORMATS["ascend_v1"], model_type="W8A16") as export:
            export.add_layer(layer("w8a16"))
            export.add_float("a.norm.bias", np.zeros(4, np.float32))
            export.add_float("b.norm.bias", np.ones(4, np.float32))
            export.describe("metadata", {ADDED_NORM_BIAS: ["a.norm.bias"]})
        assert QuantizedCheckpoint(tmp_path).norm_extras == {"a.norm.bias"}


def test_a_missing_tensor_of_a_layer_is_named(tmp_path: Path) -> None:
    write(tmp_path, layer("w8a8"))
    stored = QuantizedCheckpoint(tmp_path)
    tensors = stored.tensors_of(NAME)
    del tensors["deq_scale"]
    with pytest.raises(FormatError, match=f"{NAME} has no deq_scale"):
        FORMATS["ascend_v1"].decode(NAME, QuantScheme.parse("w8a8"), tensors, "float32")
