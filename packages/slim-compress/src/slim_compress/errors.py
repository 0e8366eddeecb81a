"""Errors of the compressor, on top of those of :mod:`slim_core.errors`."""

from __future__ import annotations

from slim_core.errors import DeviceError, FormatError, SlimError


class CorruptStreamError(FormatError):
    """A compressed weight is damaged, cut short or was never one.

    Parameters
    ----------
    tensor : str
        Name of the weight; empty if it has none.
    tile : int or None
        Number of the tile at fault, ``None`` for the stream as a whole.
    reason : str
        What is wrong.
    """

    def __init__(self, tensor: str, tile: int | None, reason: str) -> None:
        self.tensor = tensor
        self.tile = tile
        self.reason = reason
        where = tensor or "compressed weight"
        if tile is not None:
            where += f", tile {tile}"
        super().__init__(f"{where}: {reason}")


class VerificationError(FormatError):
    """A decoded weight differs from its original."""


class UntrustedDataError(SlimError):
    """The user did not confirm that the data comes from a trusted source."""


class ExecutorError(DeviceError):
    """The executor of the device codec failed, timed out or wrote something unusable."""
