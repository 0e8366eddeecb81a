"""What is installed is what was built, and each package brings what it needs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("slim_core", "slim_ptq", "slim_compress", "slim_ra", "slim_lowrank")


@pytest.mark.parametrize("package", PACKAGES)
def test_is_installed_from_a_wheel_with_types_and_version(package: str) -> None:
    code = f"import {package}; print({package}.__file__, {package}.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    file, version = done.stdout.split()
    assert "site-packages" in file
    assert (Path(file).parent / "py.typed").exists()
    assert version == importlib.metadata.version(package.replace("_", "-"))


@pytest.mark.parametrize("package", ["slim_core", "slim_compress", "slim_lowrank"])
def test_import_needs_no_framework(package: str) -> None:
    code = f"import sys, {package}; print(sorted({{'torch', 'mindspore'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["slim-ptq", "slim-compress", "slim-ra", "slim-lowrank"])
def test_help_needs_no_torch(command: str) -> None:
    package = command.replace("-", "_")
    code = (
        f"import sys; sys.argv = ['{command}', '--help']\n"
        f"from {package}.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip().endswith("False")
