"""One layer of the cache: its stores, and attention over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from slim_core.errors import StructureError
from slim_ra.lse import attention_lse, cap, merge, with_sink
from slim_ra.policy import RazorPolicy
from slim_ra.store import HeadStore


class RazorLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Cache layer that keeps each group of KV heads in a store of its own.

    ``update`` only takes note of the new keys and values; :meth:`attend`, which the attention
    function calls next, computes attention and then stores them.

    Parameters
    ----------
    index : int
        Number of the layer.
    policy : RazorPolicy
    frozen : bool
        Cut once, after the first tokens.
    check : callable
        Called on every update; raises if the model is not set up for this cache.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(
        self, index: int, policy: RazorPolicy, *, frozen: bool, check: Callable[[int], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.policy = policy
        self.frozen = frozen
        self.check = check
        self.defer = False
        self.alibi = False
        self.slopes: Tensor | None = None  # ALiBi, one a query head
        self.pending: tuple[Tensor, Tensor] | None = None
        self.stores: list[HeadStore] = []
        self.seen = 0

    # ---- what transformers calls ---------------------------------------------------------------

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: storage is made with the first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take note of new keys and values ``[B, Hkv, T, D]`` and return them, marked."""
        self.check(self.index)
        self.pending = (key_states, value_states)
        key_states.slim_ra_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the attention mask; takes a length or the positions themselves."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + new, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to forget: dropped tokens cannot come back.

        Raises
        ------
        StructureError
            Always, but for an empty layer.
        """
        if self.seen:
            raise StructureError(
                "a RazorCache cannot be cropped",
                hint="assisted decoding and prefix rollback need a full cache",
            )

    def offload(self) -> None:
        """Refuse to move to another device.

        Raises
        ------
        StructureError
            Always.
        """
        raise StructureError("a RazorCache cannot be offloaded")

    prefetch = offload

    def reset(self) -> None:
        """Forget everything."""
        self.stores, self.seen, self.pending = [], 0, None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` continue row ``beam_idx[i]``."""
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    # ---- attention -----------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        *,
        scale: float,
        pads: Tensor | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens to everything held and to themselves; then store them.

        Parameters
        ----------
        query : Tensor
            ``[B, Hq, T, D]``, of the tokens that ``update`` was called with.
        scale : float
        pads : Tensor, optional
            int64 ``[B]`` padding at the left of each row; used with the first tokens only.
        softcap : float, optional
        sink : Tensor, optional
            ``[Hq]`` logits of a key without value.
        columns : Tensor, optional
            fp32 ``[B or 1, Hq, seen + T]`` ALiBi bias of every column, up to a constant.

        Returns
        -------
        Tensor
            ``[B, Hq, T, Dv]`` in the dtype of ``query``.
        """
        if self.pending is None:
            raise StructureError(f"layer {self.index} is asked to attend without an update")
        (key, value), self.pending = self.pending, None
        key, value = key.detach(), value.detach()
        if columns is not None:
            columns = columns - columns[..., -1:]
        if not self.stores:
            result = _first_attention(query, key, value, scale, pads, softcap, columns)
            self._start(key, value, pads)
        elif query.shape[2] == 1:
            self._push(key, value)
            result = self._over_stores(query, scale, softcap, columns)
        else:
            held = self._over_stores(query, scale, softcap, columns)
            bias = None if columns is None else columns[:, :, None, self.seen :]
            own = attention_lse(
                query, key, value, scale=scale, causal=True, bias=bias, softcap=softcap
            )
            result = merge([held, own])
            self._push(key, value)
        output, _ = with_sink(*result, sink)
        return output.to(query.dtype)

    def fold(self) -> None:
        """Cut all stores that are still exact."""
        for store in self.stores:
            store.fold()

    def _start(self, key: Tensor, value: Tensor, pads: Tensor | None) -> None:
        kv_heads = self.policy.geometry.kv_heads
        if key.shape[1] != kv_heads:
            raise StructureError(
                f"layer {self.index} has {key.shape[1]} KV heads, the policy was made for "
                f"{kv_heads}"
            )
        self.stores = [self._store(group) for group in self.policy.groups(self.index)]
        for store in self.stores:
            heads = store.heads.to(key.device)
            store.start(key.index_select(1, heads), value.index_select(1, heads), pads)
        self.seen = key.shape[2]
        self.is_initialized = True
        if not self.defer:
            self.fold()

    def _store(self, group: Any) -> HeadStore:
        policy = self.policy
        heads = torch.tensor(group.heads)
        fixed = group.window
        rule = policy.window_for if fixed is None else lambda _tokens: int(fixed)
        slopes = None
        if self.slopes is not None:
            slopes = self.slopes.view(policy.geometry.kv_heads, -1)[heads].float()
        return HeadStore(
            heads,
            None if group.full else rule,
            sink_size=policy.sink_size,
            compensate=policy.compensation == "mean",
            slopes=slopes,
            frozen=self.frozen,
            grow=policy.grow,
        )

    def _push(self, key: Tensor, value: Tensor) -> None:
        if not self.defer:
            self.fold()
        for store in self.stores:
            if len(self.stores) == 1:
                store.push(key, value)
            else:
                store.push(key.index_select(1, store.heads), value.index_select(1, store.heads))
        self.seen += key.shape[2]

    def _over_stores(
        self, query: Tensor, scale: float, softcap: float | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of every query to all that its KV head holds, and its log-sum-exp."""
        batch, heads, rows, dim = query.shape
        grouped = query.reshape(batch, self.policy.geometry.kv_heads, -1, rows, dim)
        lse = query.new_empty(*grouped.shape[:-1], dtype=torch.float32)
        size = self.stores[0].values.shape[-1]
        output = query.new_empty(*grouped.shape[:-1], size, dtype=torch.float32)
        for store in self.stores:
            own = grouped.index_select(1, store.heads)
            bias = self._columns_of(store, columns)
            out_part, lse_part = _over_store(store, own, scale, softcap, bias, columns)
            output[:, store.heads] = out_part.float().reshape((*own.shape[:-1], size))
            lse[:, store.heads] = lse_part.reshape(own.shape[:-1])
        return output.reshape(batch, heads, rows, size), lse.reshape(batch, heads, rows)

    def _columns_of(self, store: HeadStore, columns: Tensor | None) -> Tensor | None:
        """ALiBi bias of the query heads of a store, ``[B or 1, heads, columns]``."""
        if columns is None:
            return None
        by_kv = columns.reshape(len(columns), self.policy.geometry.kv_heads, -1, columns.shape[2])
        return by_kv.index_select(1, store.heads).flatten(1, 2)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.map_batch(change)


