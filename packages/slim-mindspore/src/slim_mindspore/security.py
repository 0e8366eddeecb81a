"""The umask helper that scripts of the compatible flow use around their own writing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def SafeWriteUmask(umask: int = 0o027) -> Iterator[None]:
    """Create files without rights for others inside the block.

    The umask belongs to the process: other threads are affected too.  slim's own writers set the
    mode of each file instead.

    Parameters
    ----------
    umask : int
        With the default, files get 0640 and directories 0750.
    """
    previous = os.umask(umask)
    try:
        yield
    finally:
        os.umask(previous)
