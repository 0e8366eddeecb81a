"""Files: what is safe to read, and writing that is complete or did not happen.

Modes follow the deployment flows of Ascend: directories 0750, weights 0400, everything else 0600.
No function changes the umask of the process; modes are set on the open file before it gets its
final name.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from slim_core.errors import CheckpointError, FileSecurityError, InvalidTypeError, OutputExistsError

MODE_DIR = 0o750
MODE_WEIGHTS = 0o400
MODE_PRIVATE = 0o600
MODE_SHARED = 0o640

_NAME_KEPT = 60  # characters of a name in that of its temporary: at most 240 bytes in UTF-8

PathLike = str | os.PathLike[str]


def as_path(name: str, value: Any) -> Path:
    """Return ``value`` as a Path; a non-path or an empty one is an error naming ``name``."""
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidTypeError(f"{name} must be str or os.PathLike, not {type(value).__name__}")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise FileSecurityError(f"{name} must be a non-empty path, not {text!r}")
    return Path(text)


def check_input_file(path: PathLike, *, max_bytes: int | None = None) -> Path:
    """Return the path if it is a regular file that nobody else can have tampered with.

    A symbolic link is followed (model caches are made of them) and the file it leads to is
    checked.  Others than the owner must not be able to write it; a group that has the owner as its
    only member, as every user has on Ubuntu, is not others.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    FileSecurityError
        Not a regular file, a dangling link, writable by others, or over ``max_bytes``.
    """
    file = as_path("path", path)
    if not file.exists():
        if file.is_symlink():
            raise FileSecurityError(f"{file} is a symbolic link that leads nowhere")
        raise FileNotFoundError(f"no such file: {file}")
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileSecurityError(f"{file} is not a regular file")
    if _others_can_write(status):
        raise FileSecurityError(
            f"{file} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"chmod go-w {file}",
        )
    if max_bytes is not None and status.st_size > max_bytes:
        raise FileSecurityError(f"{file} has {status.st_size} bytes, more than {max_bytes}")
    return file


def _others_can_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status)


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the group of a file was made for its owner alone (same number, no other member)."""
    if status.st_uid == 0 or status.st_uid != status.st_gid:
        return False
    try:
        members = grp.getgrgid(status.st_gid).gr_mem
        return set(members) <= {pwd.getpwuid(status.st_uid).pw_name}
    except KeyError:  # a user or group without a name, as in containers, has no members
        return True


def read_into(path: Path, start: int, target: memoryview) -> None:
    """Fill a buffer of bytes with a file's bytes from ``start`` on.

    Raises
    ------
    CheckpointError
        The file ends before the buffer is full.
    """
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while target:
            count = stream.readinto(target)
            if not count:
                raise CheckpointError(f"{path} ends in the middle of its data")
            target = target[count:]


