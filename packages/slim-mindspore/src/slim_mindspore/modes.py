"""Execution modes of MindSpore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from slim_mindspore.framework import ms


@contextlib.contextmanager
def pynative() -> Iterator[None]:
    """Run the block in PyNative mode and go back to the mode of before."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)
