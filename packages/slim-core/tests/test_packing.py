"""The nibble order of the Ascend formats, byte by byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError
from slim_core.packing import pack_int4, unpack_int4

CODES = hnp.arrays(
    np.int8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=7).map(
        lambda shape: tuple(2 * side for side in shape)
    ), elements=st.integers(-8, 7),
)  # fmt: skip


def test_golden_bytes():
    codes = np.array([0, 1, -1, -8, 7, -8, -8, 7, -2, 5], np.int8)
    assert pack_int4(codes).tobytes() == bytes([0x10, 0x8F, 0x87, 0x78, 0x5E])


def test_every_byte_is_one_pair():
    every = np.arange(-128, 128, dtype=np.int16).astype(np.int8)
    codes = unpack_int4(every)
    for byte, (low, high) in zip(every.tolist(), codes.reshape(-1, 2).tolist(), strict=True):
        assert (low & 0xF) | ((high & 0xF) << 4) == byte & 0xFF
    np.testing.assert_array_equal(pack_int4(codes), every)


def test_four_bytes_are_the_int32_of_the_operator():
    codes = np.array([1, -2, 3, -4, 5, -6, 7, -8], np.int8)
    word = sum((int(code) & 0xF) << (4 * place) for place, code in enumerate(codes))
    assert pack_int4(codes).view("<u4").tolist() == [word]


def test_the_two_layouts_of_w4a16():
    codes = np.array([[1, 2, 3], [-4, 5, -6], [0, -1, 7], [-8, 2, 4]], np.int8)
    per_group = pack_int4(codes, axis=-2)
    assert per_group.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            low, high = codes[2 * row : 2 * row + 2, column].tolist()
            assert int(per_group[row, column]) & 0xFF == (low & 0xF) | ((high & 0xF) << 4)
    np.testing.assert_array_equal(pack_int4(codes.T, axis=-1), per_group.T)


@given(CODES, st.data())
def test_round_trip(codes, data):
    axis = data.draw(st.integers(-codes.ndim, codes.ndim - 1))
    packed = pack_int4(codes, axis)
    assert packed.dtype == np.int8
    assert packed.nbytes == codes.size // 2
    np.testing.assert_array_equal(unpack_int4(packed, axis), codes)


@given(CODES, st.data())
def test_torch_gives_the_same_bytes(codes, data):
    torch = pytest.importorskip("torch")
    axis = data.draw(st.integers(-codes.ndim, codes.ndim - 1))
    tensor = torch.from_numpy(codes)
    packed = pack_int4(tensor, axis)
    assert packed.dtype == torch.int8
    np.testing.assert_array_equal(packed.numpy(), pack_int4(codes, axis))
    np.testing.assert_array_equal(unpack_int4(packed, axis).numpy(), codes)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_codes_of_wider_integers(dtype):
    codes = np.array([-8, 7, 3, -1])
    np.testing.assert_array_equal(pack_int4(codes.astype(dtype)), pack_int4(codes.astype(np.int8)))


def test_empty_arrays():
    assert pack_int4(np.zeros((0, 4), np.int8)).shape == (0, 2)
    assert unpack_int4(np.zeros((3, 0), np.int8)).shape == (3, 0)


@pytest.mark.parametrize("bad", [8, -9, 127, -128])
def test_a_code_out_of_range(bad):
    with pytest.raises(FormatError, match=rf"\[-8, 7\], not in \[{min(bad, 0)}, {max(bad, 0)}\]"):
        pack_int4(np.array([0, bad], np.int8))


def test_an_odd_axis():
    with pytest.raises(FormatError, match="axis 1 has length 3"):
        pack_int4(np.zeros((2, 3), np.int8))
    assert pack_int4(np.zeros((2, 3), np.int8), axis=0).shape == (1, 3)


def test_bad_arguments():
    with pytest.raises(InvalidTypeError, match="float32"):
        pack_int4(np.zeros(2, np.float32))
    with pytest.raises(InvalidTypeError, match="uint8"):
        unpack_int4(np.zeros(2, np.uint8))
    with pytest.raises(InvalidTypeError, match="list"):
        pack_int4([1, 2])
    with pytest.raises(InvalidValueError, match=r"axis must be in \[-2, 1\], not 2"):
        pack_int4(np.zeros((2, 2), np.int8), axis=2)
    with pytest.raises(InvalidValueError, match="none"):
        unpack_int4(np.array(1, np.int8))
