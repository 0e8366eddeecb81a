"""Attention that also returns the log-sum-exp of its logits, in memory linear in the length.

A row of attention probabilities is ``exp(logit - lse)``, so with the log-sum-exp any few entries of
the attention matrix can be had without the rest of it, and attentions over disjoint sets of keys
can be merged exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim_ra.kernels import combine, fused_attention, has_kernel

TILE_BYTES = 1 << 24  # fp32 logits held at once by the tiled path


def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its logits.

    Parameters
    ----------
    query : Tensor
        Shape ``[B, Hq, Tq, D]``.
    key, value : Tensor
        Shapes ``[B, Hkv, Tk, D]`` and ``[B, Hkv, Tk, Dv]``; ``Hq`` is a multiple of ``Hkv``.
    scale : float
        Factor of the dot products.
    causal : bool
        Query ``i`` sees keys up to ``i + Tk - Tq``.
    bias : Tensor, optional
        Added to the logits; fp32, broadcastable to ``[B, Hq, Tq, Tk]``, ``-inf`` to mask.
    window : int, optional
        With ``causal``: a query sees the last ``window`` of its keys only.
    softcap : float, optional
        ``softcap * tanh(logit / softcap)`` in place of the logit, before the bias.

    Returns
    -------
    output : Tensor
        ``[B, Hq, Tq, Dv]`` in the dtype of ``value``; zero for a query that sees no key.
    lse : Tensor
        ``[B, Hq, Tq]`` fp32; ``-inf`` for a query that sees no key.
    """
    plain = window is None and softcap is None and query.dtype == value.dtype
    causal = causal and query.shape[2] > 1
    if plain and key.shape[-1] == value.shape[-1] and has_kernel(query, key, causal, bias):
        return fused_attention(query, key, value, scale, causal, bias)
    return _by_tiles(query, key, value, scale, causal, bias, window, softcap)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attentions over disjoint sets of keys into attention over their union.

    Parameters
    ----------
    parts : sequence of (output, lse)
        As :func:`attention_lse` returns them.

    Returns
    -------
    output, lse : Tensor
        ``output`` is fp32.
    """
    outputs, lses = zip(*parts, strict=True)
    return combine(torch.stack(outputs), torch.stack(lses), 0)


def with_sink(output: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add a key of logit ``sink`` (one a query head, ``[Hq]``) and value zero."""
    if sink is None:
        return output, lse
    total = torch.logaddexp(lse, sink.float().view(1, -1, 1).expand_as(lse))
    return (output * (lse - total).exp()[..., None]).to(output.dtype), total


def _by_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    tile = max(1, TILE_BYTES // (4 * batch * heads * keys))
    outputs, lses = [], []
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        offset = keys - rows
        last = stop + offset if causal else keys
        first = max(0, start + offset - window + 1) if causal and window else 0
        logits = dots(query[:, :, start:stop], key[:, :, first:last], scale, softcap)
        if bias is not None:
            bias_rows = bias[:, :, start:stop] if bias.shape[2] > 1 else bias
            logits = logits + bias_rows[..., first:last]
        if causal:
            here = torch.arange(start, stop, device=query.device)[:, None] + offset
            there = torch.arange(first, last, device=query.device)
            hidden = there > here
            if window:
                hidden |= there <= here - window
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(-1)
        safe = torch.where(lse.isfinite(), lse, 0.0)
        outputs.append(_weigh((logits - safe[..., None]).exp(), value[:, :, first:last]))
        lses.append(lse)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def dots(query: Tensor, key: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Return the logits ``[B, Hq, Tq, Tk]``, fp32, of grouped queries and shared keys."""
    batch, heads, rows, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim).float()
    logits = (packed @ key.float().mT).mul_(scale).reshape(batch, heads, rows, key.shape[2])
    return cap(logits, softcap)


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Apply the soft cap of Gemma-like models."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    batch, heads, rows, keys = weights.shape
    packed = weights.reshape(batch, value.shape[1], -1, keys)
    output = packed @ value.float()
    return output.reshape(batch, heads, rows, value.shape[-1]).to(value.dtype)
