"""Transforms of inputs against the full Kronecker product."""

import numpy as np
import pytest

from slim_core.errors import FormatError, InvalidValueError
from slim_core.kronecker import (
    identity_transforms,
    kronecker_pair,
    restore_weight,
    transform_input,
)

F32 = np.float32


@pytest.mark.parametrize(
    ("channels", "pair"),
    [
        (64, (8, 8)),
        (128, (8, 16)),
        (5120, (64, 80)),
        (352, (16, 22)),
        (4096, (64, 64)),
        (15, (3, 5)),
    ],
)
def test_published_pairs(channels, pair):
    assert kronecker_pair(channels) == pair


def test_pairs_are_the_nearest_of_equal_parity():
    for channels in range(1, 400):
        found = [
            (a, channels // a)
            for a in range(1, channels + 1)
            if channels % a == 0 and a * a <= channels and (a + channels // a) % 2 == 0
        ]
        if channels % 4 == 2:
            assert not found
            with pytest.raises(FormatError, match=f"{channels} channels have no two factors"):
                kronecker_pair(channels)
        else:
            assert kronecker_pair(channels) == found[-1]


def test_no_channels():
    with pytest.raises(InvalidValueError, match="channels"):
        kronecker_pair(0)


def test_transform_is_a_product_with_the_kronecker_product():
    rng = np.random.default_rng(0)
    x, left, right = (rng.standard_normal(shape) for shape in ((5, 12), (2, 2), (6, 6)))
    full = np.kron(left, right)  # of row-major vectors: vec(L.T X R) = vec(X) @ kron(L, R)
    np.testing.assert_allclose(transform_input(x, left, right), x @ full, rtol=1e-12)
    weight = rng.standard_normal((3, 12))
    restored = restore_weight(weight, left, right)
    np.testing.assert_allclose(x @ restored.T, transform_input(x, left, right) @ weight.T)
    inverse = weight @ np.linalg.inv(full).T
    np.testing.assert_allclose(restore_weight(inverse, left, right), weight)


def test_identities_change_nothing():
    made = identity_transforms(32, np.zeros(1, F32))
    assert {name: (array.dtype, array.shape) for name, array in made.items()} == {
        "left_trans": (F32, (4, 4)),
        "right_trans": (F32, (8, 8)),
        "clip_ratio": (F32, (1,)),
    }
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(F32)
    np.testing.assert_array_equal(transform_input(x, made["left_trans"], made["right_trans"]), x)
    assert made["clip_ratio"].tolist() == [1.0]
