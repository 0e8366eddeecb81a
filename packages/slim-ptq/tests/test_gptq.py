"""Tests of GPTQ: against rounding, against a slow form of the paper, and of its limits."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import InvalidValueError, NumericalError
from slim_core.numerics import dequantize_weight, quantize_weight
from slim_core.scheme import QuantScheme
from slim_ptq.methods import BatchInputs, LayerInputs, MinMax, columns, descent
from slim_ptq.methods.clip import Clip
from slim_ptq.methods.feedback import factorize
from slim_ptq.methods.gptq import GPTQ

PLAIN = {"order": "natural", "range": "minmax", "sweeps": 0}  # as in the paper


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(columns: int, *, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    x = randn(tokens, columns, seed=seed) @ randn(columns, columns, seed=seed + 1)
    x = x * torch.linspace(0.2, 2, columns)
    return x.T @ x / tokens


def inputs_of(hessian: torch.Tensor) -> LayerInputs:
    return LayerInputs(100, hessian, hessian.diagonal())


def quantized(weight: torch.Tensor, hessian: torch.Tensor, scheme: str, **options: Any) -> Any:
    method = GPTQ(**options)
    return method.quantize("a", weight, QuantScheme.parse(scheme).weight, inputs_of(hessian))


def row_losses(values: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, damp: float):
    damped = hessian.double() + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    error = (values - weight).double()
    return ((error @ damped) * error).sum(dim=1)


def textbook(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    *,
    symmetric: bool,
    group: int = 0,
    damp: float = 0.01,
    by_activation: bool = False,
) -> np.ndarray:
    """Return the dequantized weight of GPTQ as the paper writes it: inverse, Cholesky, one loop.

    Independent of the code under test: numpy, float64, no blocks.
    """
    w = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    rows, columns = w.shape
    highest = 2 ** (bits - 1) - 1
    lowest = -highest if symmetric and bits == 8 else -highest - 1

    def grid(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = part.min(axis=1), part.max(axis=1)
        if symmetric:
            return np.maximum(-low, high) / highest, np.zeros(rows)
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / (2**bits - 1)
        return scale, np.round(-low / scale) + lowest

    order = np.argsort(-np.diag(h), kind="stable") if by_activation else np.arange(columns)
    size = group or columns
    static = [grid(w[:, start : start + size]) for start in range(0, columns, size)]
    w, h = w[:, order], h[np.ix_(order, order)]
    h += damp * np.mean(np.diag(h)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    result = np.zeros_like(w)
    for column in range(columns):
        if group and not by_activation and column % group == 0:
            static[column // group] = grid(w[:, column : column + group])
        scale, offset = static[order[column] // size]
        codes = np.clip(np.round(w[:, column] / scale + offset), lowest, highest)
        result[:, column] = (codes - offset) * scale
        error = (w[:, column] - result[:, column]) / upper[column, column]
        w[:, column:] -= np.outer(error, upper[column, column:])
    restored = np.zeros_like(result)
    restored[:, order] = result
    return restored


def better_rows(
    made: Any, scheme: str, expected: np.ndarray, weight: torch.Tensor, hessian: torch.Tensor
) -> np.ndarray:
    """Return ``expected``, with the rows rounded to nearest that are better so."""
    codes = quantize_weight(weight, made.scale, made.offset, QuantScheme.parse(scheme).weight)
    nearest = dequantize_weight(codes, made.scale, made.offset)
    losses = [
        row_losses(torch.as_tensor(values), weight, hessian, 0.01) for values in (nearest, expected)
    ]
    return np.where((losses[0] < losses[1])[:, None], nearest.numpy(), expected)


class TestAgainstThePaper:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("order", ["natural", "activation"])
    def test_per_channel(self, order: str, bits: int, symmetric: bool) -> None:
        # With seed 0 a value of 8 bits lies 4e-6 steps from a half, which float32 cannot tell.
        weight, hessian = randn(12, 48, seed=2), hessian_of(48)
        scheme = f"w{bits}a16" + ("" if symmetric else "_asym")
        made = quantized(weight, hessian, scheme, **PLAIN | {"order": order})
        expected = textbook(
            weight, hessian, bits, symmetric=symmetric, by_activation=order == "activation"
        )
        found = dequantize_weight(made.codes, made.scale, made.offset)
        expected = better_rows(made, scheme, expected, weight, hessian)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_groups_in_their_turn(self, symmetric: bool) -> None:
        weight, hessian = randn(12, 128), hessian_of(128)
        scheme = "w4a16_g32" + ("" if symmetric else "_asym")
        made = quantized(weight, hessian, scheme, **PLAIN, static_groups=False)
        expected = textbook(weight, hessian, 4, symmetric=symmetric, group=32)
        found = dequantize_weight(made.codes, made.scale, made.offset)
        expected = better_rows(made, scheme, expected, weight, hessian)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)

    def test_static_groups_by_activation(self) -> None:
        weight, hessian = randn(12, 128), hessian_of(128)
        made = quantized(weight, hessian, "w4a16_g32", **PLAIN | {"order": "activation"})
        expected = textbook(weight, hessian, 4, symmetric=True, group=32, by_activation=True)
        scheme = "w4a16_g32"
        found = dequantize_weight(made.codes, made.scale, made.offset)
        expected = better_rows(made, scheme, expected, weight, hessian)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)

    @pytest.mark.parametrize("few", [1, 7, 1000])
    @pytest.mark.parametrize(("scheme", "static"), [("w4a16", True), ("w4a16_g8", False)])
    def test_where_products_take_over_changes_nothing(
        self, monkeypatch: pytest.MonkeyPatch, few: int, scheme: str, static: bool
    ) -> None:
        weight, hessian = randn(6, 56), hessian_of(56)
        options = {"order": "group", "static_groups": static}
        other = quantized(weight, hessian, scheme, **options)
        for module in (columns, descent):
            monkeypatch.setattr(module, "INNER", few)
        one = quantized(weight, hessian, scheme, **options)
        assert torch.equal(one.codes, other.codes)
        assert torch.allclose(one.scale, other.scale, rtol=1e-5)


class TestAgainstRounding:
    @pytest.mark.parametrize("order", ["natural", "activation", "group"])
    @pytest.mark.parametrize(
        "scheme", ["w8a16", "w4a16_asym", "w4a16_g32", "w8a16_tensor", "nf4", "w4a8_mxfp"]
    )
    def test_inputs_without_correlation_leave_nothing_to_make_up_for(
        self, scheme: str, order: str
    ) -> None:
        weight, identity = randn(16, 64), torch.eye(64)
        parsed = QuantScheme.parse(scheme).weight
        for range_, method in (("minmax", MinMax()), ("search", Clip())):
            made = quantized(weight, identity, scheme, order=order, range=range_, sweeps=0)
            plain = method.quantize("a", weight, parsed)
            assert torch.equal(made.codes, plain.codes)
            assert torch.equal(made.scale, plain.scale)
            assert torch.equal(made.offset, plain.offset)

    @given(
        st.integers(0, 10_000),
        st.sampled_from(["w8a16", "w4a16", "w4a16_asym", "w4a16_g32_asym", "w4a16_g32"]),
        st.sampled_from([1, 3, 20, 400]),
        st.sampled_from([0.001, 0.01, 0.3]),
        st.sampled_from([0, 2]),
        st.sampled_from(["natural", "activation"]),
    )
    @settings(max_examples=60)
    def test_never_worse_on_its_objective(
        self, seed: int, scheme: str, tokens: int, damp: float, sweeps: int, order: str
    ) -> None:
        weight = randn(6, 64, seed=seed)
        hessian = hessian_of(64, tokens=tokens, seed=seed)
        made = quantized(
            weight, hessian, scheme, range="minmax", damp=damp, sweeps=sweeps, order=order
        )
        plain = MinMax().quantize("a", weight, QuantScheme.parse(scheme).weight)
        losses = [
            row_losses(dequantize_weight(p.codes, p.scale, p.offset), weight, hessian, damp)
            for p in (made, plain)
        ]
        slack = 1e-5 * losses[1].max()  # of float32 sums
        assert bool((losses[0] <= losses[1] + slack).all())

    def test_rows_that_rounding_serves_better_are_kept_only_if_asked(self) -> None:
        # With few channels the errors that are fed back find little room.
        weight, hessian = randn(400, 4, seed=3), hessian_of(4, tokens=6, seed=5)
        scheme = QuantScheme.parse("w4a16").weight
        made = [
            quantized(weight, hessian, "w4a16", **PLAIN, keep_nearest=keep)
            for keep in (True, False)
        ]
        plain = MinMax().quantize("a", weight, scheme)
        losses = [
            row_losses(dequantize_weight(p.codes, p.scale, p.offset), weight, hessian, 0.01)
            for p in (*made, plain)
        ]
        worse = losses[1] > losses[2] * (1 + 1e-4)
        assert 0 < int(worse.sum()) < 200
        assert torch.equal(made[0].codes[worse], plain.codes[worse])
        assert bool((losses[0] <= torch.minimum(losses[1], losses[2]) * (1 + 1e-4)).all())

    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32_asym", "w4a8_dynamic_g32", "nf4"])
    def test_much_better_on_correlated_inputs(self, scheme: str) -> None:
        weight, hessian = randn(32, 128), hessian_of(128)
        parsed = QuantScheme.parse(scheme)

        def loss(parts: Any) -> float:
            values = parts.layer("a", parsed, None, "float32").dequantized()
            return float(row_losses(values, weight, hessian, 0.01).sum())

        losses = [
            loss(quantized(weight, hessian, scheme, sweeps=sweeps, refit=refit))
            for sweeps, refit in ((0, False), (2, False), (2, True))
        ]
        assert losses[0] < 0.6 * loss(MinMax().quantize("a", weight, parsed.weight))
        assert losses[2] <= losses[1] < losses[0]


class TestDamping:
    def test_a_singular_hessian_is_damped_more_and_that_is_said(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        hessian = torch.ones(32, 32)  # rank 1
        with caplog.at_level(logging.WARNING, logger="slim.ptq"):
            made = factorize(["model.x"], [hessian], 0.0, [None])
        assert len(made.notes[0]) == 1
        assert made.notes[0][0].startswith("damping raised from 0 to ")
        rebuilt = made.upper[0] * made.diagonal[0] @ made.upper[0].T
        assert torch.allclose(rebuilt, made.hessian[0], atol=1e-4)
        parts = quantized(randn(4, 32), hessian, "w4a16", damp=0.0)
        assert parts.notes == made.notes[0]

    def test_a_hessian_that_has_negative_directions(self) -> None:
        hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        hessian[0, 1] = hessian[1, 0] = 5.0
        with pytest.raises(NumericalError, match=r"mean of x xᵀ of model\.x is not positive"):
            factorize(["model.x"], [hessian], 0.01, [None])

    def test_a_damaged_hessian(self) -> None:
        hessian = hessian_of(32)
        hessian[3, 4] = torch.nan
        with pytest.raises(NumericalError, match=r"the mean of x xᵀ of model\.x has 1 NaN"):
            factorize(["model.x"], [hessian], 0.01, [None])

    def test_silent_channels_are_rounded_and_noted(self) -> None:
        weight, hessian = randn(8, 32), hessian_of(32)
        hessian[5] = hessian[:, 5] = 0.0
        made = quantized(weight, hessian, "w4a16", range="minmax", refit=False)
        plain = MinMax().quantize("a", weight, QuantScheme.parse("w4a16").weight)
        assert torch.equal(made.codes[:, 5], plain.codes[:, 5])
        assert "1 input channels saw no signal" in made.notes[0]

    def test_no_signal_at_all_is_rounding(self) -> None:
        weight = randn(8, 32)
        made = quantized(weight, torch.zeros(32, 32), "w4a16", range="minmax", sweeps=0)
        plain = MinMax().quantize("a", weight, QuantScheme.parse("w4a16").weight)
        assert torch.equal(made.codes, plain.codes)


class TestSeveralAtOnce:
    """Weights of one shape, each with inputs of its own, become what they become alone."""

    def together(
        self, method: GPTQ, weights: list[torch.Tensor], scheme: str, hessians: list[torch.Tensor]
    ) -> tuple[list[Any], list[Any]]:
        parsed = QuantScheme.parse(scheme).weight
        names = [f"a.{index}" for index in range(len(weights))]
        layers = tuple(inputs_of(hessian) for hessian in hessians)
        batch = method.quantize_batch(names, weights, parsed, BatchInputs(layers))
        alone = [
            method.quantize(name, weight, parsed, inputs_of(hessian))
            for name, weight, hessian in zip(names, weights, hessians, strict=True)
        ]
        return batch, alone

    @pytest.mark.parametrize(
        "scheme",
        ["w4a16_asym", "w4a16_g16", "w8a16_tensor", "w4a8_dynamic_g32", "nf4", "w4a8_mxfp"],
    )
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"order": "group", "static_groups": False},
            {"order": "natural", "static_groups": False, "range": "minmax", "sweeps": 0},
            {"order": "natural", "keep_nearest": False, "refit": False},
        ],
    )
    def test_each_as_alone(self, scheme: str, options: dict[str, Any]) -> None:
        weights = [randn(24, 64, seed=seed) * (1 + seed) for seed in range(4)]
        hessians = [hessian_of(64, tokens=30 + 200 * seed, seed=seed) for seed in range(4)]
        for one, other in zip(
            *self.together(GPTQ(**options), weights, scheme, hessians), strict=True
        ):
            # Sums may be made in another order, so one code in a hundred may lie elsewhere.
            assert (one.codes != other.codes).float().mean() <= 0.01
            assert torch.allclose(one.scale, other.scale, rtol=1e-3)
            assert one.offset.shape == other.offset.shape
            assert one.extras.keys() == other.extras.keys()

    @pytest.mark.parametrize("compared", [8, 512])
    def test_rows_that_rounding_serves_better(
        self, monkeypatch: pytest.MonkeyPatch, compared: int
    ) -> None:
        # As many rows are compared of each weight, until there is one with few left.
        monkeypatch.setattr(columns, "_COMPARED", compared)
        weights = [randn(300, 16, seed=seed) for seed in range(3)]
        hessians = [hessian_of(16, tokens=6, seed=5), hessian_of(16, seed=1), torch.eye(16)]
        method = GPTQ(**PLAIN)
        batch, alone = self.together(method, weights, "w4a16", hessians)
        every = GPTQ(**PLAIN, keep_nearest=False)
        taken_back = []
        for weight, hessian, one, other in zip(weights, hessians, batch, alone, strict=True):
            assert torch.equal(one.codes, other.codes)
            fed = every.quantize("a", weight, QuantScheme.parse("w4a16").weight, inputs_of(hessian))
            taken_back.append(int((fed.codes != one.codes).any(dim=1).sum()))
        assert 0 < taken_back[0] < taken_back[1] < 150
        assert taken_back[2] == 0

    def test_what_is_said_of_one_is_not_said_of_the_others(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        silent = hessian_of(32)
        silent[5] = silent[:, 5] = 0.0
        hessians = [hessian_of(32), torch.ones(32, 32), silent]
        weights = [randn(8, 32, seed=seed) for seed in range(3)]
        with caplog.at_level(logging.WARNING, logger="slim.ptq"):
            batch, alone = self.together(GPTQ(damp=0.0), weights, "w4a16", hessians)
        assert [part.notes for part in batch] == [part.notes for part in alone]
        assert [len(part.notes) for part in batch] == [0, 1, 1]
        assert caplog.messages[0].startswith("a.1: damping raised from 0 to ")
        for one, other in zip(batch, alone, strict=True):
            assert torch.equal(one.codes, other.codes)

    def test_the_wrong_one_is_named(self) -> None:
        weights, hessians = [randn(8, 32), randn(8, 32)], [hessian_of(32), hessian_of(32)]
        weights[1][3, 4] = torch.inf
        with pytest.raises(NumericalError, match=r"weight of a\.1"):
            self.together(GPTQ(), weights, "w4a16", hessians)
        hessians[0][3, 4] = torch.nan
        with pytest.raises(NumericalError, match=r"mean of x xᵀ of a\.0"):
            self.together(GPTQ(), [randn(8, 32)] * 2, "w4a16", hessians)

    def test_inputs_are_needed(self) -> None:
        inputs = BatchInputs((inputs_of(hessian_of(32)), LayerInputs(5)))
        scheme = QuantScheme.parse("w4a16").weight
        with pytest.raises(InvalidValueError, match="gptq needs the inputs of b"):
            GPTQ(range="minmax").quantize_batch(["a", "b"], [randn(8, 32)] * 2, scheme, inputs)


def test_layers_with_the_same_inputs_share_the_factorization() -> None:
    inputs = inputs_of(hessian_of(32))
    scheme = QuantScheme.parse("w4a16").weight
    for seed in range(3):
        GPTQ().quantize("a", randn(8, 32, seed=seed), scheme, inputs)
    assert len(inputs.memo) == 1
    GPTQ(damp=0.1).quantize("a", randn(8, 32), scheme, inputs)
    assert len(inputs.memo) == 2


def test_inputs_are_needed() -> None:
    with pytest.raises(InvalidValueError, match=r"gptq needs the inputs of a\.b"):
        GPTQ().quantize("a.b", randn(4, 32), QuantScheme.parse("w4a16").weight)
