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


def prepare_cpu() -> None:
    """Set this process up for programs on the CPU; call it before any network is built.

    Operators of PyNative mode run in the calling thread.  Otherwise each look at a shape hands over
    to another thread and waits, which on a busy CPU costs far more than the operators of a small
    network do.
    """
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
