"""Sparse quantization against closed forms, and what its knobs do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.dtypes import INT8
from slim_core.errors import InvalidTypeError, InvalidValueError, NumericalError
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.methods.sparse import BULK, Scope, Sparse

ROWS = TensorScheme(INT8, Granularity.PER_CHANNEL)
WHOLE = TensorScheme(INT8, Granularity.PER_TENSOR)


def gaussian(rows: int = 64, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    """Weights of Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(96, 256, generator=generator)
    spread = torch.randn(4, 96, 256, generator=generator).square().mean(dim=0).sqrt()
    return 0.02 * normal / spread


def quantized(
    method: Sparse, weight: torch.Tensor, scheme: TensorScheme = ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scale; offsets of a symmetric type are 0."""
    parts = method.quantize("w", weight, scheme)
    assert parts.offset.shape == parts.scale.shape
    assert not parts.offset.any()
    return parts.codes, parts.scale


def entropy(codes: torch.Tensor) -> float:
    """Bits a code of an ideal order-0 coder."""
    share = torch.bincount(codes.reshape(-1).int() + 128, minlength=256).double()
    share = share[share > 0] / codes.numel()
    return float(-(share * share.log2()).sum())


def error(weight: torch.Tensor, method: Sparse) -> float:
    codes, scale = quantized(method, weight, ROWS)
    return float(torch.dist(codes * scale, weight) / weight.norm())


def test_the_step_of_a_row_is_a_seventh_of_its_threshold() -> None:
    weight = gaussian()
    codes, scale = quantized(Sparse(fraction=0.05), weight, ROWS)
    rank = int(0.05 * 128)
    for row in range(64):
        threshold = sorted((abs(float(w)) for w in weight[row]), reverse=True)[rank - 1]
        assert float(scale[row]) == pytest.approx(threshold / 7, rel=1e-6)
        # Strictly more than 7.5 steps becomes a code beyond 7, and only outliers are that large.
        assert int((codes[row].abs() > BULK).sum()) <= rank
    assert torch.equal(codes, torch.round(weight / scale).clamp(-128, 127).to(torch.int8))
    assert 0.08 < float((codes == 0).float().mean()) < 0.15


def test_one_threshold_for_the_whole_weight() -> None:
    weight = gaussian()
    codes, scale = quantized(Sparse(scope=Scope.TENSOR, fraction=0.05), weight, ROWS)
    threshold = weight.abs().flatten().sort(descending=True).values[int(0.05 * 64 * 128) - 1]
    inlier = torch.where(weight.abs() <= threshold, weight.abs(), torch.zeros(())).amax(1)
    torch.testing.assert_close(scale[:, 0], inlier / 7)
    assert torch.equal(codes, torch.round(weight / scale).clamp(-127, 127).to(torch.int8))


def test_one_scale_for_the_whole_weight() -> None:
    weight = gaussian()
    threshold = weight.abs().flatten().sort(descending=True).values[int(0.02 * 64 * 128) - 1]
    for scope in Scope:
        codes, scale = quantized(Sparse(scope=scope, fraction=0.02), weight, WHOLE)
        assert scale.shape == (1,)
        torch.testing.assert_close(scale[0], threshold / 7)
        assert torch.equal(codes, torch.round(weight / scale).clamp(-127, 127).to(torch.int8))


def test_outliers_beyond_sigmas_of_the_magnitude() -> None:
    weight = gaussian()
    codes, scale = quantized(Sparse(sigma_factor=3.0), weight, ROWS)
    for row in range(64):
        size = weight[row].abs()
        threshold = 3.0 * float(size.std())
        bulk = float(size[size <= threshold].max())
        assert float(scale[row]) == pytest.approx(bulk / 7, rel=1e-6)
    assert torch.equal(codes, torch.round(weight / scale).clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("weight", [gaussian(), heavy_tailed()], ids=["gaussian", "heavy"])
def test_a_larger_fraction_is_more_accurate_and_less_compressible(
    scope: Scope, weight: torch.Tensor
) -> None:
    fractions = [0.01, 0.02, 0.03, 0.05, 0.08, 0.1]
    methods = [Sparse(scope=scope, fraction=fraction) for fraction in fractions]
    codes = [quantized(method, weight)[0] for method in methods]
    errors = [error(weight, method) for method in methods]
    zeros = [float((c == 0).float().mean()) for c in codes]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] * 1.3
    assert zeros == sorted(zeros, reverse=True)
    bits = [entropy(c) for c in codes]
    assert bits == sorted(bits)


@pytest.mark.parametrize("weight", [gaussian(), heavy_tailed()], ids=["gaussian", "heavy"])
def test_a_larger_sigma_factor_is_less_accurate_and_more_compressible(weight: torch.Tensor) -> None:
    methods = [Sparse(sigma_factor=factor) for factor in (3.0, 3.25, 3.5, 3.75, 4.0)]
    errors = [error(weight, method) for method in methods]
    bits = [entropy(quantized(method, weight)[0]) for method in methods]
    assert errors == sorted(errors)
    assert bits == sorted(bits, reverse=True)


def test_power_law_levels_are_few_and_fit_a_linear_scale() -> None:
    weight = gaussian(256, 512)
    for scope in Scope:
        linear = Sparse(scope=scope)
        power = Sparse(scope=scope, nonuniform=True)
        codes, _ = quantized(power, weight)
        assert codes.unique().numel() <= quantized(linear, weight)[0].unique().numel()
        assert int(codes.abs().max()) == 127
        assert error(weight, power) < error(weight, linear)


@pytest.mark.parametrize("nonuniform", [False, True])
@pytest.mark.parametrize("scheme", [ROWS, WHOLE], ids=["rows", "whole"])
@pytest.mark.parametrize(
    "method",
    [{}, {"scope": "tensor"}, {"sigma_factor": 3}],
    ids=["row", "tensor", "sigma"],
)
def test_degenerate_rows(nonuniform: bool, scheme: TensorScheme, method: dict[str, object]) -> None:
    """Rows of zeros, of one value, of outliers only, and a matrix of one column."""
    weight = gaussian(8, 64)
    weight[0] = 0
    weight[1] = 0.5
    weight[2] = torch.tensor([1.0, -1.0]).repeat(32)
    chosen = Sparse(nonuniform=nonuniform, **method)  # type: ignore[arg-type]
    for part in (weight, weight[:, :1], weight[:1], torch.zeros(4, 4)):
        codes, scale = quantized(chosen, part, scheme)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        back = codes * scale
        assert bool(torch.isfinite(back).all())
        assert not back[part == 0].any()


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    fraction=st.floats(0.01, 0.1),
    scope=st.sampled_from(list(Scope)),
)
def test_inliers_are_within_half_a_step(
    seed: int, rows: int, columns: int, fraction: float, scope: Scope
) -> None:
    weight = gaussian(rows, columns, seed)
    codes, scale = quantized(Sparse(scope=scope, fraction=fraction), weight, ROWS)
    unclamped = codes.abs() < 127
    slack = 0.5 * scale * (1 + 1e-5) + 1e-9
    assert bool(((codes * scale - weight).abs() <= slack)[unclamped].all())
    if scope is Scope.ROW:
        assert int((codes.abs() > BULK).sum(dim=1).max()) <= max(1, int(fraction * columns))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"fraction": 0.009}, InvalidValueError),
        ({"fraction": 0.11}, InvalidValueError),
        ({"fraction": math.nan}, InvalidValueError),
        ({"fraction": "0.05"}, InvalidTypeError),
        ({"sigma_factor": 2.9}, InvalidValueError),
        ({"sigma_factor": 4.1}, InvalidValueError),
        ({"sigma_factor": 3.0, "scope": "tensor"}, InvalidValueError),
        ({"scope": "column"}, InvalidValueError),
        ({"nonuniform": 1}, InvalidTypeError),
    ],
)
def test_bad_parameters(values: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(values))):
        Sparse(**values)  # type: ignore[arg-type]


def test_damaged_weights_are_named() -> None:
    weight = gaussian()
    weight[3, 4] = math.nan
    with pytest.raises(NumericalError, match=r"layers\.0\.q_proj has 1 NaN"):
        Sparse().quantize("layers.0.q_proj", weight, ROWS)
