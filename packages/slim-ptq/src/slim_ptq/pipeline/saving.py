"""Saving the state of a run while the next piece of work goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from slim_core.resume import ResumableDir


class StateSaver:
    """Waits for the disk in a thread of its own: one state at a time is on its way.

    Used as a context manager; at the end the last state is on disk.

    Parameters
    ----------
    work : ResumableDir
        Whose journal says how far the run is.
    """

    def __init__(self, work: ResumableDir) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slim-save")
        self._descriptors: list[int] = []
        self._pending: Future[None] | None = None

    def sync(self, descriptor: int) -> None:
        """Have a file flushed to disk before the next state is."""
        self._descriptors.append(os.dup(descriptor))

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state once all files given to :meth:`sync` are on disk.

        Raises
        ------
        OSError
            The state before could not be saved, for example on a full disk.
        """
        self.wait()
        files, self._descriptors = self._descriptors, []
        self._pending = self._thread.submit(self._write, files, dict(state))

    def wait(self) -> None:
        """Wait until the last state is on disk.

        Raises
        ------
        OSError
            It could not be saved.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()  # after an error too: what is finished is not lost
            _close(self._descriptors)

    def _write(self, files: list[int], state: dict[str, Any]) -> None:
        try:
            for descriptor in files:
                os.fsync(descriptor)
            self._work.save(state)
        finally:
            _close(files)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # the file was flushed, or its error is on its way
            os.close(descriptor)
    descriptors.clear()
