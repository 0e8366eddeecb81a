import numpy as np
import pytest

from slim_lowrank.conv_forms import compose, fit, regress
from slim_lowrank.pivot import pivot_rows

SHAPE = (16, 12, 3, 3)
RANKS = {"out": (7,), "in": (6,), "spatial": (10,), "tucker2": (9, 8)}
FULL = {"out": (16,), "in": (12,), "spatial": (36,), "tucker2": (16, 12)}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SHAPE)
    patches = rng.standard_normal((2000, 108)) @ np.diag(np.arange(1, 109) ** -0.7)
    patches = patches @ np.linalg.qr(rng.standard_normal((108, 108)))[0]
    gradients = rng.standard_normal((500, 16)) * np.arange(1, 17)
    return weight, patches.T @ patches / 2000, gradients.T @ gradients / 500


def error(weight, kernels, form, second, gamma):
    lost = (weight - compose(form, kernels)).reshape(SHAPE[0], -1)
    return np.trace(gamma @ lost @ second @ lost.T)


@pytest.mark.parametrize("form", RANKS)
def test_full_rank_is_exact(form, problem):
    weight, second, gamma = problem
    for metric in ({}, {"second": second}, {"second": second, "gamma": gamma}):
        kernels = fit(form, weight, FULL[form], **metric)
        np.testing.assert_allclose(compose(form, kernels), weight, atol=1e-6)


@pytest.mark.parametrize("form", RANKS)
def test_each_metric_is_served_best_by_its_own_fit(form, problem):
    weight, second, gamma = problem
    metrics = [
        (np.eye(108), np.eye(16)),
        (second, np.eye(16)),
        (second, gamma),
    ]
    fits = [
        fit(form, weight, RANKS[form]),
        fit(form, weight, RANKS[form], second=second),
        fit(form, weight, RANKS[form], second=second, gamma=gamma),
    ]
    for index, metric in enumerate(metrics):
        errors = [error(weight, kernels, form, *metric) for kernels in fits]
        assert min(errors) == errors[index]


@pytest.mark.parametrize(("form", "axes"), [("out", (0,)), ("in", (1,)), ("spatial", (0, 3))])
def test_plain_forms_reach_the_svd_of_their_unfolding(form, axes, problem):
    weight = problem[0]
    rest = [axis for axis in range(4) if axis not in axes]
    rows = int(np.prod([SHAPE[axis] for axis in axes]))
    s = np.linalg.svd(weight.transpose(*axes, *rest).reshape(rows, -1), compute_uv=False)
    kernels = fit(form, weight, RANKS[form])
    lost = np.linalg.norm(weight - compose(form, kernels))
    assert lost == pytest.approx(np.sqrt(np.sum(s[RANKS[form][0] :] ** 2)), rel=1e-9)


@pytest.mark.parametrize("kernel", [(5,), (3, 2), (2, 3, 2), (1, 1)])
def test_kernels_of_any_dimension(kernel):
    rng = np.random.default_rng(1)
    weight, taps = rng.standard_normal((6, 5, *kernel)), int(np.prod(kernel))
    for form, ranks in (("out", (min(6, 5 * taps),)), ("in", (5,)), ("tucker2", (6, 5))):
        kernels = fit(form, weight, ranks)
        np.testing.assert_allclose(compose(form, kernels), weight, atol=1e-8)


def test_two_layers_beat_three_for_1x1():
    weight = np.random.default_rng(0).standard_normal((128, 64, 1, 1))
    errors = {}
    for form, ranks in (("out", (21,)), ("tucker2", (19, 19))):
        lost = weight - compose(form, fit(form, weight, ranks))
        errors[form] = np.linalg.norm(lost) / np.linalg.norm(weight)
    assert errors["out"] < errors["tucker2"] - 0.02


def test_regression_with_dependent_features():
    weight = np.random.default_rng(2).standard_normal((3, 4))
    phi = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    solved = regress(weight, phi, None) @ phi
    np.testing.assert_allclose(solved[:, 0], weight[:, 0], atol=1e-8)


def test_pivot_rows_are_exact():
    rng = np.random.default_rng(3)
    first, last = rng.standard_normal((8, 20)), rng.standard_normal((30, 8))
    pivot, rest, order = pivot_rows(first, last)
    product = last @ first
    np.testing.assert_allclose(np.concatenate([pivot, rest @ pivot])[order], product, atol=1e-10)
    assert all(any(np.allclose(row, other) for other in product) for row in pivot)
    assert pivot.size + rest.size == 8 * (20 + 30) - 64
