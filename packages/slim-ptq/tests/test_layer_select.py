"""LayerSelector: its scores by closed formulas, and what is selected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError
from slim_ptq import Calibrator, LayerSelector, QuantConfig
from slim_ptq.observers import KurtosisScore, QuantileScore


class TestScores:
    def test_quantile_of_a_uniform_distribution(self) -> None:
        score = QuantileScore()
        for _ in range(3):
            score.update(torch.linspace(-1, 1, 100_000)[None])
        assert score.value() == pytest.approx(1 / 127, rel=2e-3)

    def test_quantile_by_the_formula(self) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = [torch.randn(1, 30, 40, generator=generator) * scale for scale in (1, 3)]
        score = QuantileScore()
        for sample in samples:
            score.update(sample)
        kept = [np.sort(sample.numpy().ravel())[50::100] for sample in samples]
        low, high = np.quantile(np.concatenate(kept), [0.25, 0.75])
        peak = max(float(sample.abs().max()) for sample in samples)
        assert score.value() == pytest.approx(peak / 127 / (high - low), rel=1e-5)

    @given(st.floats(1e-3, 1e3))
    def test_scores_do_not_depend_on_the_unit(self, factor: float) -> None:
        x = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(1))
        for kind in (QuantileScore, KurtosisScore):
            plain, scaled = kind(), kind()
            plain.update(x)
            scaled.update(x * factor)
            assert scaled.value() == pytest.approx(plain.value(), rel=1e-4)

    def test_kurtosis(self) -> None:
        generator = torch.Generator().manual_seed(2)
        samples = [torch.randn(1, 10, 20, generator=generator) ** 3 + 0.5 for _ in range(3)]
        score = KurtosisScore()
        for sample in samples:
            score.update(sample)
        every = torch.cat(samples).double().numpy().ravel()
        middle = every - every.mean()
        assert score.value() == pytest.approx((middle**4).mean() / (middle**2).mean() ** 2)

    def test_nothing_and_constants(self) -> None:
        assert QuantileScore().value() == KurtosisScore().value() == 0.0
        quantile, kurtosis = QuantileScore(), KurtosisScore()
        for score in (quantile, kurtosis):
            score.update(torch.full((1, 200), 2.0))
            score.update(torch.empty(0, 3))
        assert quantile.value() == math.inf
        assert kurtosis.value() == 0.0


def test_quantile_scores_of_a_model(
    tiny_model: Callable[..., Any], tiny_calib: list[Any], capture_block: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    selector = LayerSelector(model)
    selector.run(tiny_calib)
    assert len(selector.scores) == 15  # the head too
    name = "model.layers.1.self_attn.o_proj"
    kept, peak = [], 0.0
    for ids, _ in tiny_calib:
        (x,), _ = capture_block(model, name, ids)
        kept.append(np.sort(x.numpy().ravel())[50::100])
        peak = max(peak, float(x.abs().max()))
    low, high = np.quantile(np.concatenate(kept), [0.25, 0.75])
    assert selector.scores[name] == pytest.approx(peak / 127 / (high - low), rel=1e-5)


def test_std_is_the_measure_of_disable_level(
    tiny_model: Callable[..., Any], tiny_calib: list[Any]
) -> None:
    selector = LayerSelector(tiny_model("llama"), range_method="std")
    selector.run(tiny_calib)
    model = tiny_model("llama")
    calibrator = Calibrator(
        model, QuantConfig(mm_tensor=False), calib_data=tiny_calib, disable_level="L2"
    )
    calibrator.run()
    floats = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    hardest = [name for name in selector.scores if name != "lm_head"]
    assert floats == set(hardest[: len(floats)])
    assert len(floats) >= 2


def test_selection(tiny_model: Callable[..., Any], tiny_calib: list[Any]) -> None:
    selector = LayerSelector(tiny_model("llama"))
    selector.run(tiny_calib)
    scores = selector.scores
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert selector.select_layers_by_threshold(0) == list(scores)
    middle = sorted(scores.values())[7]
    above = selector.select_layers_by_threshold(middle)
    assert above == [name for name, score in scores.items() if score > middle]
    assert selector.select_layers_by_threshold(max(scores.values())) == []
    assert selector.select_layers_by_disable_level(0) == []
    assert selector.select_layers_by_disable_level(99) == list(scores)
    for level in range(9):
        chosen = selector.select_layers_by_disable_level(level)
        assert len({scores[name] for name in chosen}) == level
        for block in range(2):
            for parts in ("qkv", "gate up"):
                kinds = [f"{p}_proj" for p in (parts.split() if " " in parts else parts)]
                names = {n for n in scores if f"layers.{block}." in n and n.endswith(tuple(kinds))}
                assert names <= set(chosen) or not names & set(chosen)


def test_named_layers_only(tiny_model: Callable[..., Any], tiny_calib: list[Any]) -> None:
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    selector = LayerSelector(tiny_model("llama"), names)
    selector.run([{"input_ids": ids} for ids, _ in tiny_calib])
    assert set(selector.scores) == set(names)


def test_convolutions_are_known_and_not_ranked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    selector = LayerSelector(model, ["0", "2"])
    selector.run([[torch.rand(1, 1, 2, 2)]])
    assert set(selector.scores) == {"2"}


def test_experts_are_ranked_and_routers_are_not(
    tiny_model: Callable[..., Any], tiny_calib: list[Any]
) -> None:
    selector = LayerSelector(tiny_model("qwen2_moe"))
    selector.run(tiny_calib)
    assert any(".experts.3.down_proj" in name for name in selector.scores)
    assert not any(name.endswith("mlp.gate") for name in selector.scores)


def test_bad_input(tiny_model: Callable[..., Any], tiny_calib: list[Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidTypeError, match="model must be Module"):
        LayerSelector("model")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"layer_names: no layer is called 'model.layer'"):
        LayerSelector(model, ["model.layer"])
    with pytest.raises(InvalidTypeError, match="layer_names must be list"):
        LayerSelector(model, "lm_head")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="must be one of 'quantile', 'std', not 'max'"):
        LayerSelector(model, range_method="max")
    selector = LayerSelector(model)
    with pytest.raises(InvalidTypeError, match=r"call run\(\)"):
        selector.select_layers_by_threshold(1)
    with pytest.raises(InvalidTypeError, match=r"call run\(\)"):
        selector.select_layers_by_disable_level(1)
    with pytest.raises(InvalidValueError, match="at least one sample"):
        selector.run([])
    with pytest.raises(InvalidValueError, match=r"calib_data\[0\] must hold tensors only"):
        selector.run([["text"]])
    with pytest.raises(InvalidTypeError, match=r"calib_data\[1\] must be list or dict"):
        selector.run([*tiny_calib[:1], 3])
    with pytest.raises(CalibrationError, match=r"calib_data\[0\] is empty"):
        selector.run([[]])
    selector.run(tiny_calib)
    with pytest.raises(InvalidValueError, match="threshold must be at least 0"):
        selector.select_layers_by_threshold(-1)
    with pytest.raises(InvalidTypeError, match="disable_level must be int, not float"):
        selector.select_layers_by_disable_level(1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="disable_level must be at least 0"):
        selector.select_layers_by_disable_level(-1)
