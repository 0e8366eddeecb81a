"""One safetensors file under construction, written tensor by tensor in bounded memory."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from slim_core.checkpoint.safetensors_file import build_header, dtype_code, frame_header
from slim_core.errors import CheckpointError
from slim_core.files import atomic_write, read_into

BUFFER_BYTES = 64 << 20
HEADER_ROOM = 1 << 20
_COPY_BYTES = 16 << 20
_ODD_SIZES = (4, 2, 1)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class PartFile:
    """A file that becomes valid safetensors with :meth:`finish`.

    The header comes first in the file and is known last.  Up to 64 MiB of tensors wait in memory
    for it; a larger file goes straight to disk behind 1 MiB of room, which the header fills with
    the padding that the format allows.  Only a header that outgrows the room (about 7000 tensors)
    costs a second copy of the data.

    The format has no padding between tensors.  To keep each one aligned to its item size, tensors
    whose bytes are not a multiple of 8 are set aside and put last, larger items first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._finished = False
        self._file: IO[bytes] | None = None
        self._buffer = io.BytesIO()
        self._entries: dict[int, list[_Entry]] = {size: [] for size in (8, *_ODD_SIZES)}
        self._ends = dict.fromkeys(self._entries, 0)
        self._odd: dict[int, IO[bytes]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the order of the file."""
        return [entry.name for entries in self._entries.values() for entry in entries]

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        shape, nbytes = array.shape, array.nbytes
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        size = 8 if nbytes % 8 == 0 else array.dtype.itemsize
        code = dtype_code(name, array.dtype)
        self._target(size, nbytes).write(array.reshape(-1).view(np.uint8).data)
        self._entries[size].append(_Entry(name, code, shape, self._ends[size], nbytes))
        self._ends[size] += nbytes
        self.nbytes += nbytes

    def finish(self, mode: int) -> None:
        """Write the header, flush everything to disk and set the mode; again: do nothing."""
        if self._finished:
            return
        header = self._header()
        if self._file is None:
            self._file = self._create(self.path)
            self._file.write(header)
            self._file.write(self._buffer.getbuffer())
            self._append_odd(self._file)
        else:
            self._append_odd(self._file)
            if len(header) <= HEADER_ROOM:
                self._file.seek(0)
                self._file.write(frame_header(header[8:], HEADER_ROOM - 8))
            else:
                self._file = self._move_behind(header, self._file)
        self._file.flush()
        os.fchmod(self._file.fileno(), mode)
        os.fsync(self._file.fileno())
        self.release()
        self._finished = True

    def discard(self) -> None:
        """Remove what was written."""
        self.path.unlink(missing_ok=True)
        self._second_path.unlink(missing_ok=True)
        self.release()

    def save_state(self, sidecar: Path, sync: Callable[[int], object] = os.fsync) -> dict[str, Any]:
        """Flush everything to disk and return JSON values from which :meth:`from_state` goes on.

        Parameters
        ----------
        sidecar : Path
            File for what waits in memory; not written for a finished file.
        sync : callable
            Flushes a file, given its descriptor, to disk, or sees to it later: the state holds
            from then on.
        """
        entries = [
            (size, *astuple(entry)) for size, rows in self._entries.items() for entry in rows
        ]
        state = {"file": self.path.name, "finished": self._finished, "entries": entries}
        if self._finished:
            return state
        if self._file is not None:
            self._file.flush()
            sync(self._file.fileno())
        with atomic_write(sidecar) as stream:
            for waiting in self._waiting():
                waiting.seek(0)
                shutil.copyfileobj(waiting, stream, _COPY_BYTES)
        return {**state, "sidecar": sidecar.name, "begun": self._file is not None}

    @classmethod
    def from_state(cls, directory: Path, state: dict[str, Any]) -> PartFile:
        """Return the file as it was when :meth:`save_state` gave this state.

        Raises
        ------
        OSError, CheckpointError
            A file is missing or shorter than it was.
        """
        part = cls(directory / state["file"])
        for size, name, code, shape, start, nbytes in state["entries"]:
            part._entries[size].append(_Entry(name, code, tuple(shape), start, nbytes))
            part._ends[size] += nbytes
            part.nbytes += nbytes
        part._finished = state["finished"]
        if part._finished:
            return part
        try:
            part._reopen(directory / state["sidecar"], begun=state["begun"])
        except BaseException:
            part.release()
            raise
        return part

    def release(self) -> None:
        """Close what is open; what was written stays."""
        for stream in (self._file, *self._odd.values()):
            if stream is not None:
                # Closing writes what is buffered, which fails again where a write has failed; a
                # finished file has been flushed before.
                with contextlib.suppress(OSError):
                    stream.close()
        self._file = None
        self._odd.clear()
        self._buffer = io.BytesIO()

    def _reopen(self, sidecar: Path, *, begun: bool) -> None:
        """Take up the streams where :meth:`save_state` left them."""
        if begun:
            self._file = self._without_header(self.path.open("r+b"))
            end = HEADER_ROOM + self._ends[8]
            if self._file.seek(0, os.SEEK_END) < end:
                raise CheckpointError(f"{self.path} is shorter than the {end} bytes it had")
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self.path.unlink(missing_ok=True)  # begun after the state was saved
        offset = 0
        for size, end in self._ends.items():
            if end and not (size == 8 and begun):
                data = bytearray(end)
                read_into(sidecar, offset, memoryview(data))
                self._target(size, 0).write(data)
                offset += end

    def _waiting(self) -> list[IO[bytes]]:
        """Return the streams whose bytes are not in the file yet, in the order of the sizes."""
        first = [] if self._file is not None else [self._buffer]
        return [*first, *(self._odd[size] for size in _ODD_SIZES if size in self._odd)]

    @property
    def _second_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}2")

    def _target(self, size: int, nbytes: int) -> IO[bytes]:
        if size in _ODD_SIZES:
            if size not in self._odd:
                # Without a name on disk: nothing to clean up, even after a kill.
                self._odd[size] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
                    max_size=BUFFER_BYTES // 8, dir=str(self.path.parent)
                )
            return self._odd[size]
        if self._file is None and self._ends[8] + nbytes > BUFFER_BYTES:
            self._file = self._create(self.path)
            self._file.seek(HEADER_ROOM)
            self._file.write(self._buffer.getbuffer())
            self._buffer = io.BytesIO()
        return self._buffer if self._file is None else self._file

    def _header(self) -> bytes:
        rows = []
        base = 0
        for size, entries in self._entries.items():
            for entry in entries:
                start = base + entry.start
                rows.append((entry.name, entry.code, entry.shape, start, start + entry.nbytes))
            base += self._ends[size]
        return build_header(rows)

    def _append_odd(self, file: IO[bytes]) -> None:
        for size in _ODD_SIZES:
            if size in self._odd:
                self._odd[size].seek(0)
                shutil.copyfileobj(self._odd[size], file, _COPY_BYTES)

    def _move_behind(self, header: bytes, first: IO[bytes]) -> IO[bytes]:
        """Copy the data into a second file behind a header that is larger than the room."""
        second = self._create(self._second_path)
        try:
            first.seek(HEADER_ROOM)
            second.write(header)
            shutil.copyfileobj(first, second, _COPY_BYTES)
            self._second_path.replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                second.close()
            raise
        first.close()
        return second

    def _without_header(self, file: IO[bytes]) -> IO[bytes]:
        """Undo :meth:`_move_behind`, if it came after the state was saved."""
        header = 8 + int.from_bytes(file.read(8), "little")
        if header <= HEADER_ROOM:
            return file
        second = self._create(self._second_path)
        file.seek(header)
        second.seek(HEADER_ROOM)
        shutil.copyfileobj(file, second, _COPY_BYTES)
        file.close()
        self._second_path.replace(self.path)
        return second

    @staticmethod
    def _create(path: Path) -> IO[bytes]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        return os.fdopen(descriptor, "w+b")
