"""Torch's fused attention kernels that return the log-sum-exp, kept busy on every core."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROW_BLOCK = 32  # query rows that the CPU kernel handles at once, per KV head
_MANY = 4  # units of work a thread beyond which an uneven share matters little
_SMALLEST_SPLIT = 1024  # keys below which merging costs more than a second thread brings


def has_kernel(query: Tensor, key: Tensor, causal: bool, bias: Tensor | None) -> bool:
    """Whether :func:`fused_attention` takes these arguments."""
    if causal and query.shape[2] != key.shape[2]:
        return False
    if query.device.type == "cpu":
        grouped = bias is not None and bias.shape[1] not in (1, key.shape[1])
        return not (causal and bias is not None) and not grouped
    halves = (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and bias is None and query.dtype in halves


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention by the flash kernel; grouped queries share their keys without a repeated copy.

    Arguments and results are those of :func:`slim_ra.lse.attention_lse`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    packed = query.reshape(batch, kv_heads, group, rows, dim)
    if causal:
        done = [_kernel(packed[:, :, j], key, value, scale, True, None) for j in range(group)]
        output = torch.stack([part[0] for part in done], 2)
        lse = torch.stack([part[1] for part in done], 2)
    else:
        # Rows of all queries of a group stand one below another.
        if bias is not None:
            bias = _repeat_rows(bias, batch, group, rows, key.shape[2])
        flat = packed.reshape(batch, kv_heads, group * rows, dim)
        output, lse = _unmasked(flat, key, value, scale, bias)
    return output.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows)


def combine(output: Tensor, lse: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Merge attentions over disjoint sets of keys that lie along dimension ``dim``.

    Parameters
    ----------
    output : Tensor
        Shape ``[..., rows, Dv]``.
    lse : Tensor
        The same shape without ``Dv``; ``-inf`` where a query saw no key.
    dim : int
        Not negative.

    Returns
    -------
    output, lse : Tensor
        fp32, without dimension ``dim``.
    """
    total = lse.logsumexp(dim, keepdim=True)
    weight = (lse - torch.where(total.isfinite(), total, 0.0)).exp()
    return (output.float() * weight[..., None]).sum(dim), total.squeeze(dim)


def splits_for(units: int, keys: int, threads: int) -> int:
    """Into how many parts to cut the keys so that ``threads`` threads get equal shares.

    Parameters
    ----------
    units : int
        Pieces of work that the CPU kernel hands out whole to a thread.
    keys, threads : int
    """
    if units >= _MANY * threads:
        return 1
    even = threads // math.gcd(units, threads)
    return max(1, min(even, keys // _SMALLEST_SPLIT))


def _unmasked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention to all keys; few heads over many keys are cut along the keys on the CPU."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    parts = 1
    if query.device.type == "cpu":
        units = batch * heads * math.ceil(rows / _ROW_BLOCK)
        parts = splits_for(units, keys, torch.get_num_threads())
    if parts == 1:
        return _kernel(query, key, value, scale, False, bias)
    outputs, lses = [], []
    for row in range(batch):
        row_bias = None if bias is None else bias[row]
        output, lse = _split(query[row], key[row], value[row], scale, row_bias, parts)
        outputs.append(output)
        lses.append(lse)
    return torch.stack(outputs).to(value.dtype), torch.stack(lses)


def _split(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, parts: int
) -> tuple[Tensor, Tensor]:
    """Attention of one row of the batch, ``[H, rows, D]`` to ``[H, keys, D]``, in parts of keys.

    The kernel sees KV heads as its batch and the parts as its heads, all of them views.
    """
    size = key.shape[1] // parts
    whole = parts * size
    shape = (parts, size)
    part_bias = None
    if bias is not None:
        part_bias = torch.unflatten(bias[..., :whole], -1, shape).transpose(1, 2)
    output, lse = _kernel(
        query[:, None].expand(-1, parts, -1, -1),
        torch.unflatten(key[:, :whole], 1, shape),
        torch.unflatten(value[:, :whole], 1, shape),
        scale,
        False,
        part_bias,
    )
    if whole < key.shape[1]:
        rest_bias = None if bias is None else bias[:, None, :, whole:]
        rest = _kernel(
            query[:, None], key[:, None, whole:], value[:, None, whole:], scale, False, rest_bias
        )
        output, lse = torch.cat([output, rest[0]], 1), torch.cat([lse, rest[1]], 1)
    return combine(output, lse, 1)


def _repeat_rows(bias: Tensor, batch: int, group: int, rows: int, keys: int) -> Tensor:
    bias = bias.expand(batch, bias.shape[1], rows, keys)
    return bias if group == 1 else bias.repeat(1, 1, group, 1)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = cpu_flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        if bias is not None:  # the kernel reports 0 for a row that sees nothing
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        return output, lse
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    result = flash(query, key, value, 0.0, causal, False, scale=scale)
    return result[0], result[1]
