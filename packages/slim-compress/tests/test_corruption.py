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


# Over all parameters of the tests below: streams, instruction sets.
RANDOM_BITS = 100_000
RANDOM_TABLES = 100_000


@pytest.mark.parametrize("fast", [False, True], ids=["huf", "nib"])
def test_random_bits_of_the_payload(fast, sparse, instruction_set):
    matrix = sparse(40, 300)  # two tiles
    weight, index, info = compress(matrix, fast=fast)
    rng = np.random.default_rng(len(instruction_set))
    tiles = set()
    count = -(-RANDOM_BITS // (2 * len(_native.instruction_sets())))
    for position in rng.integers(0, 8 * weight.size, count):
        bit = np.uint8(1 << position % 8).view(np.int8)
        weight[position // 8] ^= bit
        error = attempt(matrix, weight, index, info)
        weight[position // 8] ^= bit
        assert error is not None
        tiles.add(error.tile)
    assert tiles == {0, 1, None}  # None: the guard
    assert attempt(matrix, weight, index, info) is None


def test_bits_of_large_tiles(stream, instruction_set):
    matrix, (weight, index, info) = stream
    rng = np.random.default_rng(0)
    tiles = set()
    for position in rng.integers(0, 8 * weight.size, 500):
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


@pytest.mark.parametrize("kind", ["some bytes", "any lengths", "lengths of a code"])
def test_random_code_tables(kind, sparse):
    """Lengths up to 15, most of them no prefix code: refused, or another reading of the bits."""
    matrix = sparse(16, 32)
    weight, index, info = compress(matrix)
    rng = np.random.default_rng(0)
    count = -(-RANDOM_TABLES // 3)
    lengths = slice(28 + 4, index.size - 8)
    many = np.repeat(index[None], count, axis=0).view(np.uint8)
    size = lengths.stop - lengths.start
    if kind == "some bytes":
        for _ in range(3):
            places = rng.integers(28, lengths.stop, count)
            many[np.arange(count), places] = rng.integers(0, 256, count)
    elif kind == "any lengths":
        many[:, lengths] = rng.integers(0, 256, (count, size))
    else:  # the same lengths in another order: a complete code, but not the one of the stream
        nibbles = np.stack([many[:, lengths] & 15, many[:, lengths] >> 4], axis=-1)
        nibbles = rng.permuted(nibbles.reshape(count, -1), axis=1).reshape(count, size, 2)
        many[:, lengths] = nibbles[..., 0] | nibbles[..., 1] << 4
    many[:, 24:28] = 0
    refused = set()
    for bad in many:
        bad[24:28] = np.array([_native.crc32c(bad)], np.uint32).view(np.uint8)
        error = attempt(matrix, weight, bad.view(np.int8), info)
        if error is not None:
            refused.add(error.reason)
    if kind == "lengths of a code":
        assert "the checksum of the decoded tile does not match" in refused
    else:
        assert "a code of a table is longer than 11 bits" in refused
        assert "the code lengths of a table do not form a complete prefix code" in refused
