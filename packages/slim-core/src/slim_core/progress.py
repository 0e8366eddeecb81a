"""How far a long job is: bars on a terminal, lines in the log, events for programs.

All three come from :func:`track`.  The time left is that of the steps so far; steps that an
interrupted run had done before do not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, TypeVar

from slim_core.files import PathLike, as_path
from slim_core.logging import get_logger

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

_log = get_logger("progress")
_streams: list[IO[str]] = []
_shown: list[Progress] = []  # the bars on the terminal, which has room for one group of them


@dataclass(frozen=True)
class Event:
    """One step that was done.

    Parameters
    ----------
    stage : str
        What is being done.
    done : int
        Steps so far, those of an interrupted run included.
    total : int or None
        Of all steps, if that is known.
    seconds : float
        Since this stage began.
    left : float or None
        Estimated seconds until it ends.
    """

    stage: str
    done: int
    total: int | None
    seconds: float
    left: float | None


def track(
    items: Iterable[T], description: str, *, total: int | None = None, done: int = 0
) -> Iterator[T]:
    """Yield the items and report each one that has been worked on.

    Parameters
    ----------
    items : iterable
        What is left to do.
    description : str
        Name of the stage.
    total : int, optional
        Number of all steps; ``done`` and the length of the items if not given.
    done : int
        Steps that were done before.

    Notes
    -----
    A bar is drawn on standard error if that is a terminal, by the first of several processes; that
    of a stage within another one below it.
    """
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    started = time.perf_counter()
    with _bar(description, total, done) as bar:
        for count, item in enumerate(items, 1):
            yield item
            seconds = time.perf_counter() - started
            left = None if total is None else seconds / count * (total - done - count)
            bar()
            _report(Event(description, done + count, total, seconds, left))


@contextlib.contextmanager
def writing_events(path: PathLike) -> Iterator[None]:
    """Append every event to a file as one line of JSON, as long as the context is open.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    with as_path("path", path).open("a", encoding="utf-8") as stream:
        _streams.append(stream)
        try:
            yield
        finally:
            _streams.remove(stream)


def _report(event: Event) -> None:
    left = "" if event.left is None else f", {event.left:.0f} s left"
    total = "" if event.total is None else f" of {event.total}"
    _log.info("%s: %d%s, %.0f s%s", event.stage, event.done, total, event.seconds, left)
    for stream in _streams:
        stream.write(json.dumps(asdict(event)) + "\n")
        stream.flush()


@contextlib.contextmanager
def _bar(description: str, total: int | None, done: int) -> Iterator[Callable[[], None]]:
    """Yield what moves the bar by one step."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda: None
        return
    if _shown:
        outer = _shown[-1]
        inner = outer.add_task(description, total=total, completed=done)
        try:
            yield lambda: outer.advance(inner)
        finally:
            outer.remove_task(inner)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, completed=done)
        _shown.append(progress)
        try:
            yield lambda: progress.advance(task)
        finally:
            _shown.remove(progress)
