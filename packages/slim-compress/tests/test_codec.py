"""Round trips, whatever the shape, the values, the threads and the instruction set."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra.numpy import arrays

from slim_compress import Compressed, _native, compress, decompress, decompress_tile, inspect
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError

SHAPES = [
    (1, 1),
    (1, 33),
    (15, 31),
    (16, 32),
    (17, 33),
    (128, 256),
    (129, 257),
    (127, 255),
    (1, 100003),
    (100003, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fast", [False, True])
def test_round_trip_of_awkward_shapes(shape, fast, sparse, instruction_set):
    matrix = sparse(*shape)
    assert np.array_equal(decompress(*compress(matrix, fast=fast)), matrix)
    transposed = compress(matrix.T, fast=fast, transposed=True)
    assert inspect(*transposed).transposed
    assert np.array_equal(decompress(*transposed).T, matrix)


def test_round_trip_of_a_layer_of_7b(sparse):
    matrix = sparse(4096, 11008)
    stream = compress(matrix, jobs=2)
    assert np.array_equal(decompress(*stream, jobs=3), matrix)
    assert inspect(*stream).ratio < 0.46


def test_round_trip_of_views(sparse):
    base = sparse(300, 700)
    for view in (
        base[::2, ::3],
        base[::-1],
        base[:, ::-1],
        base[10:20, 5:300],
        np.asfortranarray(base),
    ):
        assert np.array_equal(decompress(*compress(view)), view)


def test_decodes_into_a_view(sparse):
    matrix = sparse(150, 270)
    stream = compress(matrix)
    room = np.zeros((300, 540), np.int8)
    out = room[::2, ::2]
    assert decompress(*stream, out=out) is out
    assert np.array_equal(out, matrix)
    assert not room[1::2].any()
    assert not room[:, 1::2].any()


def test_whole_lines_are_written_nowhere_else(sparse, instruction_set):
    """Into rows of whole lines, which bypass the caches, with others right beside them."""
    for shape in ((130, 320), (64, 64), (129, 257), (256, 512)):
        matrix = sparse(*shape)
        stream = compress(matrix)
        room = np.full((shape[0] + 2) * 640 + 64, 99, np.int8)
        start = -room.ctypes.data % 64
        for offset in (0, 16, 1):
            frame = room[start + offset : start + offset + (shape[0] + 2) * 576].reshape(-1, 576)
            frame[:] = 99
            out = frame[1:-1, : shape[1]]
            decompress(*stream, out=out, jobs=2)
            assert np.array_equal(out, matrix)
            assert (frame[[0, -1]] == 99).all()
            assert (frame[1:-1, shape[1] :] == 99).all()


def contents():
    rng = np.random.default_rng(7)
    size = (256, 512)
    yield "zeros", np.zeros(size, np.int8)
    yield "one outlier a tile", _with(np.zeros(size, np.int8), np.s_[::128, ::256], 99)
    yield "uniform", rng.integers(-128, 128, size).astype(np.int8)
    yield "256 equiprobable", np.resize(np.arange(-128, 128), size).astype(np.int8)
    yield "alternating", np.resize([3, -3], size).astype(np.int8)
    yield "two values, one rare", _with(np.full(size, 5, np.int8), (0, 0), -5)
    yield "only -128", np.full(size, -128, np.int8)
    yield "one escape", _with(np.resize(np.arange(-4, 4), size).astype(np.int8), (77, 77), 100)
    few = rng.choice(np.arange(-7, 8), size)
    many = np.where(rng.random(size) < 0.55, rng.integers(-128, 128, size), few)
    yield "more than half escapes", many.astype(np.int8)
    yield "half the tiles constant", _with(few.astype(np.int8), np.s_[:128], 1)
    yield "two kinds of tiles", np.where(np.arange(512) < 256, few, 10 * few).astype(np.int8)
    skewed = rng.geometric(0.6, size).clip(1, 60)
    yield "codes of the greatest length", skewed.astype(np.int8)


def _with(array, place, value):
    array[place] = value
    return array


@pytest.mark.parametrize(("name", "matrix"), [pytest.param(*c, id=c[0]) for c in contents()])
@pytest.mark.parametrize("fast", [False, True])
def test_round_trip_of_contents(name, matrix, fast, instruction_set):
    stream = compress(matrix, fast=fast)
    assert np.array_equal(decompress(*stream), matrix)
    # Never more than raw, 16 bytes a tile, tables and guard.
    assert inspect(*stream).stored_bytes <= matrix.size * 1.002 + 512


def test_every_single_value():
    for value in range(-128, 128):
        matrix = np.full((17, 33), value, np.int8)
        assert np.array_equal(decompress(*compress(matrix)), matrix)


def test_incompressible_data_is_stored_raw():
    matrix = np.random.default_rng(0).integers(-128, 128, (1024, 1024)).astype(np.int8)
    facts = inspect(*compress(matrix))
    assert facts.modes["raw"] == 32
    assert facts.stored_bytes <= matrix.size * 1.002


@pytest.mark.parametrize("first", [4, 5, 6])
def test_tiles_that_hardly_shrink(first, instruction_set):
    """Eight bits but for a few values: payloads near 32 KiB, at and around what is still coded."""
    rng = np.random.default_rng(first)
    values = np.r_[np.arange(-128, 128), np.zeros(first, int)]
    matrix = rng.choice(values, (512, 1024)).astype(np.int8)
    stream = compress(matrix)
    assert np.array_equal(decompress(*stream), matrix)
    facts = inspect(*stream)
    assert facts.modes["raw"] + facts.modes["huf"] == 16
    assert facts.stored_bytes <= matrix.size * 1.002


def test_constant_tiles_take_an_index_entry_only():
    facts = inspect(*compress(np.zeros((1024, 4096), np.int8)))
    assert facts.modes == {"raw": 0, "fill": 128, "nib": 0, "huf": 0}
    assert facts.stored_bytes <= 0.002 * 1024 * 4096


def test_unlike_tiles_get_tables_of_their_own(sparse):
    left = sparse(512, 512)
    right = (np.random.default_rng(3).normal(0, 20, (512, 512))).round().clip(-128, 127)
    matrix = np.hstack([left, right.astype(np.int8)])
    one = _native.encode(matrix, max_tables=1)
    four = _native.encode(matrix, max_tables=4)
    assert _native.inspect(*four)["tables"] > 1
    assert four[0].size < 0.99 * one[0].size


def test_rows_that_are_not_counted_may_hold_anything(sparse):
    """Of 256 tiles and more every fourth row is counted for the code tables."""
    shape = (2048, 4096)
    rng = np.random.default_rng(0)
    spread = rng.integers(-128, 128, shape).astype(np.int8)
    for counted in (np.zeros(shape, np.int8), sparse(*shape)):
        matrix = counted.copy()
        matrix[1::4, ::7] = spread[1::4, ::7]
        stream = compress(matrix, jobs=2)
        assert np.array_equal(decompress(*stream, jobs=2), matrix)
        assert inspect(*stream).stored_bytes <= matrix.size * 1.002
    lonely = np.zeros(shape, np.int8)
    lonely[3, 5] = 77
    facts = inspect(*compress(lonely))
    assert facts.modes["fill"] == 255
    assert facts.stored_bytes < 16384


@hypothesis.given(
    arrays(np.int8, st.tuples(st.integers(1, 40), st.integers(1, 70))), st.booleans(), st.booleans()
)
def test_round_trip_property(matrix, fast, transpose):
    matrix = matrix.T if transpose else matrix
    assert np.array_equal(decompress(*compress(matrix, fast=fast)), matrix)


@pytest.mark.parametrize("shape", [(129, 257), (700, 900)])
def test_bytes_do_not_depend_on_threads_or_instruction_set(shape, sparse):
    matrix = sparse(*shape)
    before = _native.instruction_set()
    seen = set()
    try:
        for name in _native.instruction_sets():
            _native.use_instruction_set(name)
            for jobs in (1, 2, 3, 8, 64):
                for fast in (False, True):
                    stream = compress(matrix, jobs=jobs, fast=fast)
                    seen.add((fast, *(array.tobytes() for array in stream)))
                    assert np.array_equal(decompress(*stream, jobs=jobs), matrix)
    finally:
        _native.use_instruction_set(before)
    assert len(seen) == 2


@pytest.mark.parametrize("tile_n", [1, 3, 8])
@pytest.mark.parametrize("tile_k", [1, 2, 8])
def test_other_tile_sizes(tile_n, tile_k, sparse):
    matrix = sparse(300, 500)
    weight, index = _native.encode(matrix, tile_n=tile_n, tile_k=tile_k)
    out = np.empty_like(matrix)
    _native.decode_into(weight, index, out)
    assert np.array_equal(out, matrix)


def test_checksum_by_its_definition(instruction_set):
    """CRC-32C of RFC 3720, bit by bit, at the sizes where kernels change over."""
    data = np.random.default_rng(0).integers(0, 256, 9000).astype(np.uint8)
    remainder = 0xFFFFFFFF
    expected = {}
    for size in range(data.size + 1):
        expected[size] = remainder ^ 0xFFFFFFFF
        remainder ^= int(data[size]) if size < data.size else 0
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    for size in (*range(40), *range(4056, 4140), *range(6450, 6460), *range(8150, 8210), 9000):
        assert _native.crc32c(data[:size]) == expected[size]
    assert _native.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


def test_single_tiles(sparse):
    matrix = sparse(300, 700)
    stream = compress(matrix)
    rows, cols = inspect(*stream).tile_grid
    assert (rows, cols) == (3, 3)
    for row in range(rows):
        for col in range(cols):
            expected = matrix[128 * row : 128 * (row + 1), 256 * col : 256 * (col + 1)]
            assert np.array_equal(decompress_tile(*stream, row, col), expected)
    for row, col in ((3, 0), (0, 3), (-1, 0)):
        with pytest.raises(InvalidValueError, match=r"row|col"):
            decompress_tile(*stream, row, col)


def test_accepts_whole_numbers_of_other_types():
    matrix = np.array([[1.0, -128.0], [127.0, 0.0]])
    assert np.array_equal(decompress(*compress(matrix)), matrix)


@pytest.mark.parametrize(
    ("matrix", "error", "words"),
    [
        (np.zeros(3, np.int8), InvalidValueError, "q must have 2 dimensions, not 1"),
        (np.zeros((0, 3), np.int8), InvalidValueError, "q has no elements"),
        (np.full((2, 2), 128), InvalidValueError, "q has the value 128"),
        (np.full((2, 2), 0.5), InvalidValueError, "q has the value 0.5"),
        (np.full((2, 2), np.nan), InvalidValueError, "q has the value nan"),
        (np.zeros((2, 2), np.float16), FormatError, "q is float16"),
        (np.zeros((2, 2), np.complex64), InvalidTypeError, "q must hold numbers"),
        ([[1]], InvalidTypeError, "q must be a torch.Tensor or a numpy array, not list"),
    ],
)
def test_refuses_what_is_no_weight(matrix, error, words):
    with pytest.raises(error, match=words):
        compress(matrix, name="q")


def test_refuses_wrong_arguments(sparse):
    matrix = sparse(4, 4)
    stream = compress(matrix)
    for jobs in (0, True, 1.0, 5000):
        with pytest.raises((InvalidValueError, InvalidTypeError), match="jobs"):
            compress(matrix, jobs=jobs)
    with pytest.raises(InvalidTypeError, match="weight must be"):
        decompress(b"", stream.index, stream.info)
    with pytest.raises(InvalidValueError, match="out must be"):
        decompress(*stream, out=np.empty((4, 5), np.int8))
    with pytest.raises(InvalidTypeError, match="out must be"):
        decompress(*stream, out=np.empty((4, 4), np.uint8))


def test_device_streams_are_not_decoded():
    device = Compressed(np.zeros(64, np.int8), np.zeros(8, np.int8), np.array([8, 8, 9, 9, 1]))
    with pytest.raises(FormatError, match="compressed for the device"):
        decompress(*device, name="x")
