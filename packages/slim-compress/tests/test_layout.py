"""FRACTAL_NZ against its definition and against the numpy form in slim_core."""

import numpy as np
import pytest

from slim_compress import nd_to_nz, nz_to_nd
from slim_compress.layout import round_up
from slim_core.layouts import nd_to_nz as reference

SHAPES = [
    (1, 1),
    (1, 33),
    (15, 31),
    (16, 32),
    (17, 33),
    (127, 255),
    (128, 256),
    (129, 257),
    (1, 100003),
    (100003, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_lies_where_the_formula_says(shape, sparse):
    matrix = sparse(*shape)
    nz = nd_to_nz(matrix)
    n1 = -(-shape[0] // 16)
    i, j = np.indices(shape)
    offset = ((j // 32) * n1 + i // 16) * 512 + (i % 16) * 32 + j % 32
    assert np.array_equal(nz.ravel()[offset], matrix)
    padding = np.ones(nz.size, bool)
    padding[offset.ravel()] = False
    assert not nz.ravel()[padding].any()
    assert np.array_equal(nz, reference(matrix))
    assert np.array_equal(nz_to_nd(nz, shape), matrix)
    assert np.array_equal(nd_to_nz(np.asfortranarray(matrix)), nz)


def test_a_large_matrix(sparse):
    matrix = sparse(4096, 11008)
    assert np.array_equal(nd_to_nz(matrix), reference(matrix))
    assert nd_to_nz(sparse(1024, 1024)).shape == (32, 64, 16, 32)


def test_round_up():
    assert [round_up(value, 16) for value in (0, 1, 16, 17)] == [0, 16, 16, 32]
    with pytest.raises(ValueError, match="block"):
        round_up(3, 0)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="2 dimensions"):
        nd_to_nz(np.zeros((2, 2, 2), np.int8))
    with pytest.raises(ValueError, match="shape"):
        nz_to_nd(np.zeros((1, 1, 16, 32), np.int8), (17, 3))
