"""Tensors in the files of ``torch.save``, read without torch.

Two forms exist: a zip archive with ``data.pkl`` and one uncompressed record a storage (since
torch 1.6), and a sequence of pickles followed by the storages (before, and still inside pickled
tensors).  Only the pickles are read here; the bytes of a tensor are read when it is loaded.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from slim_core.errors import CheckpointError, SlimError
from slim_core.files import read_into
from slim_core.unpickler import SAFE_GLOBALS, Globals, Opaque, restricted_load

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NDIM = 32
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGE_TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes that tensors are views of; ``dtype`` is None if only the tensors know it."""

    key: str
    dtype: np.dtype | None
    nbytes: int
    source: Path | bytes
    start: int = -1

    def __setstate__(self, state: Any) -> None:
        raise TypeError("the state of a storage cannot be set")

    def read(self, offset: int, target: memoryview) -> None:
        """Fill a buffer with the bytes from ``offset`` on."""
        first = self.start + offset
        if isinstance(self.source, Path):
            read_into(self.source, first, target)
        else:
            target[:] = self.source[first : first + len(target)]


# Without slots: with them, dataclasses of early Python 3.10 and 3.11 replace __setstate__.
@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise TypeError("the state of a tensor cannot be set")

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_NDIM:
            raise ValueError(f"a tensor with shape {self.shape} and strides {self.strides}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"a tensor with shape {self.shape} and strides {self.strides}")
        if (self.offset + self.extent) * self.dtype.itemsize > self.storage.nbytes:
            raise ValueError(f"a tensor with shape {self.shape} goes beyond its storage")
        if math.prod(self.shape) > self.extent:
            raise ValueError(f"a tensor with shape {self.shape} repeats elements of its storage")

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last one of the view."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for tensors that are the same view of the same storage."""
        return id(self.storage), self.dtype, self.offset, self.shape, self.strides

    def load(self) -> np.ndarray:
        """Read the elements into a C-contiguous array of its own."""
        flat = np.empty(self.extent * self.dtype.itemsize, np.uint8)
        self.storage.read(self.offset * self.dtype.itemsize, flat.data)
        steps = [step * self.dtype.itemsize for step in self.strides]
        view: np.ndarray = np.ndarray(self.shape, self.dtype, flat, strides=steps)
        return view if view.flags.c_contiguous else view.copy("C")


@dataclass(slots=True)
class _Reader:
    """Resolves the storages that one file speaks of."""

    source: Path | bytes
    name: str
    refuse: type[SlimError]
    storages: dict[str, Storage] = field(default_factory=dict)

    def load(self, stream: IO[bytes]) -> Any:
        return restricted_load(
            stream,
            TORCH_GLOBALS,
            source=self.name,
            refuse=self.refuse,
            persistent_load=self._storage,
        )

    def _storage(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, count, *rest = pid
        dtype = storage_type.value
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or any(rest):
            raise ValueError(f"the storage {pid!r:.80} is of no known form")
        nbytes = count * (1 if dtype is None else dtype.itemsize)
        known = self.storages.setdefault(key, Storage(key, dtype, nbytes, self.source))
        if (known.dtype, known.nbytes) != (dtype, nbytes):
            raise ValueError(f"the storage {key} has two sizes")
        return known


def read_torch_file(path: Path, refuse: type[SlimError]) -> Any:
    """Return what ``torch.save`` wrote, with a LazyTensor for each tensor.

    Raises
    ------
    CheckpointError
        The file is damaged or of another kind.
    SlimError
        Of the type ``refuse``: the pickle in it uses globals that are not data.
    """
    with path.open("rb") as stream:
        magic = stream.read(len(_ZIP_MAGIC))
        stream.seek(0)
        reader = _Reader(path, str(path), refuse)
        read = _read_zip if magic == _ZIP_MAGIC else _read_legacy
        return read(stream, path.stat().st_size, reader)


def load_from_bytes(data: bytes, refuse: type[SlimError]) -> Any:
    """Return what the bytes of ``torch.save`` in its older form hold."""
    if not isinstance(data, bytes):
        raise TypeError("a pickled storage without bytes")
    return _read_legacy(io.BytesIO(data), len(data), _Reader(data, "a pickled storage", refuse))


def _read_zip(stream: IO[bytes], size: int, reader: _Reader) -> Any:
    try:
        with zipfile.ZipFile(stream) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{reader.name} is damaged or cut short: {error}") from error
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{reader.name} is a zip archive, but not one of torch.save")
    folder = pickles[0].removesuffix("data.pkl")

    def record(name: str) -> tuple[int, int]:
        info = records.get(folder + name)
        if info is None:
            raise CheckpointError(f"{reader.name} has no record {name}")
        return _locate(stream, info, size, reader.name), info.file_size

    def contents(name: str) -> bytes:
        start, length = record(name)
        stream.seek(start)
        return stream.read(length)

    if folder + "byteorder" in records and contents("byteorder") != b"little":
        raise CheckpointError(f"{reader.name} was written on a big-endian machine")
    root = reader.load(io.BytesIO(contents("data.pkl")))
    for storage in reader.storages.values():
        storage.start, length = record(f"data/{storage.key}")
        if length != storage.nbytes:
            raise CheckpointError(
                f"{reader.name}: storage {storage.key} has {length} bytes, not {storage.nbytes}"
            )
    return root


def _locate(stream: IO[bytes], info: zipfile.ZipInfo, size: int, name: str) -> int:
    """Return where the bytes of an uncompressed record start."""
    stream.seek(max(info.header_offset, 0))
    header = stream.read(_LOCAL_HEADER.size)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{name}: the record {info.filename} is compressed or encrypted")
    if len(header) == _LOCAL_HEADER.size:
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start: int = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic == _ZIP_MAGIC and info.header_offset >= 0 and start + info.file_size <= size:
            return start
    raise CheckpointError(f"{name} is damaged or cut short at the record {info.filename}")


def _read_legacy(stream: IO[bytes], size: int, reader: _Reader) -> Any:
    def header(what: str) -> Any:
        try:
            return restricted_load(stream, {}, source=reader.name, refuse=CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.name} is no file of torch.save: {what}") from error

    if header("no magic number") != _LEGACY_MAGIC or header("no version") != _LEGACY_PROTOCOL:
        raise CheckpointError(f"{reader.name} is no file of torch.save that can be read")
    system = header("no system")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{reader.name} was written on a big-endian machine")
    root = reader.load(stream)
    keys = header("no storages")
    for key in keys if isinstance(keys, list) else ():
        storage = reader.storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(stream.read(8), "little", signed=True)
        start = stream.tell()
        if storage is None or count < 0 or start + storage.nbytes > size:
            raise CheckpointError(f"{reader.name} is damaged or cut short at storage {key!r:.40}")
        itemsize = storage.nbytes // count if count else 1
        if count * itemsize != storage.nbytes:
            raise CheckpointError(f"{reader.name}: storage {key} has another size than announced")
        storage.start = start
        stream.seek(start + storage.nbytes)
    for key, storage in reader.storages.items():
        if storage.start < 0:
            raise CheckpointError(f"{reader.name} lacks the data of storage {key}")
    return root


def _rebuild_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, *metadata: Any
) -> LazyTensor:
    if not isinstance(storage, Storage) or storage.dtype is None or any(metadata):
        raise ValueError("a tensor of a form that is not supported")
    return LazyTensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *metadata: Any,
) -> LazyTensor:
    known = isinstance(dtype, Opaque) and isinstance(dtype.value, np.dtype)
    if not isinstance(storage, Storage) or not known or any(metadata):
        raise ValueError("a tensor of a form that is not supported")
    return LazyTensor(storage, dtype.value, offset, tuple(shape), tuple(strides))


def _first(tensor: Any, *_others: Any) -> Any:
    return tensor


def _torch_globals() -> Globals:
    table: dict[tuple[str, str], Any] = dict(SAFE_GLOBALS)
    for name, kind in _STORAGE_TYPES.items():
        table["torch", name] = Opaque(value=np.dtype(kind))
    for name in _DTYPES:
        kind = getattr(np, name, None) or getattr(ml_dtypes, name, None)
        if kind is not None:
            table["torch", name] = Opaque(value=np.dtype(kind))
    functions: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor_v2": _rebuild_v2,
        "_rebuild_tensor_v3": _rebuild_v3,
        "_rebuild_parameter": _first,
        "_rebuild_parameter_with_state": _first,
    }
    for name, function in functions.items():
        table["torch._utils", name] = Opaque(function=function)
    table["torch.storage", "UntypedStorage"] = Opaque()
    return table


TORCH_GLOBALS = _torch_globals()
