"""FRACTAL_NZ against its index formula, written out element by element."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError
from slim_core.layouts import nd_to_nz, nz_shape, nz_to_nd

SHAPES = [(1, 1), (1, 33), (15, 31), (16, 32), (17, 33), (128, 256), (129, 257), (127, 255)]


def offset(i: int, j: int, rows: int) -> int:
    return ((j // 32) * -(-rows // 16) + i // 16) * 512 + (i % 16) * 32 + j % 32


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_where_the_formula_says(shape):
    rows, columns = shape
    weight = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    nz = nd_to_nz(weight)
    expected = np.zeros(-(-rows // 16) * 16 * -(-columns // 32) * 32, np.int8)
    for i in range(rows):
        for j in range(columns):
            expected[offset(i, j, rows)] = weight[i, j]
    assert nz.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(nz_to_nd(nz, shape), weight)
    np.testing.assert_array_equal(nz_to_nd(nz.reshape(-1), shape), weight)


@pytest.mark.parametrize("shape", [(1, 100_003), (100_003, 1)])
def test_long_and_thin(shape):
    weight = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    nz = nd_to_nz(weight)
    assert nz.shape == nz_shape(shape)
    assert int(np.count_nonzero(nz)) == int(np.count_nonzero(weight))
    np.testing.assert_array_equal(nz_to_nd(nz, shape), weight)


def test_shapes():
    assert nd_to_nz(np.zeros((1024, 1024), np.int8)).shape == (32, 64, 16, 32)
    assert nd_to_nz(np.zeros((48, 40), np.float16)).shape == (3, 3, 16, 16)


def test_a_float16_fractal_has_16_columns():
    weight = np.arange(40, dtype=np.float16).reshape(1, 40)
    nz = nd_to_nz(weight)
    np.testing.assert_array_equal(nz[:, 0, 0, :].reshape(-1)[:40], weight[0])


@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.float16, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.integers(-100, 100),
    )
)
def test_round_trip_of_any_memory_layout(weight):
    for view in (weight, weight.T, weight[::-1, ::2], np.asfortranarray(weight)):
        nz = nd_to_nz(view)
        assert nz.flags.c_contiguous
        back = nz_to_nd(nz, view.shape)
        np.testing.assert_array_equal(back, view)
        assert back.dtype == view.dtype
        assert not np.shares_memory(back, nz)


def test_refused():
    with pytest.raises(FormatError, match="at least one row"):
        nd_to_nz(np.zeros((0, 4), np.int8))
    with pytest.raises(FormatError, match="3 dimensions"):
        nd_to_nz(np.zeros((1, 2, 3), np.int8))
    with pytest.raises(FormatError, match="not 8"):
        nd_to_nz(np.zeros((2, 2)))
    with pytest.raises(InvalidTypeError, match="list"):
        nd_to_nz([[1]])
    nz = nd_to_nz(np.zeros((17, 33), np.int8))
    for shape in [(16, 33), (33, 33), (17, 65)]:
        with pytest.raises(FormatError, match=r"has the shape .* not \(2, 2, 16, 32\)"):
            nz_to_nd(nz, shape)
    with pytest.raises(FormatError, match="has the shape"):
        nz_to_nd(nz.transpose(1, 0, 3, 2), (17, 33))
    for shape in [(17,), (17, 33, 1), (17.0, 33)]:
        with pytest.raises(InvalidValueError, match="two lengths"):
            nz_to_nd(nz, shape)
