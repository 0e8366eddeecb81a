"""Run the installed commands, from the built wheels, on the models of examples/."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def examples() -> Path:
    return ROOT / "examples"


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command of this environment and return what it printed."""

    def call(*command: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / str(command[0])
        done = subprocess.run(
            [str(program), *(str(part) for part in command[1:])],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",  # nothing may be found by accident in the repository
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == expect, done.stderr
        return done

    return call
