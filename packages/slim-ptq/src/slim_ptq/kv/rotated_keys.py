"""Keys after the rotary embedding: how large their channels are, and rounding them there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from slim_core.errors import StructureError
from slim_ptq.attention.install import reachable_attention
from slim_ptq.attention.states import StatesQuantizer
from slim_ptq.emulate import through_int8


class KeyWatcher(StatesQuantizer):
    """Hands on the keys as rows of channels, shape (..., heads * channels), and changes nothing."""

    def __init__(self, see: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def quant(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Return the states."""
        if qkv == "k":
            self._see(states.transpose(1, 2).flatten(2))
        return states


class RotatedKeys(StatesQuantizer):
    """Rounds keys to the codes of an int8 cache and back.

    Parameters
    ----------
    scale, offset : torch.Tensor, float32, shape (heads * channels,) or (1,)
        ``q = clamp(round(x / s + z))`` and ``x = (q - z) * s``.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def quant(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Return keys rounded, others as they are."""
        if qkv != "k":
            return states
        _, heads, _, channels = states.shape
        scale, offset = (
            part.expand(heads * channels).reshape(heads, 1, channels)
            for part in (self.scale, self.offset)
        )
        return through_int8(states, scale, offset)


def only_attention(block: nn.Module, prefix: str) -> str:
    """Return the name of the attention module of a block.

    Raises
    ------
    StructureError
        There are several, or its keys cannot be reached.
    """
    found = reachable_attention(block, [""])
    if len(found) != 1:
        raise StructureError(
            f"{prefix} has {len(found)} attention modules, and kv_cache.after_rotary knows blocks "
            "with one"
        )
    return found[0]
