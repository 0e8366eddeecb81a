import logging
import subprocess
import sys

import pytest

from slim_core.errors import InvalidValueError
from slim_core.logging import LEVELS, get_logger, logger, set_logger_level


@pytest.fixture(autouse=True)
def as_before():
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = handlers, level
    logger.setLevel(level)


def test_silent_until_asked(capsys):
    code = "from slim_core.logging import get_logger; get_logger('x').info('quiet')"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_messages_from_the_level_on_go_to_stderr_once(capsys):
    set_logger_level("info")
    set_logger_level("Warning")
    get_logger("ptq").info("hidden")
    get_logger("ptq").warning("shown %d", 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.endswith("WARNING slim.ptq: shown 7")


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level):
    set_logger_level(level.upper())
    assert logger.isEnabledFor(LEVELS[level])
    assert not logger.isEnabledFor(LEVELS[level] - 1)


def test_unknown_levels_are_refused():
    with pytest.raises(InvalidValueError, match=r"level must be one of.*not 'inf'"):
        set_logger_level("inf")
    with pytest.raises(InvalidValueError, match="not 10"):
        set_logger_level(10)


def test_the_root_logger_is_left_alone():
    before = list(logging.getLogger().handlers)
    set_logger_level("debug")
    assert logging.getLogger().handlers == before
