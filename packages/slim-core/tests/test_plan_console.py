"""Tests of the plan as a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slim_core.formats import FORMATS
from slim_core.plan import Plan, build_plan
from slim_core.plan_console import print_plan
from slim_core.recipe import Recipe


def make(**recipe: object) -> Plan:
    linears = {
        f"model.layers.{n}.{name}": shape
        for n in range(2)
        for name, shape in {"self_attn.o_proj": (64, 64), "mlp.down_proj": (64, 128)}.items()
    }
    return build_plan(
        linears,
        Recipe.build(**recipe),
        FORMATS["ascend_v1"],
        model_dtype="float32",
        bytes_before=2_000_000,
        calibrated=True,
    )


def shown(plan: Plan, width: int = 80) -> str:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=width))
    return stream.getvalue()


def test_every_layer_and_the_sum() -> None:
    text = shown(make(scheme="w8a8", exclude=["*.0.mlp.down_proj"]))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "shape", "scheme", "reason"]
    assert lines[1].split() == ["model.layers.0.self_attn.o_proj", "64x64", "w8a8", "recipe"]
    assert lines[2].split()[:3] == ["model.layers.0.mlp.down_proj", "64x128", "float"]
    assert "4 layers: 1 float, 3 w8a8; type W8A8, format ascend_v1" in text
    assert "weights 2.0 MB -> about" in text
    assert "needs calibration data" in text


def test_notes() -> None:
    text = shown(make(scheme="w8a16_asym"), width=120)
    assert "note: asymmetric weights load correctly only in MindIE" in text
    assert "needs calibration data" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_too_long_and_no_name_is_cut(width: int) -> None:
    text = shown(make(scheme="w8a8", exclude=["*.0.mlp.down_proj"]), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "…" not in text
