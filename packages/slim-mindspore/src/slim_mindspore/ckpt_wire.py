"""The wire structure of a ``.ckpt`` file: where each tensor lies, without reading it.

See :mod:`slim_mindspore.ckpt` for the messages.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from slim_core.errors import CheckpointError

_TRAILER = b"crc_num"
_TRAILER_BYTES = len(_TRAILER) + 10
_CRC_STEP = 1 << 24


@dataclass
class Entry:
    """Shape, dtype name and the ``(offset, size)`` pieces of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[int, int]] = field(default_factory=list)


class _Field(NamedTuple):
    """A field of a message: its number, and an integer or the bytes ``[start, end)``."""

    number: int
    value: int | None
    start: int
    end: int


class _Reader:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is truncated or no MindSpore checkpoint: {reason}")

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        position = start
        while position < end:
            key, position = self.varint(position, end)
            number, kind = key >> 3, key & 7
            if kind == 0:
                value, position = self.varint(position, end)
                yield _Field(number, value, 0, 0)
            elif kind == 2:
                size, position = self.varint(position, end)
                if size > end - position:
                    raise self.error(f"a field at byte {position} ends beyond its message")
                yield _Field(number, None, position, position + size)
                position += size
            else:
                raise self.error(f"wire type {kind} at byte {position}")

    def varint(self, position: int, end: int) -> tuple[int, int]:
        result = 0
        for shift in range(0, 70, 7):
            if position >= end:
                break
            byte = self._data[position]
            position += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result, position
        raise self.error(f"no complete number before byte {position}")

    def text(self, item: _Field) -> str:
        if item.value is not None:
            raise self.error("a number in place of a name")
        try:
            return self._data[item.start : item.end].decode()
        except UnicodeDecodeError as error:
            raise self.error("a name is not UTF-8") from error

    def tensor(self, name: str, item: _Field) -> tuple[tuple[int, ...], str, tuple[int, int]]:
        dims: list[int] = []
        dtype, piece = "", (0, 0)
        for part in self.fields(item.start, item.end):
            if part.number == 1 and part.value is not None:
                dims.append(part.value)
            elif part.number == 1:  # the packed encoding of the same numbers
                position = part.start
                while position < part.end:
                    size, position = self.varint(position, part.end)
                    dims.append(size)
            elif part.number == 2:
                dtype = self.text(part)
            elif part.number == 3:
                piece = (part.start, part.end - part.start)
        if not dtype:
            raise self.error(f"{name} has no dtype")
        return tuple(dims), dtype, piece

    def body_end(self) -> int:
        """Return where the messages end; a CRC-32 behind them is checked."""
        end = len(self._data)
        body = end - _TRAILER_BYTES
        if body < 0 or self._data[body : body + len(_TRAILER)] != _TRAILER:
            return end
        crc = 0
        for start in range(0, body, _CRC_STEP):
            crc = zlib.crc32(self._data[start : min(start + _CRC_STEP, body)], crc)
        if crc != int.from_bytes(self._data[end - 10 : end], "big"):
            raise CheckpointError(f"{self._file} is damaged: its CRC-32 is not the one it carries")
        return body


def read_structure(file: Path, data: mmap.mmap) -> dict[str, Entry]:
    """Return shape, dtype and place of every tensor, in the order of the file.

    Raises
    ------
    CheckpointError
        The bytes are not such a file, or end too early.
    """
    reader = _Reader(file, data)
    entries: dict[str, Entry] = {}
    for value in reader.fields(0, reader.body_end()):
        if value.number != 1 or value.value is not None:
            raise reader.error(f"unexpected field {value.number}")
        parts = {part.number: part for part in reader.fields(value.start, value.end)}
        if 1 not in parts or 2 not in parts:
            raise reader.error("a value without name or tensor")
        name = reader.text(parts[1])
        shape, dtype, piece = reader.tensor(name, parts[2])
        entry = entries.setdefault(name, Entry(shape, dtype))
        if (entry.shape, entry.dtype) != (shape, dtype):
            raise reader.error(f"{name} comes twice, with unlike shapes or dtypes")
        entry.pieces.append(piece)
    if not entries:
        raise reader.error("it holds no tensor")
    return entries
