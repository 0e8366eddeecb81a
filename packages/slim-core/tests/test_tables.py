"""Types of table values against the casts of ml_dtypes and a search through all levels."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core import tables
from slim_core.scheme import Granularity, QuantScheme, ScaleKind, TensorScheme
from slim_core.tables import FP4, FP8, NF4, decode_table, encode_table

F32 = np.float32
CASTS = {FP4: ml_dtypes.float4_e2m1fn, FP8: ml_dtypes.float8_e4m3fn}


def test_levels():
    assert FP4.levels == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert FP8.levels[:3] == (0, 2**-9, 2**-8)
    assert (FP8.levels[8], FP8.max, len(FP8.levels)) == (2**-6, 448, 127)
    assert NF4.levels == tuple(sorted(NF4.levels))
    assert (NF4.levels[0], NF4.levels[7], NF4.levels[15]) == (-1, 0, 1)
    assert [str(kind) for kind in (FP4, FP8, NF4)] == ["fp4_e2m1", "fp8_e4m3", "nf4"]


@pytest.mark.parametrize("dtype", [FP4, FP8], ids=str)
@given(x=arrays(F32, 16, elements=st.floats(-1000, 1000, width=32)))
def test_rounding_is_that_of_the_cast_but_saturates(dtype, x):
    clipped = np.clip(x, -dtype.max, dtype.max)
    expected = clipped.astype(CASTS[dtype]).astype(F32)
    found = decode_table(encode_table(x, dtype), dtype)
    assert found.tobytes() == expected.tobytes()  # the sign of zero too


@pytest.mark.parametrize("dtype", [FP4, FP8], ids=str)
def test_every_level_and_every_middle(dtype):
    levels = np.array(dtype.levels, F32)
    middles = (levels[1:] + levels[:-1]) / 2
    for x in (levels, middles, np.nextafter(middles, F32(1e9)), np.nextafter(middles, F32(0))):
        for signed in (x, -x):
            expected = signed.astype(CASTS[dtype]).astype(F32)
            np.testing.assert_array_equal(
                decode_table(encode_table(signed, dtype), dtype), expected
            )
    codes = encode_table(levels, dtype)
    np.testing.assert_array_equal(codes, np.arange(len(levels)))


def test_codes_are_the_bits_of_the_type():
    codes = encode_table(F32([0.0, -0.0, 1.0, -1.0, 448.0]), FP8)
    assert codes.view(np.uint8).tolist() == [0, 0x80, 0x38, 0xB8, 0x7E]
    assert encode_table(F32([0.5, -0.5, 6.0, -6.0]), FP4).tolist() == [1, 9, 7, 15]
    assert np.isnan(decode_table(np.array([127, -1], np.int8), FP8)).all()


@given(x=arrays(F32, 16, elements=st.floats(-2, 2, width=32)))
def test_nf4_is_the_nearest_level(x):
    levels = np.array(NF4.levels)
    distance = np.abs(x.astype(float)[:, None] - levels)
    codes = encode_table(x, NF4)
    chosen = distance[np.arange(16), codes]
    assert np.all(chosen <= distance.min(axis=1) + 1e-7)
    np.testing.assert_array_equal(decode_table(codes, NF4), levels[codes].astype(F32))


@pytest.mark.parametrize("dtype", [FP4, FP8, NF4], ids=str)
@given(x=arrays(F32, st.integers(0, 99), elements=st.floats(-500, 500, width=32)))
def test_devices_find_the_codes_that_host_memory_finds(dtype, x):
    codes = encode_table(x, dtype)
    values = decode_table(codes, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_in_host_memory", lambda _: False)
        np.testing.assert_array_equal(encode_table(x, dtype), codes)
        assert decode_table(codes, dtype).tobytes() == values.tobytes()


def test_pieces_make_no_difference():
    x = np.random.default_rng(0).standard_normal((3, 50_000)).astype(F32)[:, ::2]
    for dtype in (FP4, FP8, NF4):
        codes = encode_table(x, dtype)
        assert codes.shape == x.shape
        for row in range(3):
            np.testing.assert_array_equal(codes[row, :1000], encode_table(x[row, :1000], dtype))
            np.testing.assert_array_equal(codes[row, -99:], encode_table(x[row, -99:], dtype))


def test_schemes_of_tables():
    nf4 = QuantScheme.parse("nf4_b128").weight
    assert nf4 == TensorScheme(NF4, Granularity.PER_BLOCK, True, 128)
    mx = TensorScheme(FP4, Granularity.PER_GROUP, True, 32, ScaleKind.E8M0)
    assert QuantScheme.parse("w4a4_mxfp4") == QuantScheme(mx, mx)
