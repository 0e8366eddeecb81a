"""The safetensors format: headers checked and written, tensors read one at a time.

Layout: the length of the header as unsigned 64-bit little-endian integer, the header in JSON
(``{"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``, padded with spaces),
then the bytes of all tensors without holes, little-endian, C order.  The library of that name
reads the same files; it is not used here since it cannot list a header without mapping the file,
nor write one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from slim_core.checkpoint.tensor_info import TensorInfo
from slim_core.errors import CheckpointError, FormatError
from slim_core.files import check_input_file, read_into, will_read

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation of the format
METADATA = {"format": "pt"}  # transformers refuses files without it
_PREFIX_BYTES = 8
_MAX_NUMBER = 1 << 62  # both are limits of numpy
_MAX_NDIM = 32

_NUMPY_TYPES: dict[str, type] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
# Some releases of ml_dtypes lack the last of its types.
_ML_TYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {code: np.dtype(kind) for code, kind in _NUMPY_TYPES.items()}
    | {
        code: np.dtype(getattr(ml_dtypes, name))
        for code, name in _ML_TYPES.items()
        if hasattr(ml_dtypes, name)
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_code(name: str, dtype: np.dtype) -> str:
    """Return the code of a dtype in safetensors, for example ``"BF16"``.

    Raises
    ------
    FormatError
        The format has no such type; names the tensor.
    """
    code = _CODES.get(dtype.newbyteorder("="))
    if code is None:
        raise FormatError(f"{name}: safetensors cannot hold the dtype {dtype}")
    return code


class SafetensorsFile:
    """A safetensors file of which only the header has been read.

    Raises
    ------
    CheckpointError
        The header is damaged or does not fit the size of the file; names file and tensor.
    FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = check_input_file(path)
        header, self._data_start = _read_header(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        data_bytes = self.path.stat().st_size - self._data_start
        spans = {name: _parse_entry(self.path, name, entry) for name, entry in header.items()}
        ordered = sorted(spans.items(), key=lambda item: (item[1][1], item[1][2]))
        self.tensors: dict[str, TensorInfo] = {name: span[0] for name, span in ordered}
        self._starts: dict[str, int] = {name: span[1] for name, span in ordered}
        self.aliases: dict[str, str] = {}
        _check_no_holes(self.path, ordered, data_bytes)

    def load(self, name: str) -> np.ndarray:
        """Read one tensor into an array of its own."""
        info = self.tensors[name]
        array = np.empty(info.shape, info.dtype)
        target = array.reshape(-1).view(np.uint8).data
        read_into(self.path, self._data_start + self._starts[name], target)
        return array

    def will_load(self, name: str) -> None:
        """Let the system read a tensor ahead."""
        start = self._data_start + self._starts[name]
        will_read(self.path, start, self.tensors[name].nbytes)


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...], int, int]]) -> bytes:
    """Return length, JSON and padding for (name, dtype code, shape, start, end) of each tensor."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    for name, code, shape, start, end in entries:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return frame_header(text, -(-len(text) // 8) * 8)


def frame_header(text: bytes, length: int) -> bytes:
    """Return the header padded with spaces to ``length`` bytes, with its length before it."""
    return length.to_bytes(_PREFIX_BYTES, "little") + text.ljust(length)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_PREFIX_BYTES), "little")
        if size < _PREFIX_BYTES or length > min(size - _PREFIX_BYTES, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is not a safetensors file, or cut short: its header should have "
                f"{length} bytes, the file has {size}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(f"{path} has a damaged safetensors header: not a JSON object")
    return header, _PREFIX_BYTES + length


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return result


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Return the tensor and where its bytes start and end, behind the header."""
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header entry of {name} is damaged") from None
    sound = all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers)
    if not sound or len(shape) > _MAX_NDIM:
        raise CheckpointError(f"{path}: {name} has the shape {shape} at {start}:{end}")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has the dtype {code!r:.20}, which is not known",
            hint=f"known dtypes: {', '.join(DTYPES)}",
        )
    info = TensorInfo(name, DTYPES[code], tuple(shape), path)
    if info.nbytes != end - start:
        raise CheckpointError(
            f"{path}: {name} has {end - start} bytes, but {code} {shape} needs {info.nbytes}"
        )
    return info, start, end


def _check_no_holes(
    path: Path, ordered: list[tuple[str, tuple[TensorInfo, int, int]]], data_bytes: int
) -> None:
    expected = 0
    for name, (_, start, end) in ordered:
        if start != expected:
            what = (
                "overlaps the tensor before it" if start < expected else "leaves a hole before it"
            )
            raise CheckpointError(f"{path}: {name} {what} ({start} where {expected} should be)")
        expected = end
    if expected != data_bytes:
        raise CheckpointError(
            f"{path} is damaged or cut short: its tensors have {expected} bytes, "
            f"{data_bytes} bytes follow the header"
        )
