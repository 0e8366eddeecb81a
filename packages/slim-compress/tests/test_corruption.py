"""Damaged streams: always a typed error that names tensor and tile, never wrong data."""

import numpy as np
import pytest

from slim_compress import CorruptStreamError, _native, compress, decompress, decompress_tile
from slim_core.errors import SlimError


@pytest.fixture(params=[False, True], ids=["huf", "nib"])
def stream(request, sparse):
    """Return matrix and stream of four tiles with escapes."""
    matrix = sparse(200, 400)
    return matrix, compress(matrix, fast=request.param)


def attempt(matrix, weight, index, info):
    """Decode; the result must be an error that names the tensor, or the very same matrix."""
    try:
        decoded = decompress(weight, index, info, name="w")
    except CorruptStreamError as error:
        caught = error
    else:
        assert np.array_equal(decoded, matrix)
        return None
    assert caught.tensor == "w"
    assert caught.reason
    assert str(caught).startswith("w")
    return caught


def test_every_bit_of_the_index(stream):
    matrix, (weight, index, info) = stream
    for position in range(8 * index.size):
        bad = index.copy()
        bad[position // 8] ^= np.int8(np.uint8(1 << position % 8).view(np.int8))
        assert attempt(matrix, weight, bad, info) is not None


def test_every_bit_of_the_index_with_the_checksum_made_right(stream):
    matrix, (weight, index, info) = stream
    accepted = 0
    for position in range(8 * index.size):
        if 24 <= position // 8 < 28:
            continue
        bad = index.copy()
        bad[position // 8] ^= np.int8(np.uint8(1 << position % 8).view(np.int8))
        bad[24:28] = 0
        bad[24:28] = np.array([_native.crc32c(bad)], np.uint32).view(np.int8)
        accepted += attempt(matrix, weight, bad, info) is None
    assert accepted == 0


def test_random_bits_of_the_payload(stream, instruction_set):
    matrix, (weight, index, info) = stream
    rng = np.random.default_rng(0)
    tiles = set()
    for position in rng.integers(0, 8 * weight.size, 4000):
        bad = weight.copy()
        bad[position // 8] ^= np.int8(np.uint8(1 << position % 8).view(np.int8))
        error = attempt(matrix, bad, index, info)
        assert error is not None
        tiles.add(error.tile)
    assert tiles >= {0, 1, 2, 3}


def test_truncation_everywhere(stream):
    matrix, (weight, index, info) = stream
    for size in range(0, weight.size, 32):
        assert attempt(matrix, weight[:size], index, info) is not None
    for size in range(index.size):
        assert attempt(matrix, weight, index[:size], info) is not None
    for size in range(10):
        with pytest.raises(SlimError):
            decompress(weight, index, info[:size])


def test_swapped_tiles(sparse):
    matrix = sparse(256, 512)
    weight, index, info = compress(matrix)
    entries = index[-8 * 4 :].reshape(4, 8)
    entries[[0, 3]] = entries[[3, 0]]
    index[24:28] = 0
    index[24:28] = np.array([_native.crc32c(index)], np.uint32).view(np.int8)
    assert attempt(matrix, weight, index, info) is not None


def test_the_message_names_tensor_tile_and_reason(sparse):
    weight, index, info = compress(sparse(128, 512))
    weight[weight.size - 16] ^= 1
    with pytest.raises(CorruptStreamError, match=r"^w, tile 1: ") as caught:
        decompress(weight, index, info, name="w")
    assert caught.value.tile == 1
    with pytest.raises(CorruptStreamError, match=r"^w, tile 1: "):
        decompress_tile(weight, index, info, 0, 1, name="w")
    assert decompress_tile(weight, index, info, 0, 0).shape == (128, 256)


def test_the_first_bad_tile_is_named_whatever_the_threads(sparse):
    weight, index, info = compress(sparse(512, 1024))
    for place in (weight.size // 3, weight.size // 2):
        weight[place] ^= 1
    seen = set()
    for jobs in (1, 2, 7):
        with pytest.raises(CorruptStreamError) as caught:
            decompress(weight, index, info, jobs=jobs)
        seen.add(caught.value.tile)
    assert len(seen) == 1


def test_info_must_fit(stream):
    matrix, (weight, index, info) = stream
    for position in range(10):
        bad = info.copy()
        bad[position] += 1
        assert attempt(matrix, weight, index, bad) is not None


def forged_header(n, k, tables=0, tile=0x88):
    index = np.zeros(100, np.uint8)
    index[:8] = np.frombuffer(b"SLC1" + bytes([1, tables, 0, tile]), np.uint8)
    index[8:16] = np.array([n, k], np.uint32).view(np.uint8)
    index[16:24] = np.array([32], np.uint64).view(np.uint8)
    index[24:28] = np.array([_native.crc32c(index)], np.uint32).view(np.uint8)
    info = np.array([tile >> 4, tile & 15, k, n, 1, 0x31434C53, 1, n * k, 32, 0])
    return np.zeros(32, np.int8), index.view(np.int8), info


def test_a_forged_size_allocates_nothing():
    for n, k in ((1 << 20, 1 << 20), (1 << 31, 1 << 31), (1, 1 << 31), (1 << 31, 1)):
        for tile in (0x88, 0x11, 0x18):
            with pytest.raises(CorruptStreamError, match="index length does not fit"):
                decompress(*forged_header(n, k, tile=tile))
    with pytest.raises(CorruptStreamError, match="zero or above"):
        decompress(*forged_header(0, 5))
    with pytest.raises(CorruptStreamError, match="zero or above"):
        decompress(*forged_header((1 << 31) + 1, 5))
    with pytest.raises(CorruptStreamError, match="code tables"):
        decompress(*forged_header(1, 1, tables=5))
    for tile in (0x80, 0x08, 0x89, 0x98):
        with pytest.raises(CorruptStreamError, match="1 to 8 fractals"):
            decompress(*forged_header(1, 1, tile=tile))


def test_random_code_tables(sparse):
    """Lengths up to 15, most of them no prefix code: refused, or another reading of the bits."""
    matrix = sparse(128, 256)
    weight, index, info = compress(matrix)
    rng = np.random.default_rng(0)
    table_end = index.size - 8
    for _ in range(3000):
        bad = index.copy()
        count = rng.integers(1, 6)
        places = rng.integers(28, table_end, count)
        bad[places] = rng.integers(-128, 128, count)
        bad[24:28] = 0
        bad[24:28] = np.array([_native.crc32c(bad)], np.uint32).view(np.int8)
        attempt(matrix, weight, bad, info)