def will_read(path: Path, start: int, nbytes: int) -> None:
    """Let the system read a part of a file ahead, into its own memory; returns at once."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def make_dir(path: PathLike, mode: int = MODE_DIR) -> Path:
    """Create the directory, with ``mode`` if it is new, and its parents; return its path."""
    directory = as_path("path", path)
    if not directory.is_dir():
        directory.mkdir(parents=True)
        directory.chmod(mode)
    return directory


@contextlib.contextmanager
def atomic_write(path: PathLike, mode: int = MODE_PRIVATE) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the name ``path``, with ``mode``, once it is complete.

    The bytes go to a temporary file beside it, which is flushed to disk and renamed when the block
    ends, and removed when the block raises: a file that was there before stays as it was.

    Raises
    ------
    OSError
        The file cannot be written; names ``path``.
    """
    final = as_path("path", path)
    temporary = _beside(final, "tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        temporary.replace(final)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not _names_another(error, temporary):
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    sync_dir(final.parent)


def write_bytes(path: PathLike, data: bytes, mode: int = MODE_PRIVATE) -> None:
    """Write a whole file atomically."""
    with atomic_write(path, mode) as stream:
        stream.write(data)


def write_json(path: PathLike, value: Any, mode: int = MODE_PRIVATE, indent: int = 2) -> None:
    """Write a JSON file atomically, keys in their given order."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n", mode)


@contextlib.contextmanager
def staged_dir(path: PathLike, *, overwrite: bool = False, mode: int = MODE_DIR) -> Iterator[Path]:
    """Fill a temporary directory that takes the name ``path`` once the block ends.

    If the block raises, the temporary directory is removed, and what stood under ``path`` stays.
    A temporary directory that a killed run left is removed by the next one for the same ``path``.

    Raises
    ------
    OutputExistsError
        ``path`` is a file, or a directory with something in it and ``overwrite`` is False.
    """
    # Resolved: a path like "." has no name to put a temporary directory beside.
    final = check_output_dir(path, overwrite=overwrite).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    with _staging_beside(final) as temporary:
        try:
            yield temporary
            temporary.chmod(mode)
            sync_dir(temporary)
            swap_in(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_dir(final.parent)


@contextlib.contextmanager
def _staging_beside(final: Path) -> Iterator[Path]:
    """Make a directory and lock it, until the block ends or the system ends the process."""
    while True:
        temporary = _beside(final, "tmp")
        temporary.mkdir()
        with _locked_dir(temporary, wait=True):
            if temporary.exists():  # else another run took it for abandoned, before the lock
                yield temporary
                return


@contextlib.contextmanager
def _locked_dir(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a directory; False if another has it or the file system knows no locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _remove_abandoned(final: Path) -> None:
    """Remove the staging directories of ``final`` whose process is gone."""
    pattern = re.compile(re.escape(f".{final.name[:_NAME_KEPT]}.") + r"[0-9a-f]{8}\.tmp")
    for entry in list(final.parent.iterdir()):
        if not pattern.fullmatch(entry.name):
            continue
        with _locked_dir(entry, wait=False) as locked:
            if locked:
                shutil.rmtree(entry, ignore_errors=True)


def check_output_dir(path: PathLike, *, overwrite: bool = False) -> Path:
    """Require that a directory can be made at ``path``, before any work is done for it.

    Raises
    ------
    OutputExistsError
        As for :func:`staged_dir`.
    FileSecurityError
        The nearest directory above that exists cannot be written.
    """
    final = as_path("path", path)
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputExistsError(f"{final} exists and is not a directory")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"the output directory {final} is not empty",
            hint="choose another directory, or pass overwrite=True (--overwrite)",
        )
    parent = final.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise FileSecurityError(f"the output {final} cannot be created: {parent} is not writable")
    return final


def check_apart(name: str, source: PathLike, output: PathLike) -> None:
    """Require that replacing the directory ``output`` would not remove ``source`` with it.

    Parameters
    ----------
    name : str
        Name of the parameter that holds ``source``, for the message.

    Raises
    ------
    OutputExistsError
        ``output`` is ``source`` or a directory above it.
    """
    inside, outside = as_path(name, source).resolve(), as_path("output", output).resolve()
    if inside.is_relative_to(outside):
        raise OutputExistsError(
            f"the output {outside} holds {name} {inside}, which would be lost",
            hint="choose another directory",
        )


def sync_dir(path: PathLike) -> None:
    """Flush the entries of a directory to disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove what a process that was killed in :func:`atomic_write` left in a directory."""
    for entry in list(directory.iterdir()):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", entry.name) and not entry.is_dir():
            entry.unlink()


def _names_another(error: OSError, file: Path) -> bool:
    return error.filename is not None and str(error.filename) != str(file)


def _beside(final: Path, suffix: str) -> Path:
    """Return a hidden name in the same directory; a file name can have 255 bytes."""
    return final.with_name(f".{final.name[:_NAME_KEPT]}.{secrets.token_hex(4)}.{suffix}")


def swap_in(temporary: Path, final: Path) -> None:
    """Rename a directory to ``final``; what stood there goes, or is put back if that fails."""
    if not final.exists():
        temporary.rename(final)
        return
    if _exchange(temporary, final):
        shutil.rmtree(temporary)
        return
    previous = _beside(final, "old")
    final.rename(previous)
    try:
        temporary.rename(final)
    except BaseException:
        previous.rename(final)
        raise
    shutil.rmtree(previous)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, so that no kill finds one missing; False if that cannot be."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, glibc 2.28
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)
