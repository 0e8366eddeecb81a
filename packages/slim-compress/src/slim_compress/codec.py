"""The codec slc1 on single matrices: compress, decompress, one tile, facts about a stream.

The byte format is described in ``docs/slc1.md`` of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from slim_compress import _native
from slim_compress.arrays import to_int8
from slim_compress.errors import CorruptStreamError
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError
from slim_core.validate import check_int, check_type

MAGIC = int.from_bytes(b"SLC1", "little")
VERSION = 1
INFO_LENGTH = 10
DEVICE_INFO_LENGTH = 5
FRACTAL = (16, 32)
MODES = ("raw", "fill", "nib", "huf")
_FLAG_TRANSPOSED = 1
_MAX_JOBS = 1024
_LINE = 64  # bytes of a line of memory


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A compressed weight: what ``X.weight``, ``X.index`` and ``X.info`` hold; unpacks into them.

    Attributes
    ----------
    weight : numpy.ndarray
        int8, 1-D: payloads of the tiles and 8 zero bytes.
    index : numpy.ndarray
        int8, 1-D: header, code tables and an entry of 8 bytes for each tile.
    info : numpy.ndarray
        int64 of length 10: fractals of a tile along k and n, k, n, 1, ``"SLC1"``, version, bytes
        of the matrix, bytes of ``weight``, flags.
    """

    weight: np.ndarray
    index: np.ndarray
    info: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.weight, self.index, self.info))


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What the header of a compressed weight says, after it has been checked.

    Attributes
    ----------
    shape : tuple of int
        (n, k) of the matrix, before padding.
    tile_shape : tuple of int
        Rows and columns of a whole tile, normally (128, 256).
    tile_grid : tuple of int
        Tiles along n and k; tile ``r, c`` has the number ``r * tile_grid[1] + c``.
    tables : int
        Code tables, 0 to 4.
    transposed : bool
        The matrix is the transpose of the stored weight's original.
    modes : dict of str to int
        How many tiles are coded in which mode.
    stored_bytes : int
        Bytes of weight, index and info together.
    """

    shape: tuple[int, int]
    tile_shape: tuple[int, int]
    tile_grid: tuple[int, int]
    tables: int
    transposed: bool
    modes: dict[str, int]
    stored_bytes: int

    @property
    def raw_bytes(self) -> int:
        """Bytes of the matrix before compression."""
        return self.shape[0] * self.shape[1]

    @property
    def ratio(self) -> float:
        """Stored bytes over raw bytes; smaller is better."""
        return self.stored_bytes / self.raw_bytes


def compress(
    matrix: Any,
    *,
    jobs: int = 1,
    fast: bool = False,
    transposed: bool = False,
    name: str = "matrix",
) -> Compressed:
    """Compress a matrix without loss.

    Parameters
    ----------
    matrix : numpy.ndarray or torch.Tensor
        (n, k), rows are output channels; int8, or whole numbers that int8 can hold.  Need not be
        contiguous.
    jobs : int
        Threads.  The result does not depend on it.
    fast : bool
        Prefer the 4-bit mode, which decodes several times faster, to the smallest size.
    transposed : bool
        Note in the stream that ``matrix`` is the transpose of the original.
    name : str
        Name of the tensor in messages.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        ``matrix`` is not such a matrix, or another argument is out of range.
    """
    array = to_int8(name, matrix)
    check_int("jobs", jobs, low=1, high=_MAX_JOBS)
    check_type("fast", fast, bool)
    check_type("transposed", transposed, bool)
    weight, index = _native.encode(array, threads=jobs, fast=fast, transposed=transposed)
    return Compressed(weight, index, _make_info(array, weight.size, transposed))


def decompress(
    weight: Any,
    index: Any,
    info: Any,
    *,
    jobs: int = 1,
    name: str = "",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Restore the matrix of a compressed weight.

    Parameters
    ----------
    weight, index, info : numpy.ndarray
        As :func:`compress` returned them.
    jobs : int
        Threads.
    name : str
        Name of the tensor in messages.
    out : numpy.ndarray, optional
        int8 array of shape (n, k) to decode into; undefined after an error.  Fastest if it begins
        at a multiple of 64 bytes and k is such a multiple.

    Returns
    -------
    numpy.ndarray
        int8, (n, k).

    Raises
    ------
    CorruptStreamError
        The stream is not whole; names the tensor, the tile and the reason.
    FormatError
        It is a stream for the device, which only its hardware can decode.
    """
    check_int("jobs", jobs, low=1, high=_MAX_JOBS)
    weight, index = _byte_array("weight", weight), _byte_array("index", index)
    shape = inspect(weight, index, info, name=name).shape  # before anything is allocated
    if out is None:
        out = _empty(shape)
    elif not isinstance(out, np.ndarray) or out.dtype != np.int8:
        raise InvalidTypeError("out must be a numpy array of int8")
    elif out.shape != shape or not out.flags.writeable:
        raise InvalidValueError(f"out must be writeable and have the shape {shape}")
    with _named(name):
        _native.decode_into(weight, index, out, threads=jobs)
    return out


