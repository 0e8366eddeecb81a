import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import InvalidValueError, NumericalError
from slim_lowrank.tucker import tucker2, unfold
from slim_lowrank.vbmf import vbmf_rank


def planted(shape, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return signal + noise * rng.standard_normal(shape)


@pytest.mark.parametrize(
    ("shape", "rank", "noise"),
    [((256, 512), 20, 0.1), ((512, 256), 20, 1.0), ((128, 1024), 16, 0.3), ((64, 64), 8, 0.1)],
)
def test_vbmf_finds_the_planted_rank(shape, rank, noise):
    matrix = planted(shape, rank, noise)
    assert vbmf_rank(matrix) == rank
    assert vbmf_rank(matrix.T) == rank
    assert vbmf_rank(1e-4 * matrix) == rank


def test_vbmf_of_noise_and_of_nothing():
    assert vbmf_rank(np.random.default_rng(0).standard_normal((256, 512))) == 1
    assert vbmf_rank(np.zeros((4, 5))) == 1
    assert vbmf_rank(np.ones((1, 5))) == 1
    assert vbmf_rank(planted((2, 2), 1, 0.0)) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 10_000))
def test_vbmf_never_depends_on_orientation(rows, columns, seed):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    assert vbmf_rank(matrix) == vbmf_rank(matrix.T)
    assert 1 <= vbmf_rank(matrix) <= min(rows, columns)


def kernel(ranks, noise, shape=(64, 48, 3, 3)):
    rng = np.random.default_rng(0)
    core = rng.standard_normal((*ranks, *shape[2:]))
    out, inp = rng.standard_normal((shape[0], ranks[0])), rng.standard_normal((shape[1], ranks[1]))
    signal = np.einsum("abhw,oa,ib->oihw", core, out, inp)
    return signal + noise * signal.std() * rng.standard_normal(shape)


def rebuild(result):
    return np.einsum("abhw,oa,ib->oihw", result.core, result.u_out, result.u_in)


def test_conv_ranks_are_found_on_the_unfoldings():
    weight = kernel((10, 7), 0.1)
    assert (vbmf_rank(unfold(weight, 0)), vbmf_rank(unfold(weight, 1))) == (10, 7)


def test_sweeps_beat_the_one_shot_decomposition():
    weight = np.random.default_rng(0).standard_normal((64, 48, 3, 3))
    one_shot, swept = tucker2(weight, 16, 12, max_sweeps=0), tucker2(weight, 16, 12)
    assert swept.error < one_shot.error - 0.02
    assert swept.error == pytest.approx(0.8918, abs=0.003)
    for result in (one_shot, swept):
        actual = np.linalg.norm(weight - rebuild(result)) / np.linalg.norm(weight)
        assert result.error == pytest.approx(actual, abs=1e-9)
        np.testing.assert_allclose(result.u_in.T @ result.u_in, np.eye(12), atol=1e-10)


def test_exact_ranks_are_recovered_and_signs_are_fixed():
    weight = kernel((10, 7), 0.0)
    result = tucker2(weight, 10, 7)
    np.testing.assert_allclose(rebuild(result), weight, atol=1e-8 * np.abs(weight).max())
    for basis in (result.u_out, result.u_in):
        assert (basis[np.abs(basis).argmax(0), range(basis.shape[1])] > 0).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 3, 3), (6, 5, 2, 3, 2)])
def test_kernels_of_any_dimension(shape):
    weight = np.random.default_rng(0).standard_normal(shape)
    result = tucker2(weight, 6, 5)
    assert result.core.shape == shape
    assert result.error < 1e-7


def test_tucker_refuses():
    with pytest.raises(InvalidValueError, match="rank_in of conv"):
        tucker2(np.ones((4, 3, 1, 1)), 2, 4, name="conv")
    with pytest.raises(NumericalError, match="conv"):
        tucker2(np.full((4, 3, 1, 1), np.nan), 2, 2, name="conv")
    with pytest.raises(InvalidValueError, match="two modes"):
        tucker2(np.ones(4), 1, 1)
