"""Tests of the observers of activations against closed formulas and a brute-force search."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import CalibrationError
from slim_core.recipe import ObserverKind
from slim_core.scheme import QuantScheme
from slim_ptq.observers import (
    HistogramObserver,
    MeanMinMaxObserver,
    MinMaxObserver,
    SpreadObserver,
    make_observer,
)

_STATIC = QuantScheme.parse("w8a8").activation
assert _STATIC is not None
ACTIVATION = _STATIC


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(count: int, seed: int = 0) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    normal = randn(4, count, seed=seed)
    return normal[0] / (normal[1:].pow(2).mean(0)).sqrt()


def squared_error(x: torch.Tensor, low: float, high: float) -> float:
    """Of int8 asymmetric quantization of x with this range."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    offset = round(-low / scale) - 128
    codes = torch.clamp(torch.round(x.double() / scale + offset), -128, 127)
    return float(((codes - offset) * scale - x.double()).pow(2).sum())


class TestMeanMinMax:
    def test_mean_of_the_extremes_of_the_samples(self) -> None:
        observer = MeanMinMaxObserver()
        samples = [randn(1, n, 8, seed=n) * n for n in (2, 5, 3)]
        for sample in samples:
            observer.update(sample)
        low, high = observer.bounds()
        assert float(low) == pytest.approx(sum(float(s.min()) for s in samples) / 3, rel=1e-6)
        assert float(high) == pytest.approx(sum(float(s.max()) for s in samples) / 3, rel=1e-6)

    def test_rows_are_samples(self) -> None:
        x = randn(4, 5, 8) * torch.tensor([1.0, 10.0, 3.0, 0.1]).reshape(4, 1, 1)
        together, apart = MeanMinMaxObserver(), MeanMinMaxObserver()
        together.update_rows(x)
        for row in x:
            apart.update(row)
        assert together.samples == apart.samples == 4
        assert together.bounds() == apart.bounds()

    def test_parameters(self) -> None:
        observer = MeanMinMaxObserver()
        samples = [randn(1, 16, 8, seed=n) for n in range(3)]
        for sample in samples:
            observer.update(sample)
        low = sum(float(s.min()) for s in samples) / 3
        high = sum(float(s.max()) for s in samples) / 3
        scale, offset = observer.params(ACTIVATION)
        assert scale.shape == offset.shape == (1,)
        assert float(scale) == pytest.approx((high - low) / 255, rel=1e-6)
        assert float(offset) == round(-low / float(scale)) - 128

    @pytest.mark.parametrize("sign", [1, -1])
    def test_zero_is_always_in_the_range(self, sign: int) -> None:
        observer = MeanMinMaxObserver()
        observer.update(sign * torch.tensor([[3.0, 4.0]]))
        scale, offset = observer.params(ACTIVATION)
        assert float(scale) == pytest.approx(4 / 255)
        assert float(offset) == (-128 if sign > 0 else 127)


class TestMinMax:
    def test_extremes_of_all_samples(self) -> None:
        observer = MinMaxObserver()
        samples = [randn(1, n, 8, seed=n) * n for n in (2, 5, 3)]
        for sample in samples:
            observer.update(sample)
        everything = torch.cat([sample.flatten() for sample in samples])
        assert observer.bounds() == (everything.min(), everything.max())


class TestHistogram:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
    def test_near_the_best_range_of_a_brute_force_search(self, seed: int, scale: float) -> None:
        x = heavy_tailed(4000, seed) * scale
        observer = HistogramObserver()
        for part in x.chunk(4):
            observer.update(part)
        low, high = (float(end) for end in observer.bounds())
        ends = x.sort().values
        cuts = [0, 1, 2, 4, 8, 16, 24, 32, 48, 64]
        best = min(
            squared_error(x, float(ends[a]), float(ends[-1 - b])) for a in cuts for b in cuts
        )
        assert squared_error(x, low, high) <= 1.05 * best

    def test_never_loses_more_than_the_extremes_on_heavy_tails(self) -> None:
        for seed in range(8):
            x = heavy_tailed(8000, seed)
            observer = HistogramObserver()
            observer.update(x)
            low, high = (float(end) for end in observer.bounds())
            assert squared_error(x, low, high) <= 1.01 * squared_error(
                x, float(x.min()), float(x.max())
            )

    def test_clips_one_outlier_of_many_elements(self) -> None:
        x = randn(300_000)
        x[7] = 20.0
        observer = HistogramObserver()
        for part in x.chunk(3):
            observer.update(part)
        low, high = (float(end) for end in observer.bounds())
        assert squared_error(x, low, high) < 0.75 * squared_error(x, float(x.min()), 20.0)

    def test_keeps_the_whole_range_of_uniform_data(self) -> None:
        x = torch.linspace(0.5, 1.5, 4001)  # bounds that are no integers
        observer = HistogramObserver()
        observer.update(x)
        low, high = observer.bounds()
        assert float(low) == pytest.approx(0.5, abs=0.02)
        assert float(high) == pytest.approx(1.5, abs=0.02)

    def test_samples_in_parts_count_as_in_one(self) -> None:
        x = heavy_tailed(6000)
        x = x[x.abs().argsort()]  # the range grows with every part
        whole, parts = HistogramObserver(), HistogramObserver()
        whole.update(x)
        for part in x.chunk(20):
            parts.update(part)
        errors = [
            squared_error(x, *(float(end) for end in observer.bounds()))
            for observer in (whole, parts)
        ]
        assert errors[1] <= 1.05 * errors[0]

    def test_no_element_is_lost_when_the_bins_grow(self) -> None:
        observer = HistogramObserver(bins=16)
        for x in ([1.0, 1.0], [1.0, 2.0], [-50.0], [400.0, 3.0], [0.0]):
            observer.update(torch.tensor(x))
        assert float(observer._counts.sum()) == 8

    @given(
        st.lists(
            st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9), min_size=1
        )
    )
    def test_no_element_is_lost(self, parts: list[list[float]]) -> None:
        observer = HistogramObserver(bins=16)
        for part in parts:
            observer.update(torch.tensor(part))
        assert float(observer._counts.sum()) == sum(len(part) for part in parts)

    def test_more_elements_than_float32_can_count(self) -> None:
        observer = HistogramObserver(bins=4)
        observer.update(torch.zeros(1))
        observer.update(torch.nn.functional.pad(torch.ones(1), ((1 << 24) + 3, 0)))
        assert observer._counts.tolist() == [(1 << 24) + 4, 0, 0, 1]

    @pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
    def test_a_constant(self, value: float) -> None:
        observer = HistogramObserver()
        observer.update(torch.full((7,), value))
        low, high = observer.bounds()
        assert (float(low), float(high)) == (value, value)
        scale, offset = observer.params(ACTIVATION)
        code = round(value / float(scale) + float(offset))
        assert (code - float(offset)) * float(scale) == pytest.approx(value, abs=1e-6)

    def test_a_constant_followed_by_others(self) -> None:
        observer = HistogramObserver()
        observer.update(torch.full((100,), 0.5))
        observer.update(torch.linspace(-1.0, 1.0, 101))
        assert float(observer._counts.sum()) == 201
        low, high = observer.bounds()
        assert float(low) == pytest.approx(-1.0, abs=0.05)
        assert float(high) == pytest.approx(1.0, abs=0.05)

    @given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
    def test_the_range_lies_within_the_data(self, values: list[float]) -> None:
        observer = HistogramObserver(bins=64)
        for value in values:
            observer.update(torch.tensor([value]))
        low, high = (float(end) for end in observer.bounds())
        slack = 1e-5 * max(1.0, max(map(abs, values)))
        assert min(values) - slack <= low <= high <= max(values) + slack


