"""Writing safetensors files: bounded memory, optional shards, complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from slim_core.checkpoint.part import PartFile
from slim_core.checkpoint.safetensors_file import dtype_code
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError
from slim_core.files import MODE_WEIGHTS, PathLike, as_path, sync_dir, write_json
from slim_core.logging import get_logger
from slim_core.validate import check_int, check_type

_PADDED_SHARDS = 99_999
_logger = get_logger("checkpoint")


class ShardWriter:
    """Writes tensors in the order they come to one safetensors file or to shards.

    Parameters
    ----------
    directory : path
        Must exist.
    prefix : str
        ``prefix.safetensors``, or ``prefix-00001-of-00003.safetensors`` ... for shards.
    max_shard_bytes : int, optional
        A shard is ended before a tensor that would bring its tensors to this many bytes or more;
        a larger tensor goes alone.  With it there is always an index,
        ``prefix.safetensors.index.json``, even of a single shard.  None writes one file.
    mode : int
        Permissions of the weight files; the index has 0600.

    Raises
    ------
    FileNotFoundError
        The directory does not exist.
    InvalidTypeError, InvalidValueError
        A parameter is wrong.

    Notes
    -----
    Files have hidden temporary names until :meth:`close`.  A failed write removes them and raises
    OSError naming the file; so does leaving the ``with`` block by an exception, with no file
    touched that was there before.  Once a state was saved, they stay instead.  ``close`` replaces
    an earlier output of the same prefix, including shards that the new one does not have.

    At most 64 MiB of tensors are buffered, whatever the size of the file.
    """

    def __init__(
        self,
        directory: PathLike,
        prefix: str,
        *,
        max_shard_bytes: int | None = None,
        mode: int = MODE_WEIGHTS,
    ) -> None:
        self._directory = as_path("directory", directory)
        if not self._directory.is_dir():
            raise FileNotFoundError(f"no such directory: {self._directory}")
        self._prefix = check_type("prefix", prefix, str)
        if not prefix or prefix.startswith(".") or "/" in prefix or "\0" in prefix:
            raise InvalidValueError(f"prefix must be the start of a file name, not {prefix!r}")
        if max_shard_bytes is not None:
            check_int("max_shard_bytes", max_shard_bytes, low=1)
        self._limit = max_shard_bytes
        self._mode = mode
        self._token = secrets.token_hex(4)
        self._parts: list[PartFile] = []
        self._names: set[str] = set()
        self._open = True
        self._saved = 0
        self._files: tuple[Path, ...] = ()

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor; a non-contiguous or big-endian one is converted.

        Raises
        ------
        InvalidTypeError
            ``name`` is not a str, or ``array`` is not a numpy array.
        InvalidValueError
            The name was added before, or the writer is closed.
        FormatError
            safetensors cannot hold the dtype.
        OSError
            The file cannot be written, for example on a full disk; names the file.
        """
        check_type("name", name, str)
        if not isinstance(array, np.ndarray):
            raise InvalidTypeError(f"{name} must be a numpy array, not {type(array).__name__}")
        if not self._open:
            raise InvalidValueError(f"{name}: the writer of {self._target} is closed")
        if name in self._names or name == "__metadata__":
            raise InvalidValueError(f"the tensor name {name!r} is taken")
        dtype_code(name, array.dtype)
        with self._cleaning_up():
            self._part_for(name, array.nbytes).add(name, array)
        self._names.add(name)

    def close(self) -> tuple[Path, ...]:
        """Complete the files, give them their names, and return these; again: only return them.

        Raises
        ------
        FormatError
            No tensor was added.
        OSError
            As :meth:`add`.
        """
        if not self._open:
            return self._files
        self.finish()
        with self._cleaning_up():
            self._publish()
        self._open = False
        return self._files

    def finish(self) -> None:
        """Complete the last file; nothing can be added any more, and names are those of before.

        A state of then can be taken up even while :meth:`close` gives the files their names.

        Raises
        ------
        FormatError, OSError
            As :meth:`close`.
        """
        if not self._parts:
            raise FormatError(f"no tensor was added to {self._target}")
        with self._cleaning_up():
            self._parts[-1].finish(self._mode)

    def abort(self) -> None:
        """Remove the temporary files; nothing is written."""
        self._open = False
        for part in self._parts:
            part.discard()
        for file in self._sidecars:
            file.unlink(missing_ok=True)
        self._parts.clear()

    def save_state(self, sync: Callable[[int], object] = os.fsync) -> dict[str, Any]:
        """Flush everything to disk and return JSON values from which :meth:`from_state` goes on.

        A state stays good until the second one after it is saved.

        Parameters
        ----------
        sync : callable
            Flushes a file, given its descriptor, to disk, or sees to it later: the state holds
            from then on.
        """
        with self._cleaning_up():
            self._saved += 1
            sidecar = self._sidecars[self._saved % 2]
            parts = [part.save_state(sidecar, sync) for part in self._parts]
        return {
            "prefix": self._prefix,
            "limit": self._limit,
            "mode": self._mode,
            "token": self._token,
            "saved": self._saved,
            "parts": parts,
        }

    @classmethod
    def from_state(cls, directory: PathLike, state: dict[str, Any]) -> ShardWriter:
        """Return a writer that goes on from :meth:`save_state`; later tensors are forgotten.

        Raises
        ------
        OSError, CheckpointError
            A temporary file is missing or shorter than it was.
        """
        writer = cls(directory, state["prefix"], max_shard_bytes=state["limit"], mode=state["mode"])
        writer._token, writer._saved = state["token"], state["saved"]
        root = writer._directory
        writer._parts = [PartFile.from_state(root, part) for part in state["parts"]]
        writer._names = {name for part in writer._parts for name in part.names}
        number = len(writer._parts) + 1
        while (later := writer._part_path(number)).exists():
            later.unlink()
            number += 1
        return writer

    def release(self) -> None:
        """Close the files and leave them as they are, for :meth:`from_state`."""
        self._open = False
        for part in self._parts:
            part.release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._open:
            self._give_up()

    @property
    def _target(self) -> Path:
        return self._directory / f"{self._prefix}.safetensors"

    @property
    def _sidecars(self) -> tuple[Path, Path]:
        """The files of the last saved state and of the one before."""
        stem = f".{self._prefix}.{self._token}.state"
        return self._directory / f"{stem}0", self._directory / f"{stem}1"

    def _part_path(self, number: int) -> Path:
        return self._directory / f".{self._prefix}.{self._token}.{number}.tmp"

    @contextlib.contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._give_up()
            raise OSError(error.errno, error.strerror, str(self._target)) from error
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Remove what was written, unless a state of it was saved."""
        if self._saved:
            self.release()
        else:
            self.abort()

    def _part_for(self, name: str, nbytes: int) -> PartFile:
        if self._limit is not None and nbytes >= self._limit:
            _logger.warning("%s alone has %d bytes, a shard %d", name, nbytes, self._limit)
        current = self._parts[-1] if self._parts else None
        if current is not None and (
            self._limit is None or not current.nbytes or current.nbytes + nbytes < self._limit
        ):
            return current
        if current is not None:
            current.finish(self._mode)
        number = len(self._parts) + 1
        part = PartFile(self._part_path(number))
        self._parts.append(part)
        return part

    def _publish(self) -> None:
        """Rename the parts, the index last; on failure nothing stays under a final name."""
        files = [self._directory / name for name in self._final_names()]
        index = self._directory / f"{self._prefix}.safetensors.index.json"
        renamed: list[tuple[Path, Path]] = []
        try:
            for part, file in zip(self._parts, files, strict=True):
                if part.path.exists() or not file.exists():  # else an interrupted run renamed it
                    part.path.replace(file)
                renamed.append((part.path, file))
            self._remove_stale({*files, index} if self._limit else {*files})
            if self._limit is not None:
                write_json(index, self._index(files))
        except BaseException:
            for path, file in renamed:
                file.replace(path)
            raise
        for file in self._sidecars:
            file.unlink(missing_ok=True)
        sync_dir(self._directory)
        self._files = (*files, index) if self._limit else (*files,)

    def _final_names(self) -> list[str]:
        if self._limit is None:
            return [self._target.name]
        count = len(self._parts)
        width = 5 if count <= _PADDED_SHARDS else 0
        return [
            f"{self._prefix}-{number:0{width}d}-of-{count:0{width}d}.safetensors"
            for number in range(1, count + 1)
        ]

    def _index(self, files: list[Path]) -> dict[str, object]:
        pairs = zip(self._parts, files, strict=True)
        return {
            "metadata": {"total_size": sum(part.nbytes for part in self._parts)},
            "weight_map": {name: file.name for part, file in pairs for name in part.names},
        }

    def _remove_stale(self, keep: set[Path]) -> None:
        """Remove the rest of an earlier output: engines read every weight file they find."""
        ours = re.compile(re.escape(self._prefix) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        for file in list(self._directory.iterdir()):
            if ours.fullmatch(file.name) and file not in keep:
                file.unlink()
