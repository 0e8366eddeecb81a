"""Emulation of an int8 key-value cache: what goes into the cache is rounded to its codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slim_ptq.emulate import through_int8

CHILD = "kv_cache_"


class CacheQuantizer(nn.Module):
    """Rounds the cached channels of a linear layer's output to int8 codes and back.

    It is a child of the linear layer (:func:`attach`), so that prefill and decoding agree and every
    cache class works.

    Parameters
    ----------
    part : {"k_proj", "v_proj"}
    scale, offset : torch.Tensor, float32, shape (cached channels,)
        ``q = clamp(round(x / s + z))`` and ``x = (q - z) * s``.
    channels : torch.Tensor or None
        int64: the output channels that are cached; None stands for all of them.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    channels: torch.Tensor | None

    def __init__(
        self,
        part: str,
        scale: torch.Tensor,
        offset: torch.Tensor,
        channels: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("channels", channels, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``, shape (..., out), with its cached channels rounded."""
        if self.channels is None:
            return through_int8(x, self.scale, self.offset)
        channels = self.channels.to(x.device)
        rounded = through_int8(x.index_select(-1, channels), self.scale, self.offset)
        return x.index_copy(-1, channels, rounded)

    def tensor_names(self, linear: str) -> tuple[str, str]:
        """Return the names of scale and offset in the checkpoint.

        Parameters
        ----------
        linear : str
            Name of the layer in the checkpoint.
        """
        prefix = linear if self.channels is None else f"{linear}.{self.part}"
        return f"{prefix}.kv_cache_scale", f"{prefix}.kv_cache_offset"


def attach(linear: nn.Module, quantizer: CacheQuantizer) -> None:
    """Let a quantizer work on the output of a linear layer, float or quantized, in place."""
    if not any(quantizers(linear)):
        linear.register_forward_hook(_quantize_output)
    linear.add_module(CHILD + quantizer.part, quantizer)


def quantizers(linear: nn.Module) -> Iterator[CacheQuantizer]:
    """Yield the cache quantizers of a linear layer."""
    for child in linear.children():
        if isinstance(child, CacheQuantizer):
            yield child


def _quantize_output(linear: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    for quantizer in quantizers(linear):
        output = quantizer(output)
    return output
