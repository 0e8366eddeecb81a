"""What an attention function hands its queries, keys and values to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class StatesQuantizer(nn.Module, ABC):
    """Sees queries, keys and values on their way into attention, and may change them.

    Attributes
    ----------
    hooked : bool
        Whether the attention function calls it (:func:`slim_ptq.attention.hooking.hook`), not the
        attention module.
    """

    hooked = False

    @abstractmethod
    def quant(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Return the states that attention is computed from.

        Parameters
        ----------
        states : torch.Tensor, shape (batch, heads, tokens, channels)
            After the rotary embedding and the cache, before heads are repeated.
        qkv : {"q", "k", "v"}
        """
