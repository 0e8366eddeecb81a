"""Tests of weight methods: what every one must hold, and what each promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.dtypes import IntType
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError, NumericalError
from slim_core.method import MethodSpec
from slim_core.scheme import QuantScheme, TensorScheme
from slim_ptq.methods import METHODS, LayerInputs, MinMax, make_method
from slim_ptq.methods.clip import Clip
from slim_ptq.methods.grid import minmax_grid
from slim_ptq.methods.hqq import HQQ
from slim_ptq.methods.search import refine_steps, shrink_range
from slim_ptq.methods.signround import SignRound
from slim_ptq.methods.ssz import SSZ

SCHEMES = (
    "w8a16",
    "w8a16_asym",
    "w8a16_tensor",
    "w8a16_g32",
    "w8a8_dynamic",
    "w4a16",
    "w4a16_asym",
    "w4a16_g32",
    "w4a16_g32_asym",
    "w4a8_dynamic_g32",
    "nf4",
    "w4a8_mxfp",
)
SPECS = (
    "minmax",
    "clip",
    {"name": "clip", "weighted": True},
    "ssz",
    {"name": "ssz", "weighted": True},
    "hqq",
    "gptq",
    {"name": "gptq", "order": "group", "static_groups": False},
    {"name": "signround", "iterations": 5},
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(columns: int, *, tokens: int = 512, seed: int = 1) -> LayerInputs:
    """Return the moments of correlated inputs with channels of unlike size."""
    mixing = randn(columns, columns, seed=seed)
    x = randn(tokens, columns, seed=seed + 1) @ mixing * torch.linspace(0.1, 2, columns)
    hessian = x.T @ x / tokens
    return LayerInputs(tokens, hessian, hessian.diagonal())


def dequantized(method: Any, weight: torch.Tensor, scheme: str, inputs: Any = None) -> torch.Tensor:
    parsed = QuantScheme.parse(scheme)
    parts = method.quantize("a", weight, parsed.weight, inputs)
    layer = parts.layer("a", parsed, None, "float32")
    assert layer.codes.dtype == torch.int8
    assert layer.codes.shape == weight.shape
    values: torch.Tensor = layer.dequantized()
    return values


def matrix() -> list[Any]:
    return [
        pytest.param(spec, scheme, id=f"{MethodSpec.parse(spec)}-{scheme}")
        for spec in SPECS
        for scheme in SCHEMES
        if not make_method(MethodSpec.parse(spec)).unsupported(QuantScheme.parse(scheme))
    ]


def test_every_method_is_in_the_matrix() -> None:
    named = {MethodSpec.parse(spec).name for spec in SPECS}
    assert set(METHODS) - named <= {"sparse", "flatquant"}  # which have tests of their own


@pytest.mark.parametrize(("spec", "scheme"), matrix())
class TestEveryMethod:
    def test_shapes_range_and_determinism(self, spec: Any, scheme: str) -> None:
        method = make_method(MethodSpec.parse(spec))
        parsed = QuantScheme.parse(scheme)
        weight, inputs = randn(12, 64), inputs_of(64)
        before = weight.clone()
        parts = method.quantize("a", weight, parsed.weight, inputs)
        plain = MinMax().quantize("a", weight, parsed.weight)
        assert torch.equal(weight, before)
        assert parts.scale.shape == plain.scale.shape
        assert parts.offset.shape == plain.offset.shape
        assert parts.scale.dtype == parts.offset.dtype == torch.float32
        assert {n: t.shape for n, t in parts.extras.items()} == {
            n: t.shape for n, t in plain.extras.items()
        }
        if isinstance(parsed.weight.dtype, IntType):
            assert int(parts.codes.min()) >= parsed.weight.dtype.min
            assert int(parts.codes.max()) <= parsed.weight.dtype.max
        again = method.quantize("a", weight, parsed.weight, inputs_of(64))
        assert torch.equal(parts.codes, again.codes)
        assert torch.equal(parts.scale, again.scale)

    def test_the_output_error_is_not_above_that_of_minmax_by_much(
        self, spec: Any, scheme: str
    ) -> None:
        # Searches minimize other errors than this one, so they may lose a little by chance.
        method, inputs = make_method(MethodSpec.parse(spec)), inputs_of(64)
        weight = randn(48, 64)

        def error(values: torch.Tensor) -> float:
            return float(((values - weight) @ inputs.hessian * (values - weight)).sum())

        plain = error(dequantized(MinMax(), weight, scheme))
        assert error(dequantized(method, weight, scheme, inputs)) <= 1.15 * plain

    def test_half_precision_weights_are_taken_as_they_are(self, spec: Any, scheme: str) -> None:
        method, inputs = make_method(MethodSpec.parse(spec)), inputs_of(64)
        weight = randn(8, 64).bfloat16()
        one = dequantized(method, weight, scheme, inputs)
        assert torch.equal(one, dequantized(method, weight.float(), scheme, inputs))

    def test_rows_of_zeros(self, spec: Any, scheme: str) -> None:
        weight = randn(8, 64)
        weight[3] = 0
        method = make_method(MethodSpec.parse(spec))
        values = dequantized(method, weight, scheme, inputs_of(64))
        assert bool(torch.isfinite(values).all())
        assert float(values[3].abs().max()) <= 1e-4

    def test_damaged_weights_are_named(self, spec: Any, scheme: str) -> None:
        weight = randn(8, 64)
        weight[0, 0] = math.nan
        method = make_method(MethodSpec.parse(spec))
        with pytest.raises(NumericalError, match=r"the weight of x\.y has 1 NaN"):
            method.quantize("x.y", weight, QuantScheme.parse(scheme).weight, inputs_of(64))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_must_divide(spec: Any) -> None:
    scheme = QuantScheme.parse("w4a16_g32").weight
    with pytest.raises(FormatError, match="group size 32 does not divide 48"):
        make_method(MethodSpec.parse(spec)).quantize("a", randn(4, 48), scheme, inputs_of(48))


weights = st.builds(
    lambda seed, rows, power: (
        randn(rows, 64, seed=seed).sign() * randn(rows, 64, seed=seed).abs() ** power
    ),
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),  # up to heavy tails
)
schemes = st.sampled_from(
    [QuantScheme.parse(text).weight for text in SCHEMES if not text.endswith("_tensor")]
)


class TestLowestCode:
    @pytest.mark.parametrize("spec", [s for s in SPECS if s != "minmax"], ids=str)
    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32", "w4a16_tensor", "w4a4_dynamic"])
    def test_chosen_ranges_use_it(self, spec: Any, scheme: str) -> None:
        method, parsed = make_method(MethodSpec.parse(spec)), QuantScheme.parse(scheme)
        # Most of the largest weights are negative: one more step there costs the others nothing.
        weight = randn(24, 64).abs().neg() + 0.8
        parts = method.quantize("a", weight, parsed.weight, inputs_of(64))
        assert int(parts.codes.min()) == -8
        assert int(parts.codes.max()) <= 7

    @pytest.mark.parametrize(
        ("spec", "scheme", "low"),
        [
            *((spec, scheme, -127) for spec in SPECS for scheme in ("w8a16", "w8a8_dynamic")),
            *((spec, "w4a8_dynamic_g32", -7) for spec in ("clip", "ssz", "hqq", "gptq")),
        ],
        ids=str,
    )
    def test_where_it_is_left_out(self, spec: Any, scheme: str, low: int) -> None:
        method, parsed = make_method(MethodSpec.parse(spec)), QuantScheme.parse(scheme)
        weight = randn(24, 64).abs().neg() + 0.8
        parts = method.quantize("a", weight, parsed.weight, inputs_of(64))
        assert int(parts.codes.min()) == low


class TestFullRange:
    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32", "w4a16_tensor", "w8a16", "w8a8"])
    def test_its_scale_and_codes(self, scheme: str) -> None:
        weight, parsed = randn(300, 64) * torch.linspace(0.1, 3, 300)[:, None], scheme
        kind = QuantScheme.parse(parsed).weight
        parts = MinMax(full_range=True).quantize("a", weight, kind)
        size = kind.group_size or 64
        sets = weight.reshape(1, -1) if scheme.endswith("tensor") else weight.reshape(-1, size)
        scale = sets.abs().amax(dim=1) / (2 ** (kind.dtype.bits - 1) - 0.5)
        assert torch.equal(parts.scale.reshape(-1), scale)
        codes = (sets / scale[:, None]).round().clamp(kind.dtype.min, kind.dtype.max)
        assert torch.equal(parts.codes.reshape(sets.shape).float(), codes)
        assert int(parts.codes.min()) == kind.dtype.min

    def test_it_is_a_bool(self) -> None:
        with pytest.raises(InvalidTypeError, match="full_range must be bool"):
            make_method(MethodSpec.parse({"name": "minmax", "full_range": 1}))

    def test_it_loses_less_at_four_bits(self) -> None:
        weight, kind = randn(64, 64), QuantScheme.parse("w4a16")

        def error(method: MinMax) -> float:
            values = method.quantize("a", weight, kind.weight).layer("a", kind, None, "float32")
            return float((values.dequantized() - weight).square().sum())

        assert error(MinMax(full_range=True)) < 0.97 * error(MinMax())

    @pytest.mark.parametrize(
        ("scheme", "says"),
        [
            ("w4a16_asym", "asymmetric weights"),
            ("w4a8_dynamic_g32", "two-stage"),
            ("nf4", "no code beyond"),
            ("w4a8_mxfp", "no code beyond"),
            ("w8a8s", "method sparse"),
        ],
    )
    def test_where_it_is_refused(self, scheme: str, says: str) -> None:
        method, parsed = MinMax(full_range=True), QuantScheme.parse(scheme)
        assert says in str(method.unsupported(parsed))
        if scheme != "w8a8s":  # which is refused as a scheme, not as a kind of weight
            with pytest.raises(InvalidValueError, match=r"x\.y cannot be quantized by minmax"):
                method.quantize("x.y", randn(8, 64), parsed.weight)


class TestSearches:
    @given(weights, schemes)
    @settings(max_examples=25)
    def test_shrinking_never_loses(self, weight: torch.Tensor, scheme: TensorScheme) -> None:
        sets = weight.reshape(-1, scheme.group_size or 64)
        grid = minmax_grid(sets, scheme)
        best = shrink_range(sets, grid)
        assert bool((best.error(sets, None) <= grid.error(sets, None)).all())

    @given(weights, schemes, st.booleans())
    @settings(max_examples=25)
    def test_each_iteration_of_ssz_lowers_the_error(
        self, weight: torch.Tensor, scheme: TensorScheme, weighted: bool
    ) -> None:
        sets = weight.reshape(-1, scheme.group_size or 64)
        importance = randn(1, sets.shape[1]).square().expand_as(sets) if weighted else None
        grid = minmax_grid(sets, scheme)
        last = grid.error(sets, importance)
        for iterations in range(1, 6):
            refined = refine_steps(sets, grid, importance, iterations=iterations)
            error = refined.error(sets, importance)
            assert bool((error <= last).all())
            last = error

    def test_ssz_finds_the_steps_of_weights_that_lie_on_a_grid(self) -> None:
        codes = torch.randint(-7, 7, (4, 64), generator=torch.Generator().manual_seed(0))
        weight = codes * torch.tensor([[0.1], [0.02], [3.0], [1.0]])  # 6 at most: min-max is wrong
        scheme = QuantScheme.parse("w4a16").weight
        made = SSZ().quantize("a", weight, scheme)
        assert torch.allclose(made.scale * made.codes, weight, rtol=1e-5)

    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w4a16_g32", "nf4"])
    def test_clip_and_ssz_of_heavy_tails(self, scheme: str) -> None:
        weight = randn(16, 128).sign() * randn(16, 128).abs() ** 3
        errors = [
            float((dequantized(method, weight, scheme) - weight).square().sum())
            for method in (SSZ(), Clip(), MinMax())
        ]
        assert errors[0] <= errors[1] < errors[2]

    def test_weights_of_silent_channels_do_not_count(self) -> None:
        weight = randn(4, 64)
        weight[:, 0] = 100.0  # would ruin the step of every row
        moments = torch.ones(64)
        moments[0] = 0.0
        scheme = QuantScheme.parse("w4a16").weight
        inputs = LayerInputs(10, moments=moments)
        for kind in (Clip, SSZ):
            made = kind(weighted=True, **({"smallest": 0.01} if kind is Clip else {}))
            values = made.quantize("a", weight, scheme, inputs).layer(
                "a", QuantScheme.parse("w4a16"), None, "float32"
            )
            plain = dequantized(MinMax(), weight, "w4a16")
            error = (values.dequantized() - weight)[:, 1:].square().sum()
            assert float(error) < 0.2 * float((plain - weight)[:, 1:].square().sum())


class TestHQQ:
    @given(weights, schemes, st.booleans())
    @settings(max_examples=25)
    def test_its_objective_never_rises(
        self, weight: torch.Tensor, scheme: TensorScheme, float_offset: bool
    ) -> None:
        sets = weight.reshape(-1, scheme.group_size or 64)
        grid = minmax_grid(sets, scheme)
        last = HQQ().objective(sets, grid)
        for iterations in (1, 2, 5, 20):
            method = HQQ(iterations=iterations, float_offset=float_offset)
            objective = method.objective(sets, method.fit(sets, grid, None))
            assert bool((objective <= last).all())
            last = objective

    def test_zero_points_are_whole_unless_asked(self) -> None:
        scheme = QuantScheme.parse("w4a16_asym").weight
        weight = randn(16, 64) + 0.3
        whole = HQQ().quantize("a", weight, scheme).offset
        free = HQQ(float_offset=True).quantize("a", weight, scheme).offset
        assert torch.equal(whole, whole.round())
        assert not torch.equal(free, free.round())

    def test_fractional_zero_points_lower_the_error(self) -> None:
        weight = randn(16, 64)
        one = HQQ(float_offset=True)
        error = (dequantized(one, weight, "w4a16_g32_asym") - weight).abs().pow(0.7).sum()
        plain = (dequantized(MinMax(), weight, "w4a16_g32_asym") - weight).abs().pow(0.7).sum()
        assert float(error) < 0.98 * float(plain)


class TestSignRound:
    @pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.startswith(("nf4", "w4a8"))])
    def test_no_iterations_are_rounding_to_nearest(self, scheme: str) -> None:
        weight, inputs = randn(8, 64), inputs_of(64)
        parsed = QuantScheme.parse(scheme).weight
        one = SignRound(iterations=0).quantize("a", weight, parsed, inputs)
        other = MinMax().quantize("a", weight, parsed)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.offset, other.offset)

    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32_asym", "w8a16_tensor"])
    def test_each_row_is_at_least_as_good_and_most_are_better(self, scheme: str) -> None:
        weight, inputs = randn(24, 64), inputs_of(64)

        def errors(method: Any) -> torch.Tensor:
            error = dequantized(method, weight, scheme, inputs) - weight
            return ((error @ inputs.hessian) * error).sum(dim=1)

        few, many, plain = errors(SignRound(iterations=20)), errors(SignRound()), errors(MinMax())
        if scheme != "w8a16_tensor":  # whose rows share one scale
            assert bool((few <= plain * (1 + 1e-5)).all())
        assert float(many.sum()) < float(few.sum()) < float(plain.sum())

    def test_tables_are_refused(self) -> None:
        assert SignRound().unsupported(QuantScheme.parse("nf4"))
        assert SignRound().unsupported(QuantScheme.parse("w4a8_dynamic_g32"))


class TestRegistry:
    def test_unknown_methods_and_options(self) -> None:
        with pytest.raises(InvalidValueError, match="did you mean 'gptq'"):
            make_method(MethodSpec("gtpq"))
        with pytest.raises(InvalidValueError, match="has no option 'dump'; it has damp"):
            make_method(MethodSpec.parse({"name": "gptq", "dump": 1}))

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ({"name": "gptq", "damp": 2.0}, r"damp must be in \[0, 1\]"),
            ({"name": "gptq", "order": "up"}, "order must be one of 'natural', 'activation'"),
            ({"name": "gptq", "static_groups": False}, "static_groups must be True with order"),
            ({"name": "gptq", "sweeps": -1}, r"sweeps must be in \[0, 100\]"),
            ({"name": "hqq", "norm": 0.0}, "norm must be in"),
            ({"name": "clip", "steps": 0}, "steps must be in"),
            ({"name": "ssz", "iterations": -1}, "iterations must be in"),
            ({"name": "signround", "rate": 0.0}, "rate must be in"),
        ],
    )
    def test_options_out_of_range(self, spec: Any, says: str) -> None:
        with pytest.raises(InvalidValueError, match=says):
            make_method(MethodSpec.parse(spec))

    def test_as_text_and_back(self) -> None:
        spec = MethodSpec.parse({"name": "gptq", "sweeps": 0, "damp": 0.1})
        assert str(spec) == "gptq(damp=0.1, sweeps=0)"
        assert MethodSpec.parse(spec.to_plain()) == spec
        assert MethodSpec.parse("hqq").to_plain() == "hqq"
