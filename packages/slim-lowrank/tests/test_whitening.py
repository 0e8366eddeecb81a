import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import NumericalError
from slim_lowrank.whitening import MatrixProblem, shrink, symmetric_power


def spectrum_inputs(rng, count, width, decay):
    basis, _ = np.linalg.qr(rng.standard_normal((width, width)))
    scales = np.arange(1, width + 1) ** (-decay / 2)
    return rng.standard_normal((count, width)) * scales @ basis.T


def relative_error(weight, factors, x):
    y = x @ weight.T
    return np.linalg.norm(y - x @ (factors[1] @ factors[0]).T) / np.linalg.norm(y)


def moments(rng, count=1000, width=40):
    x = rng.standard_normal((count, width)) * np.arange(1, width + 1)
    return x.T @ x / count


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_optimal_on_anisotropic_inputs(scale):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 512)) / np.sqrt(512)
    x = scale * spectrum_inputs(rng, 12288, 512, 0.5)
    train, test = x[:8192], x[8192:]
    second = shrink(train.T @ train / len(train), 1e-4)
    problem = MatrixProblem(weight, second=second)
    held_out = relative_error(weight, problem.factors(128), test)
    plain = relative_error(weight, MatrixProblem(weight).factors(128), test)
    squared = MatrixProblem(weight, second=second @ second)  # weighting by C, not its root
    weighted = relative_error(weight, squared.factors(128), test)
    assert held_out <= 0.575
    assert held_out < weighted - 0.01 < plain - 0.01
    predicted = np.sqrt(problem.losses[128] / problem.losses[0])
    calibrated = relative_error(weight, problem.factors(128), train)
    assert calibrated == pytest.approx(predicted, rel=1e-3)


def test_prediction_is_exact_without_shrinkage():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 96))
    x = spectrum_inputs(rng, 400, 96, 1.0)
    problem = MatrixProblem(weight, second=x.T @ x / len(x))
    for rank in (1, 10, 63):
        predicted = np.sqrt(problem.losses[rank] / problem.losses[0])
        assert relative_error(weight, problem.factors(rank), x) == pytest.approx(
            predicted, abs=1e-9
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 10_000))
def test_equals_explicit_whitening(rows, columns, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns))
    a = rng.standard_normal((columns, 2 * columns + 2))
    second = a @ a.T / a.shape[1] + 1e-3 * np.eye(columns)
    root = np.linalg.cholesky(second)
    s = np.linalg.svd(weight @ root, compute_uv=False)
    problem = MatrixProblem(weight, second=second)
    for rank in range(1, min(rows, columns) + 1):
        first, last = problem.factors(rank)
        error = np.sum(((weight - last @ first) @ root) ** 2)
        optimum = np.sum(s[rank:] ** 2)
        assert error == pytest.approx(optimum, rel=1e-6, abs=1e-9 * np.sum(s**2))
        assert problem.losses[rank] == pytest.approx(optimum, rel=1e-6, abs=1e-9 * np.sum(s**2))


@pytest.mark.parametrize("shape", [(30, 40), (60, 40)])
def test_two_sided_optimum(shape):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal(shape)
    second, gamma = moments(rng), moments(rng, width=shape[0])
    problem = MatrixProblem(weight, second=second, gamma=gamma)
    left, right = symmetric_power(gamma, 0.5), symmetric_power(second, 0.5)
    s = np.linalg.svd(left @ weight @ right, compute_uv=False)
    for rank in (1, 8, 29):
        first, last = problem.factors(rank)
        error = np.linalg.norm(left @ (weight - last @ first) @ right)
        assert error == pytest.approx(np.sqrt(np.sum(s[rank:] ** 2)), rel=1e-6)
        assert problem.losses[rank] == pytest.approx(np.sum(s[rank:] ** 2), rel=1e-6)


def test_outputs_alone_give_the_same_factors():
    rng = np.random.default_rng(3)
    weight, second = rng.standard_normal((20, 40)), moments(rng)
    inputs = MatrixProblem(weight, second=second)
    outputs = MatrixProblem(weight, output=weight @ second @ weight.T)
    for rank in (3, 20):
        a, b = inputs.factors(rank), outputs.factors(rank)
        np.testing.assert_allclose(a[1] @ a[0], b[1] @ b[0], atol=1e-8)


def test_singular_statistics():
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((512, 512))
    x = rng.standard_normal((100, 512))
    for gamma in (None, np.eye(512)):
        problem = MatrixProblem(weight, second=x.T @ x / 100, gamma=gamma)
        factors = problem.factors(64)
        assert all(np.isfinite(factor).all() for factor in factors)
        plain = MatrixProblem(weight).factors(64)
        assert relative_error(weight, factors, x) <= relative_error(weight, plain, x)
        assert relative_error(weight, problem.factors(100), x) < 1e-6


def test_nan_is_named():
    with pytest.raises(NumericalError, match="statistics of fc"):
        MatrixProblem(np.eye(2), second=np.full((2, 2), np.nan), name="fc")