def _empty(shape: tuple[int, int]) -> np.ndarray:
    """Return a matrix that begins at a line of memory, which may be written without reading it."""
    size = shape[0] * shape[1]
    room = np.empty(size + _LINE, np.int8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size].reshape(shape)


def check(weight: Any, index: Any, info: Any, *, jobs: int = 1, name: str = "") -> None:
    """Decode a compressed weight, checking all checksums, without keeping the result.

    Raises
    ------
    CorruptStreamError, FormatError
        As :func:`decompress`.
    """
    check_int("jobs", jobs, low=1, high=_MAX_JOBS)
    weight, index = _byte_array("weight", weight), _byte_array("index", index)
    inspect(weight, index, info, name=name)
    with _named(name):
        _native.check(weight, index, threads=jobs)


def decompress_tile(
    weight: Any, index: Any, info: Any, row: int, col: int, *, name: str = ""
) -> np.ndarray:
    """Restore one tile, normally 128 x 256 elements, reading no other.

    Parameters
    ----------
    weight, index, info : numpy.ndarray
        As :func:`compress` returned them.
    row, col : int
        Place of the tile in the grid of tiles: element ``(128 * row, 256 * col)`` is its first.

    Returns
    -------
    numpy.ndarray
        int8; smaller than a whole tile at the lower and right edges of the matrix.

    Raises
    ------
    CorruptStreamError, FormatError
        As :func:`decompress`.
    InvalidValueError
        There is no such tile.
    """
    weight, index = _byte_array("weight", weight), _byte_array("index", index)
    facts = inspect(weight, index, info, name=name)
    rows, cols = facts.tile_grid
    check_int("row", row, low=0, high=rows - 1)
    check_int("col", col, low=0, high=cols - 1)
    with _named(name):
        data = _native.decode_tile(weight, index, row * cols + col)
    (n, k), (tile_n, tile_k) = facts.shape, facts.tile_shape
    height = min(tile_n, n - row * tile_n)
    width = min(tile_k, k - col * tile_k)
    fractals = np.frombuffer(data, np.int8).reshape(-(-width // FRACTAL[1]), -1, FRACTAL[1])
    nd = fractals.transpose(1, 0, 2).reshape(fractals.shape[1], -1)
    return np.ascontiguousarray(nd[:height, :width])


def inspect(weight: Any, index: Any, info: Any, *, name: str = "") -> StreamInfo:
    """Check the structure of a compressed weight, without decoding it, and describe it.

    Raises
    ------
    CorruptStreamError, FormatError
        As :func:`decompress`.
    """
    weight, index = _byte_array("weight", weight), _byte_array("index", index)
    numbers = _check_info(info, name)
    with _named(name):
        facts = _native.inspect(weight, index)
    n, k, tile_n, tile_k = (facts[key] for key in ("n", "k", "tile_n", "tile_k"))
    flags = _FLAG_TRANSPOSED if facts["transposed"] else 0
    expected = [tile_k, tile_n, k, n, 1, MAGIC, VERSION, n * k, weight.size, flags]
    if numbers != expected:
        raise CorruptStreamError(name, None, "the info array does not fit the header of the index")
    tile_shape = (tile_n * FRACTAL[0], tile_k * FRACTAL[1])
    return StreamInfo(
        shape=(n, k),
        tile_shape=tile_shape,
        tile_grid=(-(-n // tile_shape[0]), -(-k // tile_shape[1])),
        tables=facts["tables"],
        transposed=facts["transposed"],
        modes=dict(zip(MODES, facts["modes"], strict=True)),
        stored_bytes=weight.size + index.size + 8 * INFO_LENGTH,
    )


def _make_info(array: np.ndarray, weight_bytes: int, transposed: bool) -> np.ndarray:
    n, k = array.shape
    flags = _FLAG_TRANSPOSED if transposed else 0
    return np.array([8, 8, k, n, 1, MAGIC, VERSION, n * k, weight_bytes, flags], np.int64)


def _check_info(info: Any, name: str) -> list[int]:
    if not isinstance(info, np.ndarray) or info.dtype.kind not in "iu":
        raise InvalidTypeError("info must be a numpy array of integers")
    if info.shape == (DEVICE_INFO_LENGTH,):
        raise FormatError(
            f"{name or 'compressed weight'} has an info of 5 numbers: it was compressed for the "
            "device, which only its hardware can decode"
        )
    if info.shape != (INFO_LENGTH,):
        raise CorruptStreamError(name, None, f"info has the shape {info.shape}, not (10,)")
    return [int(number) for number in info]


def _byte_array(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype not in (np.int8, np.uint8):
        raise InvalidTypeError(f"{name} must be a numpy array of int8")
    if value.ndim != 1:
        raise InvalidValueError(f"{name} must have 1 dimension, not {value.ndim}")
    return np.ascontiguousarray(value)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn the error of the native code into one that names the tensor."""
    try:
        yield
    except _native.StreamError as error:
        tile, reason = error.args
        raise CorruptStreamError(name, None if tile < 0 else tile, reason) from None
