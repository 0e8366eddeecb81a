"""Checkpoints for other tools: what is in the directory, and what is refused beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import FormatError, InvalidValueError, PlanError, SlimError
from slim_core.formats import FORMATS
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.scheme import QuantScheme
from slim_ptq import quantize, readback

Factory = Callable[..., Any]


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("gptq", "w4a16_g32"),
        ("gptq", "w8a16_asym"),
        ("awq", "w4a16_g32_asym"),
        ("compressed_tensors", "w4a16"),
        ("compressed_tensors", "w8a8_dynamic"),
    ],
)
def test_the_integers_are_those_of_ascend(
    saved_model: Factory, tmp_path: Path, form: str, scheme: str
) -> None:
    source = saved_model("llama")
    for name, written in (("ours", "ascend_v1"), ("theirs", form)):
        recipe = Recipe.build(scheme=scheme, format=written, method="clip")  # -8 is a code of it
        quantize(source, tmp_path / name, recipe=recipe)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"].replace("-", "_") == form
    assert not list((tmp_path / "theirs").glob("quant_model_description*"))
    ours, theirs = QuantizedCheckpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "theirs")
    codes = [ours.layer(name).codes for name in ours.layers]
    assert scheme[1] == "8" or min(own.min() for own in codes) == -8
    for name in ours.layers:
        inside = f"{name}."
        tensors = {
            key.removeprefix(inside): theirs.load(key)
            for key in theirs.tensors
            if key.startswith(inside)
        }
        layer = FORMATS[form].decode(name, QuantScheme.parse(scheme), tensors, "float32")
        assert np.array_equal(layer.codes, ours.layer(name).codes), name
        assert np.array_equal(layer.weight_offset, ours.layer(name).weight_offset), name
    floats = [name for name in theirs.tensors if "norm" in name or "embed" in name]
    assert all(theirs.tensors[name].dtype == np.float32 for name in floats)
    assert len(floats) == 6


@pytest.mark.parametrize(
    ("family", "values", "error", "says"),
    [
        ("llama", {"format": "awq", "scheme": "w8a16"}, PlanError, "holds w4a16 only"),
        ("llama", {"format": "gptq", "scheme": "w8a8"}, PlanError, "w4a16 and w8a16 only"),
        (
            "llama",
            {
                "format": "gptq",
                "scheme": "w4a16",
                "rules": [{"match": "*down_proj", "scheme": "w8a16"}],
            },
            FormatError,
            "one scheme for all layers",
        ),
        ("gpt2", {"format": "gptq", "scheme": "w8a16"}, InvalidValueError, "transposed"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    saved_model: Factory,
    tmp_path: Path,
    family: str,
    values: dict[str, Any],
    error: type[SlimError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        quantize(saved_model(family), tmp_path / "out", recipe=Recipe.build(**values))
    assert list(tmp_path.iterdir()) == []


def test_their_quality_is_not_measured_here(saved_model: Factory, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    with pytest.raises(InvalidValueError, match="cannot be measured in the awq format"):
        quantize(saved_model("llama"), tmp_path / "out", scheme="w4a16", format="awq", text=text)


def test_a_layer_that_does_not_decode_is_not_published(
    saved_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*_: Any) -> Any:
        raise FormatError("it is odd")

    monkeypatch.setattr(type(readback.FORMATS["gptq"]), "decode", spoiled)
    with pytest.raises(FormatError, match="it is odd"):
        quantize(saved_model("llama"), tmp_path / "out", scheme="w4a16", format="gptq")
    assert list(tmp_path.iterdir()) == []
