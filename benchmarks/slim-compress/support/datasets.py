"""Weights for the benchmarks, with fixed seeds.

A, B and C are float weights put through the published formula of lowbit sparse quantization: a row
is divided by a seventh of the magnitude that a fraction of its weights exceeds (or of the largest
one within a number of standard deviations) and rounded; outliers keep up to eight bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

SHAPE = (1024, 4096)


def lowbit(weight: np.ndarray, fraction: float = 0.01) -> np.ndarray:
    """Return lowbit codes, int8: the step of a row is its k-th largest magnitude over 7."""
    count = max(1, int(fraction * weight.shape[1]))
    threshold = np.partition(np.abs(weight), -count, axis=1)[:, -count, None]
    step = np.maximum(threshold / 7, np.finfo(np.float32).eps)
    return np.clip(np.rint(weight / step), -128, 127).astype(np.int8)


def lowbit_sigma(weight: np.ndarray, sigma_factor: float = 3.0) -> np.ndarray:
    """Return lowbit codes with ``use_sigma``: outliers lie beyond a multiple of std(|w|)."""
    magnitude = np.abs(weight)
    limit = sigma_factor * magnitude.std(axis=1, ddof=1, keepdims=True)
    inlier = np.where(magnitude <= limit, magnitude, 0).max(axis=1, keepdims=True)
    step = np.maximum(inlier / 7, np.finfo(np.float32).eps)
    return np.clip(np.rint(weight / step), -128, 127).astype(np.int8)


def co_sparse(weight: np.ndarray, fraction: float = 0.01) -> np.ndarray:
    """Return co_sparse codes: one threshold for the tensor, the step of a row from its inliers."""
    magnitude = np.abs(weight)
    count = max(1, int(fraction * weight.size))
    threshold = np.partition(magnitude.ravel(), -count)[-count]
    inlier = np.where(magnitude <= threshold, magnitude, 0).max(axis=1, keepdims=True)
    step = np.maximum(inlier / 7, np.finfo(np.float32).eps)
    return np.clip(np.rint(weight / step), -127, 127).astype(np.int8)


def dense(weight: np.ndarray) -> np.ndarray:
    """Return ordinary symmetric int8 codes, per row."""
    step = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).eps)
    return np.rint(weight / step).astype(np.int8)


def gauss(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(0, 0.02, shape).astype(np.float32)


def heavy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return Student-t weights, six degrees, rows of unlike variance, a few outlier columns."""
    weight = 0.02 * rng.standard_t(6, shape) * rng.lognormal(0, 0.5, (shape[0], 1))
    columns = rng.choice(shape[1], max(1, shape[1] // 80), replace=False)
    weight[:, columns] *= 6.5
    return weight.astype(np.float32)


def coarse(rng: np.random.Generator, shape: tuple[int, int], zeros: float) -> np.ndarray:
    """Return Gaussian codes of a step so coarse that a share of them is 0, and 1 % outliers."""
    sigma = 0.5 / NormalDist().inv_cdf((1 + zeros) / 2)
    codes = np.rint(rng.normal(0, sigma, shape)).clip(-7, 7)
    outliers = rng.random(shape) < 0.01
    codes[outliers] = rng.integers(-128, 128, int(outliers.sum()))
    return codes.astype(np.int8)


def datasets(shape: tuple[int, int] = SHAPE) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield letter, description and int8 matrix of each set."""
    rng = np.random.default_rng(20260101)
    first = lowbit(gauss(rng, shape))
    yield "A", "lowbit, Gaussian", first
    yield "B", "lowbit use_sigma 3, Gaussian", lowbit_sigma(gauss(rng, shape))
    yield "C", "lowbit, Student-t6, outlier columns", lowbit(heavy(rng, shape))
    for letter, zeros in (("D", 0.30), ("E", 0.45), ("F", 0.60)):
        yield letter, f"4-bit, {zeros:.0%} zeros", coarse(rng, shape, zeros)
    magnitude = np.abs(first.astype(np.int16)) + rng.random(shape) / 2
    yield "J", "A, half pruned by magnitude", np.where(magnitude < np.median(magnitude), 0, first)
    yield "G", "dense W8A8, Gaussian", dense(gauss(rng, shape))
    yield "H", "uniform", rng.integers(-128, 128, shape).astype(np.int8)
    yield "I", "zeros", np.zeros(shape, np.int8)
