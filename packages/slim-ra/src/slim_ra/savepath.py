"""Where a ``win.pt`` may be written, checked before the search starts."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from slim_core.errors import FileSecurityError, InvalidTypeError, InvalidValueError
from slim_core.logging import get_logger

_ALLOWED = re.compile(r"[_A-Za-z0-9/.\-]+")
_MAX_NAME, _MAX_PATH = 255, 4096
_log = get_logger("ra")


def check_save_path(save_path: str, *, suffix: str = ".pt") -> Path:
    """Return the path if a file may be written, or replaced, there.

    Parameters
    ----------
    save_path : str
        Letters, digits and ``_ / . -`` only; at most 4096 characters, the last part at most 255;
        ends in ``suffix``; no symbolic link.  Its directory must exist, belong to the user or one
        of his groups, and be writable.
    suffix : str, default ".pt"
        Required ending.

    Raises
    ------
    InvalidTypeError
        ``save_path`` is no str.
    InvalidValueError
        A malformed path.
    FileSecurityError
        A path that must not be written: a link, a foreign directory, or an existing file that
        others own or can reach.
    FileNotFoundError
        The directory does not exist.
    """
    if not isinstance(save_path, str):
        raise InvalidTypeError(f"save_path must be str, not {type(save_path).__name__}")
    if not _ALLOWED.fullmatch(save_path):
        raise InvalidValueError(
            f"save_path must be made of letters, digits and '_/.-', not {save_path!r:.120}"
        )
    path = Path(save_path)
    if len(save_path) > _MAX_PATH or len(path.name) > _MAX_NAME:
        raise InvalidValueError(
            f"save_path must have at most {_MAX_PATH} characters and a file name of at most "
            f"{_MAX_NAME}, not {len(save_path)} and {len(path.name)}"
        )
    if not path.name.endswith(suffix) or path.name == suffix:
        raise InvalidValueError(f"save_path must name a {suffix} file, not {save_path!r}")
    if path.is_symlink():
        raise FileSecurityError(f"save_path {path} is a symbolic link")
    _check_directory(path.parent)
    if path.exists():
        _check_replaceable(path)
    return path


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(f"the directory of save_path does not exist: {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise FileSecurityError(f"the directory of save_path is not writable: {directory}")
    status = directory.stat()
    if status.st_uid == os.getuid() or status.st_gid in {os.getgid(), *os.getgroups()}:
        return
    if os.getuid() != 0:
        raise FileSecurityError(
            f"the directory of save_path belongs to another user (uid {status.st_uid}): {directory}"
        )
    _log.warning("the directory %s belongs to uid %d", directory, status.st_uid)


def _check_replaceable(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileSecurityError(f"save_path {path} exists and is not a regular file")
    if status.st_uid != os.getuid():
        raise FileSecurityError(f"save_path {path} exists and belongs to uid {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        raise FileSecurityError(
            f"save_path {path} exists with mode {stat.S_IMODE(status.st_mode):04o}: its group can "
            "write it or others can reach it",
            hint=f"chmod g-w,o= {path}",
        )
    _log.warning("%s exists and will be replaced", path)
