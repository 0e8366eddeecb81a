"""Rotations are orthogonal, spread every channel, and are what their factors multiply to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slim_ptq.orthogonal import Orthogonal, paley_one, paley_two

SIZES = [1, 2, 3, 12, 20, 28, 48, 64, 96, 128, 148 * 4, 896, 1536, 172]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal(size: int) -> None:
    matrix = Orthogonal(size).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 12, 20, 28, 48, 64, 128, 148 * 4, 896, 1536])
def test_every_entry_has_the_same_magnitude(size: int) -> None:
    """896 = 32 * 28 (Qwen2 0.5B), 1536 = 128 * 12 (1.5B), 148 = 4 * 37 by Paley's second way."""
    size_of_entries = Orthogonal(size).matrix().abs() * math.sqrt(size)
    torch.testing.assert_close(size_of_entries, torch.ones_like(size_of_entries))


@pytest.mark.parametrize("size", [3, 9 * 8, 172])
def test_sizes_without_a_hadamard_matrix_are_spread_still(size: int) -> None:
    largest = float(Orthogonal(size).matrix().abs().max())
    assert largest < (1.0 if size == 3 else 6 / math.sqrt(size))


@pytest.mark.parametrize("size", [1, 12, 64, 896])
def test_products(size: int) -> None:
    rotation = Orthogonal(size, seed=3)
    matrix = rotation.matrix()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, size, generator=generator)
    torch.testing.assert_close(rotation.right(x), x.double() @ matrix)
    y = torch.randn(size, 4, generator=generator)
    torch.testing.assert_close(rotation.left(y), matrix.T @ y.double())
    torch.testing.assert_close(rotation.left(y[:, 0]), matrix.T @ y[:, 0].double())


def test_seeds() -> None:
    first, again, other = (Orthogonal(64, seed).matrix() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("matrix", [paley_one(3), paley_one(19), paley_two(5), paley_two(13)])
def test_paley(matrix: np.ndarray) -> None:
    side = len(matrix)
    assert np.array_equal(matrix @ matrix.T, side * np.eye(side))
    assert np.array_equal(np.abs(matrix), np.ones((side, side)))
