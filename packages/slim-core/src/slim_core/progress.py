"""How far a long job is: bars on a terminal, lines elsewhere and in the log, events for programs.

All come from :func:`track`, from the first of several processes alone.  The time left is that of
the steps so far; steps that an interrupted run had done before do not count.
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
_plain: list[None] = []  # one for each plain_progress() that is open

LINE_SECONDS = 10.0  # between lines where there is no terminal


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

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total}"
        left = "" if self.left is None else f", {self.left:.0f} s left"
        return f"{self.stage}: {self.done}{total}, {self.seconds:.0f} s{left}"


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
    A bar is drawn on standard error if that is a terminal; that of a stage within another one below
    it.
    """
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    started = time.perf_counter()
    with _bar(description, total, done) as bar:
        for count, item in enumerate(items, 1):
            yield item
            seconds = time.perf_counter() - started
            left = None if total is None else seconds / count * (total - done - count)
            event = Event(description, done + count, total, seconds, left)
            bar(event)
            _report(event)


@contextlib.contextmanager
def writing_events(target: PathLike | IO[str]) -> Iterator[None]:
    """Write every event as one line of JSON, as long as the context is open.

    Parameters
    ----------
    target : path or text stream
        The lines are appended to a file.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(target, (str, os.PathLike)):
            path = as_path("target", target)
            target = stack.enter_context(path.open("a", encoding="utf-8"))
        _streams.append(target)
        stack.callback(_streams.remove, target)
        yield


@contextlib.contextmanager
def plain_progress() -> Iterator[None]:
    """Print lines on standard error where it is no terminal, as long as the context is open.

    At most one every ten seconds: short stages print none.
    """
    _plain.append(None)
    try:
        yield
    finally:
        _plain.pop()


def _report(event: Event) -> None:
    if not _is_first():
        return
    _log.info("%s", event)
    for stream in _streams:
        stream.write(json.dumps(asdict(event)) + "\n")
        stream.flush()


def _is_first() -> bool:
    """Whether this is the first of several processes, which speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _bar(description: str, total: int | None, done: int) -> Iterator[Callable[[Event], None]]:
    """Yield what shows a step to whoever looks on."""
    if not _is_first():
        yield lambda _event: None
        return
    if not sys.stderr.isatty():
        yield _Lines().show if _plain else lambda _event: None
        return
    from slim_core.progress_bar import advance, new_bars

    with contextlib.ExitStack() as stack:
        outermost = not _shown
        if outermost:
            _shown.append(stack.enter_context(new_bars()))
            stack.callback(_shown.clear)
        bars = _shown[-1]
        task = bars.add_task(description, total=total, completed=done, left=None, at=0.0)
        try:
            yield lambda event: advance(bars, task, event.left)
        finally:
            if not outermost:
                bars.remove_task(task)


class _Lines:
    """Lines on standard error for a stage that takes long, where there is no terminal."""

    def __init__(self) -> None:
        self._next = LINE_SECONDS
        self._begun = False

    def show(self, event: Event) -> None:
        """Print a step if the last line was long ago, and the last one of a stage that has any."""
        if event.seconds >= self._next or (self._begun and event.done == event.total):
            print(event, file=sys.stderr, flush=True)
            self._begun = True
            self._next = event.seconds + LINE_SECONDS
