"""Output directories that a killed run leaves ready to be taken up again.

A run fills ``.NAME.partial`` beside the output and saves a journal after each step: JSON values
that say how far it is.  When everything is there the directory takes the name of the output.  A
run that is interrupted leaves the directory; the next one goes on from its journal if it was
started with the same fingerprints (recipe, model, data, versions) and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slim_core.errors import OutputExistsError, ResumeError, SlimError
from slim_core.files import (
    MODE_DIR,
    PathLike,
    check_output_dir,
    remove_temporaries,
    swap_in,
    sync_dir,
    write_json,
)
from slim_core.logging import get_logger

_JOURNAL = ".journal.json"
_LOCK = ".lock"
_log = get_logger("resume")


@dataclass(eq=False)
class ResumableDir:
    """A directory under construction.

    Attributes
    ----------
    path : Path
        Where to write.
    state : dict or None
        What the last :meth:`save` of an interrupted run saved; None at the start.
    """

    path: Path
    fingerprints: Mapping[str, str]
    state: dict[str, Any] | None = None
    saved: bool = field(default=False, init=False)

    def save(self, state: Mapping[str, Any]) -> None:
        """Note how far the run is; on disk when this returns.

        Parameters
        ----------
        state : mapping
            JSON values.  Files that it refers to must be on disk.
        """
        journal = {"fingerprints": dict(self.fingerprints), "state": dict(state)}
        write_json(self.path / _JOURNAL, journal, indent=0)
        self.saved = True


def partial_path(output: PathLike) -> Path:
    """Return the directory that an interrupted run leaves for an output."""
    final = Path(output).resolve()
    return final.with_name(f".{final.name[:200]}.partial")


def is_resumable(output: PathLike) -> bool:
    """Return whether an interrupted run of an output has left a state to go on from."""
    return (partial_path(output) / _JOURNAL).exists()


@contextlib.contextmanager
def resumable_dir(
    output: PathLike,
    fingerprints: Mapping[str, str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    mode: int = MODE_DIR,
) -> Iterator[ResumableDir]:
    """Fill a directory that takes the name ``output`` once the block ends.

    If the block raises after a state was saved, the directory stays for ``resume``; after a
    :class:`~slim_core.errors.SlimError`, which would only come again, it is removed.  What stood
    under ``output`` stays until the end.

    Parameters
    ----------
    fingerprints : mapping of str to str
        By what they are of, as the messages name it.
    resume : bool
        Go on from an interrupted run if there is one.
    overwrite : bool
        Replace an output, and discard an interrupted run.

    Raises
    ------
    OutputExistsError
        The output exists, or an interrupted run is there and neither ``resume`` nor ``overwrite``
        was asked for, or another process is at it.
    ResumeError
        The interrupted run was another one; names what has changed.
    """
    final = check_output_dir(output, overwrite=overwrite).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    work = partial_path(final)
    with _locked(work) as lock:
        state = _state_of(work, fingerprints, resume=resume, overwrite=overwrite)
        directory = ResumableDir(work, fingerprints, state)
        if state is None:
            _clear(work)
        else:
            remove_temporaries(work)
        try:
            yield directory
        except BaseException as error:
            if isinstance(error, SlimError) or not (work / _JOURNAL).exists():
                shutil.rmtree(work, ignore_errors=True)
            raise
        (work / _JOURNAL).unlink(missing_ok=True)
        lock.unlink()
        work.chmod(mode)
        sync_dir(work)
        swap_in(work, final)
    sync_dir(final.parent)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """Hold the lock of a working directory, which the system frees when the process dies."""
    if work.is_symlink():
        raise OutputExistsError(f"{work} is a symbolic link, not an interrupted run")
    work.mkdir(exist_ok=True)
    lock = work / _LOCK
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if not _lock(descriptor, lock):
            raise OutputExistsError(
                f"another process is writing {work}", hint="wait for it, or choose another output"
            )
        yield lock
    finally:
        os.close(descriptor)


def _lock(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Whoever held it a moment ago may have given the directory its final name.
    return lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())


def _state_of(
    work: Path, fingerprints: Mapping[str, str], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Return the state to go on from, None to begin."""
    journal = work / _JOURNAL
    if not journal.exists() or (overwrite and not resume):
        return None
    if not resume:
        raise OutputExistsError(
            f"{work} holds an interrupted run",
            hint="resume=True (--resume) goes on with it, overwrite=True (--overwrite) discards it",
        )
    try:
        content = json.loads(journal.read_text(encoding="utf-8"))
        before, state = content["fingerprints"], content["state"]
        changed = sorted(
            key for key in {*before, *fingerprints} if before.get(key) != fingerprints.get(key)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{journal} is damaged: {error}", hint=_DISCARD) from error
    if changed:
        raise ResumeError(
            f"{work} holds an interrupted run with another {' and another '.join(changed)}",
            hint=_DISCARD,
        )
    _log.info("going on with %s", work)
    return dict(state)


_DISCARD = "overwrite=True (--overwrite) without resume discards it and begins again"


def _clear(work: Path) -> None:
    for entry in list(work.iterdir()):
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
