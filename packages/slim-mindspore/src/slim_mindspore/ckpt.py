"""MindSpore's ``.ckpt`` files, read and written without MindSpore.

A file is a Protocol Buffers message (no code can hide in it)::

    message Checkpoint { repeated Value value = 1; }
    message Value      { string tag = 1; Tensor tensor = 2; }
    message Tensor     { repeated int64 dims = 1; string tensor_type = 2; bytes content = 3; }

A tensor beyond 512 MiB is several values with one tag and the full ``dims``, whose contents follow
one another.  A trailer ``crc_num`` + 10 bytes, big-endian, may hold the CRC-32 of all before it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from slim_core.checkpoint import TensorInfo
from slim_core.errors import CheckpointError, FormatError
from slim_core.files import MODE_WEIGHTS, PathLike, atomic_write, check_input_file, read_into
from slim_core.validate import did_you_mean
from slim_mindspore.ckpt_wire import read_structure

MAX_BYTES = 20 << 30
CHUNK_BYTES = 512 << 20

DTYPES: dict[str, np.dtype] = {
    "Bool": np.dtype(np.bool_),
    "Int8": np.dtype(np.int8),
    "Int16": np.dtype(np.int16),
    "Int32": np.dtype(np.int32),
    "Int64": np.dtype(np.int64),
    "UInt8": np.dtype(np.uint8),
    "UInt16": np.dtype(np.uint16),
    "UInt32": np.dtype(np.uint32),
    "UInt64": np.dtype(np.uint64),
    "Float16": np.dtype(np.float16),
    "Float32": np.dtype(np.float32),
    "Float64": np.dtype(np.float64),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Int4": np.dtype(np.int8),  # two codes a byte; the shape counts bytes
}
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "Int4"}


class CkptFile:
    """A ``.ckpt`` file whose structure has been read; tensors are read when asked for.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    tensors : dict of str to TensorInfo
        In the order of the file.  ``Int4`` tensors count as int8, two codes a byte.
    int4 : frozenset of str
        Names of the ``Int4`` tensors.

    Raises
    ------
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    CheckpointError
        The file is truncated, damaged, or holds a dtype that is not known; names the tensor.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = check_input_file(path, max_bytes=MAX_BYTES)
        if self.path.stat().st_size == 0:
            raise CheckpointError(f"{self.path} is empty")
        with (
            self.path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            entries = read_structure(self.path, view)
        self.tensors: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[tuple[int, int]]] = {}
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise CheckpointError(f"{self.path}: {name} has the unknown dtype {entry.dtype!r}")
            dtype = DTYPES[entry.dtype]
            nbytes = math.prod(entry.shape) * dtype.itemsize
            stored = sum(size for _, size in entry.pieces)
            if stored != nbytes:
                raise CheckpointError(
                    f"{self.path}: {name} of shape {entry.shape} and {entry.dtype} should have "
                    f"{nbytes} bytes, not {stored}"
                )
            self.tensors[name] = TensorInfo(name, dtype, entry.shape, self.path)
            self._pieces[name] = entry.pieces
        self.int4 = frozenset(name for name, entry in entries.items() if entry.dtype == "Int4")

    def load(self, name: str) -> np.ndarray:
        """Return one tensor, with memory of its own.

        Raises
        ------
        CheckpointError
            There is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}", hint=did_you_mean(name, list(self.tensors))
            )
        raw = bytearray(info.nbytes)
        position = 0
        for start, size in self._pieces[name]:
            read_into(self.path, start, memoryview(raw)[position : position + size])
            position += size
        return np.frombuffer(raw, info.dtype).reshape(info.shape)


def read_ckpt(path: PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a ``.ckpt`` file; errors as :class:`CkptFile`."""
    file = CkptFile(path)
    return {name: file.load(name) for name in file.tensors}


def write_ckpt(
    path: PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    int4: frozenset[str] = frozenset(),
    mode: int = MODE_WEIGHTS,
) -> None:
    """Write tensors as a ``.ckpt`` file that ``mindspore.load_checkpoint`` reads.

    Parameters
    ----------
    path : path
        Replaced once the new file is complete.
    tensors : mapping of str to numpy.ndarray
    int4 : set of str
        Names of int8 tensors of two codes a byte, which are marked ``Int4``.
    mode : int
        Of the file.

    Raises
    ------
    FormatError
        The format has no such dtype; names the tensor.
    """
    types = {name: _type_name(name, array, name in int4) for name, array in tensors.items()}
    with atomic_write(path, mode) as stream:
        for name, array in tensors.items():
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            head = b"".join(b"\x08" + _varint(size) for size in array.shape)
            head += b"\x12" + _delimited(types[name].encode())
            for start in range(0, max(content.nbytes, 1), CHUNK_BYTES):
                piece = content[start : start + CHUNK_BYTES]
                tensor_head = head + b"\x1a" + _varint(piece.nbytes)
                size = len(tensor_head) + piece.nbytes
                value_head = b"\x0a" + _delimited(name.encode()) + b"\x12" + _varint(size)
                total = len(value_head) + size
                stream.write(b"\x0a" + _varint(total) + value_head + tensor_head)
                stream.write(piece.data)


def _type_name(name: str, array: np.ndarray, int4: bool) -> str:
    if int4:
        if array.dtype != np.int8:
            raise FormatError(f"{name}: packed int4 codes must be int8, not {array.dtype}")
        return "Int4"
    if array.dtype not in _NAMES:
        raise FormatError(f"{name}: a .ckpt file cannot hold {array.dtype}")
    return _NAMES[array.dtype]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _delimited(data: bytes) -> bytes:
    return _varint(len(data)) + data
