"""Logging of the slim packages: one logger tree, set up only by a program that asks for output.

Libraries get a child of the ``slim`` logger with :func:`get_logger`.  Importing installs no
handler, so Python's defaults hold: warnings and errors go to standard error, the rest is dropped.
Scripts and command lines call :func:`set_logger_level`.
"""

from __future__ import annotations

import logging
import sys

from slim_core.files import PathLike, as_path
from slim_core.validate import check_choice

ROOT_NAME = "slim"
LEVELS = {
    "notset": 1,  # everything: 0 would fall back to the level of the root logger
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "critical": logging.CRITICAL,
}

logger = logging.getLogger(ROOT_NAME)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a part of the toolkit, for example ``get_logger("ptq")``."""
    return logger.getChild(name)


def set_logger_level(level: str = "info") -> None:
    """Show the messages of all slim packages from ``level`` on, on standard error.

    Parameters
    ----------
    level : str
        One of notset, debug, info, warn, warning, error, fatal, critical (any case).

    Raises
    ------
    InvalidValueError
        ``level`` is none of these.
    """
    number = LEVELS[_check_level(level)]
    shown = next((item for item in logger.handlers if isinstance(item, _StderrHandler)), None)
    if shown is None:
        shown = _StderrHandler()
        shown.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        )
        logger.addHandler(shown)
    shown.setLevel(number)
    logger.setLevel(min(number, *(item.level for item in logger.handlers)))


def add_log_file(path: PathLike, level: str = "info") -> None:
    """Append the messages of all slim packages from ``level`` on to a file as well.

    Raises
    ------
    InvalidValueError
        ``level`` is none of those of :func:`set_logger_level`.
    OSError
        The file cannot be written.
    """
    number = LEVELS[_check_level(level)]
    handler = logging.FileHandler(as_path("path", path), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(number)
    logger.addHandler(handler)
    logger.setLevel(min(number, logger.getEffectiveLevel()))


def _check_level(level: str) -> str:
    return check_choice("level", level.lower() if isinstance(level, str) else level, LEVELS)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to whatever ``sys.stderr`` is now, so that redirection works."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr
