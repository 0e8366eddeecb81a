"""The keys and values that one group of heads holds in one layer.

Until it is first cut a store is *exact*: slot ``i`` holds token ``i``.  Then it is *folded*:

    slots  [ ring of R latest tokens | first S tokens (sinks) | tokens after a frozen cut ]

where token ``p`` is in ring slot ``p mod R``.  A token that leaves the window of its row becomes a
sink if it is one of the first ``S`` real tokens, and else joins the running mean that is the
compensation token.  Tokens are numbered by column, padding at the left included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE = 256  # slots that a growing store adds at most: attention reads far more than a copy does
_CHUNK = 4096  # tokens whose fp32 copies are held at once while they join the mean

WindowRule = Callable[[int], int]


@dataclass
class Compensation:
    """One token that stands for all dropped ones.

    Attributes
    ----------
    key, value : Tensor
        fp32 ``[B, H, G, D]``, the (weighted) means: one for all query heads of a KV head
        (``G = 1``), or with ALiBi one for each, because they weigh what was dropped differently.
    log_weight : Tensor
        fp32 ``[B, H, G]``, added to its logit; ``-inf`` where nothing was dropped.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor


class HeadStore:
    """Ragged storage of one group.

    Parameters
    ----------
    heads : Tensor
        int64 KV heads of the group.
    rule : callable or None
        Tokens to window; None keeps everything.
    sink_size : int
    compensate : bool
        Keep the means of what is dropped.
    slopes : Tensor or None
        fp32 ``[H, G]`` ALiBi slopes of the query heads of each KV head: the means then weigh
        token ``n`` by ``exp(slope * n)``.
    frozen : bool
        Cut once; tokens after the cut are kept.
    grow : bool
        Let the window follow the rule after the cut.
    """

    def __init__(
        self,
        heads: Tensor,
        rule: WindowRule | None,
        *,
        sink_size: int,
        compensate: bool,
        slopes: Tensor | None = None,
        frozen: bool = False,
        grow: bool = False,
    ) -> None:
        self.heads = heads
        self.rule = rule
        self.sink_size = sink_size
        self.compensate = compensate
        self.slopes = slopes
        self.frozen = frozen
        self.grow = grow
        self.seen = 0
        self.pads: Tensor | None = None
        self.keys = self.values = torch.empty(0)
        self.windows: Tensor | None = None  # [B] once folded
        self.ring = 0
        self.cut = 0  # tokens seen at a frozen cut
        self.dropped = torch.empty(0, dtype=torch.int64)
        self.mean_key = self.mean_value = torch.empty(0)

    # ---- writing -------------------------------------------------------------------------------

    def start(self, key: Tensor, value: Tensor, pads: Tensor | None) -> None:
        """Take the first tokens, ``[B, H, T, D]``, exactly."""
        self.pads = pads
        self.keys, self.values = key.contiguous(), value.contiguous()
        self.seen = key.shape[2]
        self.heads = self.heads.to(key.device)
        if self.slopes is not None:
            self.slopes = self.slopes.to(key.device)

    def push(self, key: Tensor, value: Tensor) -> None:
        """Take later tokens, dropping what leaves the window of a folded store."""
        count = key.shape[2]
        if self.windows is None or self.frozen:
            self._write(self.size, key, value)
            self.seen += count
        elif count == 1 and not self.grow:
            self._push_one(key, value)
        else:
            held_key, held_value, first = self._in_order()
            self._cut(
                torch.cat([held_key, key], 2), torch.cat([held_value, value], 2), first, count
            )

    def fold(self) -> None:
        """Cut an exact store down to its window; nothing happens to one that keeps everything."""
        if self.rule is None or self.windows is not None:
            return
        key, value = self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        batch, heads = key.shape[:2]
        self.windows = self._rule_windows(self.seen, batch, key.device)
        self.ring = int(self.windows.max())
        self.dropped = torch.zeros(batch, dtype=torch.int64, device=key.device)
        if self.compensate:
            shape = (batch, heads, 1 if self.slopes is None else self.slopes.shape[1])
            self.mean_key = key.new_zeros(*shape, key.shape[3], dtype=torch.float32)
            self.mean_value = key.new_zeros(*shape, value.shape[3], dtype=torch.float32)
        self.cut = self.seen
        seen, self.seen = self.seen, 0
        self._cut(key, value, 0, seen)

    # ---- reading -------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Slots in use."""
        if self.windows is None:
            return self.seen
        cut = self.cut if self.frozen else self.seen
        room = self.ring + self.sink_size
        return (min(cut, room) if self._uniform else room) + (self.seen - cut)

    def visible(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, size, D]`` in slot order."""
        return self.keys[:, :, : self.size], self.values[:, :, : self.size]

    def positions(self) -> Tensor:
        """Column of each slot, int64 ``[1 or B, size]``; only meaningful where :meth:`valid`."""
        device = self.keys.device
        slots = torch.arange(self.size, device=device)
        if self.windows is None:
            return slots[None]
        cut = self.cut if self.frozen else self.seen
        held = self.size - (self.seen - cut)
        ring = cut - 1 - (cut - 1 - slots) % self.ring
        pads = slots.new_zeros(1) if self.pads is None else self.pads
        sinks = pads[:, None] + slots - self.ring
        inside = torch.where(slots < self.ring, ring, sinks)
        return torch.where(slots < held, inside, cut + slots - held).clamp(min=0)

    def valid(self) -> Tensor | None:
        """Bool ``[B, size]``, True where a slot holds a token of its row; None if all do."""
        if self._uniform:
            return None
        positions = self.positions()
        pads = self.pads if self.pads is not None else positions.new_zeros(1)
        if self.windows is None:
            return positions >= pads[:, None]
        cut = self.cut if self.frozen else self.seen
        start = (cut - self.windows).clamp(min=0)[:, None]
        slots = torch.arange(self.size, device=positions.device)
        ring = (slots < self.ring) & (slots < cut) & (positions >= start)
        sinks = (slots >= self.ring) & (slots < self.ring + self.sink_size) & (positions < start)
        late = slots >= self.size - (self.seen - cut)
        return (ring | sinks | late) & (positions >= pads[:, None])

    def compensation(self, reference: int) -> Compensation | None:
        """Return the compensation token, or None while there is none.

        Parameters
        ----------
        reference : int
            Column where the ALiBi bias is zero.
        """
        if self.windows is None or not self.compensate or not bool((self.dropped > 0).any()):
            return None
        weight = self._mass(self.dropped).log()
        if self.slopes is not None:
            cut = self.cut if self.frozen else self.seen
            newest = cut - self.windows - 1  # the latest dropped token
            weight = weight - self.slopes * (reference - newest)[:, None, None]
        log_weight = weight.expand(self.mean_key.shape[:3]).float()
        return Compensation(self.mean_key, self.mean_value, log_weight)

    def nbytes(self) -> int:
        """Bytes of the tokens held, compensation included, spare capacity left out."""
        if not self.keys.numel():
            return 0
        spare = self.keys.shape[2] - self.size
        slot = self.keys.shape[:2].numel() * self.keys.element_size()
        return self.allocated() - slot * spare * (self.keys.shape[3] + self.values.shape[3])

    def allocated(self) -> int:
        """Bytes of all storage of keys, values and means."""
        tensors = (self.keys, self.values, self.mean_key, self.mean_value)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply an indexing of the batch dimension to everything held."""
        for name in ("keys", "values", "mean_key", "mean_value", "dropped", "windows", "pads"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
                setattr(self, name, change(tensor))

    # ---- inside --------------------------------------------------------------------------------

    @property
    def _uniform(self) -> bool:
        """All rows hold the same columns, in a prefix of the slots."""
        return self.pads is None and not self.grow

    def _rule_windows(self, seen: int, batch: int, device: torch.device) -> Tensor:
        if self.rule is None:
            raise RuntimeError("a store that keeps everything has no window")
        tokens = [seen] * batch if self.pads is None else (seen - self.pads).tolist()
        return torch.tensor([self.rule(count) for count in tokens], device=device)

    def _mass(self, count: Tensor) -> Tensor:
        """Sum of the weights of ``count`` tokens, the latest weighing 1: ``[B, H or 1, G]``."""
        count = count[:, None, None]
        if self.slopes is None:
            return count.float()
        slopes = self.slopes.double()
        mass = torch.expm1(-slopes * count) / torch.expm1(-slopes)
        return mass.float()

    def _write(self, slot: int, key: Tensor, value: Tensor) -> None:
        """Put tokens into slots from ``slot`` on, growing the storage when it is full."""
        stop = slot + key.shape[2]
        if stop > self.keys.shape[2]:
            capacity = stop + min(_PAGE, max(16, stop // 8))
            if self.windows is not None and not self.frozen:
                capacity = min(capacity, max(stop, self.ring + self.sink_size))
            self.keys = _grown(self.keys, self.size, capacity)
            self.values = _grown(self.values, self.size, capacity)
        self.keys[:, :, slot:stop] = key
        self.values[:, :, slot:stop] = value

    def _push_one(self, key: Tensor, value: Tensor) -> None:
        """Replace the oldest token of the window in place."""
        slot = self.seen % self.ring
        if self._uniform:
            leaving = self.seen - self.ring
            if leaving >= self.sink_size:
                self._join_one(self.keys[:, :, slot, None], self.values[:, :, slot, None], None)
            elif leaving >= 0:
                old_key, old_value = self.keys[:, :, slot, None], self.values[:, :, slot, None]
                self._write(self.ring + leaving, old_key.clone(), old_value.clone())
        else:
            self._leave_one()
        self._write(slot, key, value)
        self.seen += 1

    def _leave_one(self) -> None:
        """Let the token that leaves the window go, which differs from row to row."""
        if self.windows is None or self.pads is None:
            raise RuntimeError("rows differ only in a folded store with padding")
        column = self.seen - self.windows
        rank = column - self.pads
        rows = torch.arange(len(column), device=column.device)
        slots = column % self.ring
        old_key, old_value = self.keys[rows, :, slots], self.values[rows, :, slots]
        sinks = ((rank >= 0) & (rank < self.sink_size) & (column >= 0)).nonzero().flatten()
        if len(sinks):
            places = self.ring + rank[sinks]
            self.keys[sinks, :, places] = old_key[sinks]
            self.values[sinks, :, places] = old_value[sinks]
        joins = (rank >= self.sink_size) & (column >= 0)
        self._join_one(old_key[:, :, None], old_value[:, :, None], joins)

    def _join_one(self, key: Tensor, value: Tensor, rows: Tensor | None) -> None:
        """Let one token of each row, or of the given rows, join the mean."""
        joins = torch.ones_like(self.dropped) if rows is None else rows.long()
        self.dropped = self.dropped + joins
        if self.compensate:
            mass = self._mass(self.dropped).clamp(min=1.0)
            share = (joins[:, None, None] / mass)[..., None]
            self.mean_key += (key.float() - self.mean_key) * share
            self.mean_value += (value.float() - self.mean_value) * share

    def _in_order(self) -> tuple[Tensor, Tensor, int]:
        """Return the ring in the order of its columns, and the first column."""
        first = max(0, self.seen - self.ring)
        slots = torch.arange(first, self.seen, device=self.keys.device) % self.ring
        return self.keys[:, :, slots], self.values[:, :, slots], first

    def _cut(self, key: Tensor, value: Tensor, first: int, new: int) -> None:
        """Rebuild the store from columns ``first ..`` of which the last ``new`` are new."""
        if self.windows is None:
            raise RuntimeError("an exact store cannot be cut")
        before = (self.seen - self.windows).clamp(min=0)
        self.seen += new
        old_ring = self.ring
        if self.grow:
            self.windows = self._rule_windows(self.seen, key.shape[0], key.device)
            if int(self.windows.max()) > self.ring:
                self.ring = int(self.windows.max()) * (5 if new == 1 else 4) // 4
        start = torch.maximum(before, (self.seen - self.windows).clamp(min=0))
        sinks = self._sinks_of(old_ring)
        self._lay_out(key, value, sinks)
        self._leave(key, value, first, before, start)

    def _sinks_of(self, ring: int) -> tuple[Tensor, Tensor] | None:
        """Return the sinks held behind a ring of the given size."""
        if self.cut == self.seen or self.keys.shape[2] <= ring:
            return None
        stop = ring + self.sink_size
        return self.keys[:, :, ring:stop].clone(), self.values[:, :, ring:stop].clone()

    def _lay_out(self, key: Tensor, value: Tensor, sinks: tuple[Tensor, Tensor] | None) -> None:
        """Fill fresh storage with the latest columns and the sinks."""
        capacity = max(self.size, min(self.keys.shape[2], self.ring + self.sink_size))
        if self.cut == self.seen:
            capacity = self.size  # the first cut takes exactly what it needs
        batch, heads, held, _ = key.shape
        latest = min(held, self.ring)
        slots = torch.arange(self.seen - latest, self.seen, device=key.device) % self.ring
        for name, source, index in (("keys", key, 0), ("values", value, 1)):
            fresh = source.new_zeros(batch, heads, capacity, source.shape[3])
            fresh[:, :, slots] = source[:, :, held - latest :]
            if sinks is not None:
                kept = sinks[index][:, :, : capacity - self.ring]
                fresh[:, :, self.ring : self.ring + kept.shape[2]] = kept
            setattr(self, name, fresh)

    def _leave(self, key: Tensor, value: Tensor, first: int, before: Tensor, start: Tensor) -> None:
        """Move columns ``before[b] .. start[b]-1`` of each row to its sinks or its mean."""
        if not bool((start > before).any()):
            return
        low, high = int(before.min()), int(start.max())
        pads = before.new_zeros(len(before)) if self.pads is None else self.pads
        newest = start - 1
        added = (start - torch.maximum(before, pads + self.sink_size)).clamp(min=0)
        old_mass, self.dropped = self._mass(self.dropped), self.dropped + added
        sums = None
        if self.compensate:
            decay = old_mass
            if self.slopes is not None:
                decay = old_mass * (-self.slopes * added[:, None, None]).exp()
            sums = [self.mean_key * decay[..., None], self.mean_value * decay[..., None]]
        for begin in range(low, high, _CHUNK):
            columns = torch.arange(begin, min(begin + _CHUNK, high), device=key.device)
            leaving = (columns >= before[:, None]) & (columns < start[:, None])
            rank = columns - pads[:, None]  # number of the token in its own text
            part = slice(begin - first, begin - first + len(columns))
            self._fill_sinks(key[:, :, part], value[:, :, part], rank, leaving)
            if sums is not None:
                weight = (leaving & (rank >= self.sink_size))[:, None, None].float()
                if self.slopes is not None:
                    distance = (newest[:, None] - columns).clamp(min=0)
                    weight = weight * (-self.slopes[..., None] * distance[:, None, None]).exp()
                sums[0] += weight @ key[:, :, part].float()
                sums[1] += weight @ value[:, :, part].float()
        if sums is not None:
            mass = self._mass(self.dropped).clamp(min=1.0)[..., None]
            self.mean_key, self.mean_value = sums[0] / mass, sums[1] / mass

    def _fill_sinks(self, key: Tensor, value: Tensor, rank: Tensor, leaving: Tensor) -> None:
        rows, columns = (leaving & (rank >= 0) & (rank < self.sink_size)).nonzero(as_tuple=True)
        if len(rows):
            slots = self.ring + rank[rows, columns]
            self.keys[rows, :, slots] = key[rows, :, columns]
            self.values[rows, :, slots] = value[rows, :, columns]


def _grown(tensor: Tensor, used: int, capacity: int) -> Tensor:
    fresh = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
    fresh[:, :, :used] = tensor[:, :, :used]
    return fresh