class TestAuto:
    def test_histogram_for_ordinary_data(self) -> None:
        x = heavy_tailed(4000).reshape(40, 100)
        auto, histogram = make_observer(ObserverKind.AUTO), HistogramObserver()
        auto.update(x)
        histogram.update(x)
        assert auto.bounds() == histogram.bounds()

    def test_mean_extremes_where_a_few_elements_are_enormous(self) -> None:
        x = randn(20, 10_000) * 0.01
        x[0, 0] = 100.0
        spread = SpreadObserver()
        spread.update(x)
        assert spread.value() > 50
        auto = make_observer(ObserverKind.AUTO)
        auto.update(x)
        assert float(auto.bounds()[1]) == 100.0


class TestSpread:
    def test_formula(self) -> None:
        samples = [randn(1, 12, 8, seed=1), 3 * randn(1, 20, 8, seed=2)]
        observer = SpreadObserver()
        for sample in samples:
            observer.update(sample)
        peak = max(float(sample.abs().max()) for sample in samples)
        std = max(
            float((flat - (flat.max(0).values + flat.min(0).values)).std(unbiased=True))
            for flat in (sample.reshape(-1, 8) for sample in samples)
        )
        assert observer.value() == pytest.approx(peak / std, rel=1e-6)

    def test_nothing_seen_and_nothing_varied(self) -> None:
        assert SpreadObserver().value() == 0.0
        constant = SpreadObserver()
        constant.update(torch.full((4, 1), 0.0))
        assert constant.value() == 0.0


class TestParameters:
    def test_no_sample_is_an_error(self) -> None:
        for kind in ObserverKind:
            observer = make_observer(kind)
            observer.update(torch.zeros(0, 8))  # an expert that no token is routed to
            with pytest.raises(CalibrationError, match="no calibration sample"):
                observer.bounds()

    @pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
    def test_the_scale_is_exact_in_the_dtype_of_the_model(self, storage: torch.dtype) -> None:
        observer = MinMaxObserver()
        observer.update(torch.tensor([-1.2345, 3.3333]))
        scale, offset = observer.params(ACTIVATION, storage)
        assert scale.dtype == torch.float32
        assert float(scale) == float(scale.to(storage))
        assert float(scale) == pytest.approx((1.2345 + 3.3333) / 255, rel=2**-8)
        assert float(offset) == round(1.2345 / float(scale)) - 128

    def test_a_scale_that_the_dtype_cannot_hold_stays_float32(self) -> None:
        observer = MinMaxObserver()
        observer.update(torch.tensor([0.0, 1e-6]))  # scale 4e-9 is zero in float16
        scale, _ = observer.params(ACTIVATION, torch.float16)
        assert float(scale) > 0
        assert math.isfinite(float(scale))

    @given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
    def test_elements_in_the_range_lose_at_most_half_a_step(self, values: list[float]) -> None:
        x = torch.tensor(values)
        observer = MinMaxObserver()
        observer.update(x)
        scale, offset = observer.params(ACTIVATION)
        codes = torch.clamp(torch.round(x / scale + offset), -128, 127)
        # The offset is rounded, so one end of the range can lose another half step.
        assert float(((codes - offset) * scale - x).abs().max()) <= float(scale) * 1.01


def test_more_samples_never_lower_the_spread_of_minmax() -> None:
    observer = MinMaxObserver()
    widths = []
    for seed in range(6):
        observer.update(randn(10, seed=seed) * (seed + 1))
        low, high = observer.bounds()
        widths.append(float(high - low))
    assert all(a <= b for a, b in pairwise(widths))