def _over_store(
    store: HeadStore,
    grouped: Tensor,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    query = grouped.flatten(1, 2)
    key, value = store.visible()
    valid = store.valid()
    mask = None
    if bias is not None:
        positions = store.positions()
        batch = max(len(bias), len(positions))
        index = positions[:, None].expand(batch, bias.shape[1], -1)
        mask = bias.expand(batch, -1, -1).gather(2, index)[:, :, None]
    if valid is not None:
        hidden = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, -torch.inf)
        mask = hidden[:, None, None] if mask is None else mask + hidden[:, None, None]
    result = attention_lse(query, key, value, scale=scale, bias=mask, softcap=softcap)
    reference = store.seen - 1 if columns is None else columns.shape[2] - 1
    extra = store.compensation(reference)
    if extra is None:
        return result
    logits = (grouped.float() * extra.key[:, :, :, None]).sum(-1) * scale
    logits = cap(logits, softcap) + extra.log_weight[..., None]
    mean = extra.value[:, :, :, None].expand(*logits.shape, -1).flatten(1, 2)
    return merge([result, (mean, logits.flatten(1, 2))])


def _first_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pads: Tensor | None,
    softcap: float | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Exact causal attention; a padded row is computed without its padding, so no mask is made."""
    if pads is None:
        bias = None if columns is None else columns[:, :, None]
        return attention_lse(
            query, key, value, scale=scale, causal=True, bias=bias, softcap=softcap
        )
    batch, heads, rows, _ = query.shape
    output = query.new_zeros(batch, heads, rows, value.shape[-1])
    lse = query.new_zeros(batch, heads, rows, dtype=torch.float32)
    for row, pad in enumerate(pads.tolist()):
        here = slice(row, row + 1)
        bias = None
        if columns is not None:
            bias = columns[here if len(columns) > 1 else slice(1), :, None, pad:]
        output[here, :, pad:], lse[here, :, pad:] = attention_lse(
            query[here, :, pad:], key[here, :, pad:], value[here, :, pad:],
            scale=scale, causal=True, bias=bias, softcap=softcap,
        )  # fmt: skip
    return output, lse
