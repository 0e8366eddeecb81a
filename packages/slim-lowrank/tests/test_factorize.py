import numpy as np
import pytest
import scipy.linalg

from slim_core.errors import InvalidTypeError, InvalidValueError, NumericalError
from slim_lowrank import factorize
from slim_lowrank.factorize import (
    BACKENDS,
    balance,
    balanced_factors,
    choose_backend,
    singular_values,
    truncated_svd,
)


def test_backends_reach_the_optimum():
    a = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    tail = np.sqrt(np.sum(np.linalg.svd(a.astype(np.float64), compute_uv=False)[64:] ** 2))
    for backend in BACKENDS:
        u, s, vt = truncated_svd(a, 64, backend=backend)
        error = np.linalg.norm(a - (u * s) @ vt)
        limit = 1.005 if backend == "randomized" else 1 + 1e-5
        assert tail * (1 - 1e-9) <= error <= tail * limit, backend
        np.testing.assert_allclose(u.T @ u, np.eye(64), atol=1e-8)
        assert np.all(np.diff(s) <= 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_exact_rank_is_recovered(backend, shape):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((shape[0], 20)) @ rng.standard_normal((20, shape[1]))
    u, s, vt = truncated_svd(a.astype(np.float32), 20, backend=backend)
    assert np.linalg.norm(a - (u * s) @ vt) < 1e-5 * np.linalg.norm(a)


def test_full_rank_and_rank_deficient_matrices():
    a = np.diag([3.0, 2.0, 0.0, 0.0])
    first, last = balanced_factors(truncated_svd(a, 4))
    np.testing.assert_allclose(last @ first, a, atol=1e-12)
    assert np.isfinite(first).all()
    assert np.isfinite(last).all()


def test_balance_keeps_the_product_and_evens_the_norms():
    rng = np.random.default_rng(2)
    first, last = rng.standard_normal((5, 30)) * 1e3, rng.standard_normal((20, 5))
    first[3], last[:, 3] = 0.0, 0.0
    even_first, even_last = balance(first, last)
    np.testing.assert_allclose(even_last @ even_first, last @ first)
    np.testing.assert_allclose(
        np.linalg.norm(even_first, axis=1), np.linalg.norm(even_last, axis=0), rtol=1e-12
    )


def test_singular_values():
    a = np.random.default_rng(3).standard_normal((30, 50))
    np.testing.assert_allclose(singular_values(a), np.linalg.svd(a, compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("backend", ["arpack", "randomized"])
def test_iterative_backends_are_reproducible(backend):
    a = np.random.default_rng(4).standard_normal((80, 80))
    first, again = (truncated_svd(a, 5, backend=backend, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.u, again.u)


def test_eigh_failure_falls_back_to_gesdd(monkeypatch):
    def failing(*args, **kwargs):
        raise scipy.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(factorize, "top_eigh", failing)
    a = np.random.default_rng(5).standard_normal((20, 10))
    u, s, vt = truncated_svd(a, 10, backend="eigh")
    np.testing.assert_allclose((u * s) @ vt, a)


def test_choice_by_size():
    assert choose_backend((4096, 4096), 64) == "arpack"
    assert choose_backend((4096, 1024), 64) == "eigh"
    assert choose_backend((4096, 4096), 1024) == "eigh"
    assert choose_backend((32768, 32768), 64) == "randomized"


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (np.array([[1.0, np.nan]]), NumericalError),
        (np.array([[1.0, np.inf]]), NumericalError),
        (np.zeros((0, 3)), InvalidValueError),
        (np.zeros(3), InvalidValueError),
        (np.array([["a"]]), InvalidTypeError),
        (np.array([[1j]]), InvalidTypeError),
    ],
)
def test_bad_matrices_are_named(matrix, error):
    with pytest.raises(error, match="fc"):
        truncated_svd(matrix, 1, name="fc")


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_bad_ranks(rank):
    with pytest.raises(InvalidValueError, match="rank of fc"):
        truncated_svd(np.eye(3), rank, name="fc")
