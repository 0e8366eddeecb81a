"""Following channels through the operations of a forward pass.

Every tensor whose last axes carry, channel by channel, the output of a norm or a linear layer times
some factor gets a *shadow*: an integer tensor of the same shape that holds, for each element, the
number of the channel it carries.  Operations that move elements are applied to the shadow as well;
operations that are homogeneous in the channel (products, weighted sums over tokens) keep it;
everything else drops it.  What comes out are candidates: links are proved afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Shadow:
    """Channel numbers of a tensor; ``mixed`` once values were summed over tokens."""

    ids: torch.Tensor
    mixed: bool = False

    def moved(self, ids: torch.Tensor) -> Shadow:
        """Return the same with other channel numbers."""
        return Shadow(ids, self.mixed)


Shadows = dict[str, Shadow]


@dataclass(frozen=True)
class WeightRef:
    """A parameter, possibly transposed or cast."""

    module: str
    parameter: str
    swapped: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """One application of a weight matrix: what its input channels carried."""

    weight: WeightRef
    axis: int
    carried: dict[str, tuple[torch.Tensor, bool]] = field(default_factory=dict)


class ChannelFlow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which weights read which channels while a module runs.

    Parameters
    ----------
    root : nn.Module
        The module that will be run; its parameters are known by their names in it.
    linears : set of str
        Names of the modules that start new channels when applied.
    """

    def __init__(self, root: nn.Module, linears: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readings: list[Reading] = []
        self._linears = linears
        self._tags: dict[int, tuple[torch.Tensor, Shadows]] = {}
        self._weights: dict[int, tuple[torch.Tensor, WeightRef]] = {}
        for name, parameter in root.named_parameters():
            module, _, leaf = name.rpartition(".")
            self._weights[id(parameter)] = (parameter, WeightRef(module, leaf))

    def start(self, source: str, tensor: torch.Tensor) -> None:
        """Let the last axis of ``tensor`` carry the channels of ``source`` from here on."""
        ids = torch.arange(tensor.shape[-1], dtype=torch.int32, device=tensor.device)
        shadow = Shadow(ids.expand(tensor.shape).contiguous())
        self._put(tensor, {source: shadow})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and give its outputs the shadows they deserve."""
        kwargs = kwargs or {}
        shadows = [self._of(arg) for arg in args]  # before: an operation may work in place
        out = func(*args, **kwargs)
        operation = func.overloadpacket
        self._forget(out)
        if operation in _MOVES:
            self._move(func, args, kwargs, out, shadows)
        elif operation in _PRODUCTS:
            self._product(operation, args, out)
        elif operation in _ELEMENTWISE:
            self._put(out, _ELEMENTWISE[operation](self, args, out, shadows))
        elif "scaled_dot_product" in operation.__name__ or "_flash_attention" in str(operation):
            self._attention(out, shadows[2])
        return out

    def _of(self, value: Any) -> Shadows:
        entry = self._tags.get(id(value)) if isinstance(value, torch.Tensor) else None
        return entry[1] if entry else {}

    def weight_ref(self, value: Any) -> WeightRef | None:
        """Return which parameter a tensor is, or None."""
        entry = self._weights.get(id(value)) if isinstance(value, torch.Tensor) else None
        return entry[1] if entry else None

    def _put(self, tensor: torch.Tensor, shadows: Shadows) -> None:
        if shadows and tensor.numel():
            self._tags[id(tensor)] = (tensor, shadows)
        else:
            self._tags.pop(id(tensor), None)

    def _forget(self, out: Any) -> None:
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            self._tags.pop(id(tensor), None)

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any, shadows: list[Shadows]) -> None:
        """Apply an operation that only moves elements to the shadows."""
        operation = func.overloadpacket
        if operation in (aten.cat, aten.stack):
            self._put(out, self._join(func, args, kwargs))
            return
        reference = self.weight_ref(args[0])
        if reference is not None and isinstance(out, torch.Tensor):
            self._move_weight(operation, args, out, reference)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        moved: list[Shadows] = [{} for _ in outs]
        for source, shadow in shadows[0].items():
            ids = _move_ids(func, shadow.ids, args, kwargs, out)
            for target, part in zip(moved, ids, strict=True):
                target[source] = shadow.moved(part)
        for tensor, found in zip(outs, moved, strict=True):
            self._put(tensor, found)

    def _move_weight(
        self, operation: Any, args: Any, out: torch.Tensor, reference: WeightRef
    ) -> None:
        swap = operation in (aten.t, aten.transpose, aten.permute) and out.ndim == 2
        if swap:
            swapped = out.shape == args[0].shape[::-1] and out.stride() == args[0].stride()[::-1]
            reference = WeightRef(
                reference.module, reference.parameter, reference.swapped != swapped
            )
        if swap or (operation in _SAME and out.shape == args[0].shape):
            self._weights[id(out)] = (out, reference)

    def _join(self, func: Any, args: Any, kwargs: Any) -> Shadows:
        parts = [self._of(tensor) for tensor in args[0] if tensor.numel()]
        common = set.intersection(*(set(part) for part in parts)) if parts else set()
        found: Shadows = {}
        for source in common:
            ids = [part[source].ids for part in parts]
            mixed = any(part[source].mixed for part in parts)
            found[source] = Shadow(func(ids, *args[1:], **kwargs), mixed)
        return found

    def _product(self, operation: Any, args: Any, out: torch.Tensor) -> None:
        """Handle a matrix product: the application of a weight, or a weighted sum over tokens."""
        added = operation in (aten.addmm, aten.baddbmm)
        left, right = args[1:3] if added else args[:2]
        reference = self.weight_ref(right)
        if reference is not None and right.ndim == 2:
            axis = 1 if reference.swapped else 0
            self._read(reference, axis, self._of(left))
            if reference.module in self._linears:
                self.start(reference.module, out)
            return
        if added:
            return
        found = {source: s for source, s in self._of(left).items() if _constant(s.ids, -1)}
        found = {s: Shadow(v.ids[..., :1].expand(out.shape), True) for s, v in found.items()}
        for source, shadow in self._of(right).items():
            if source not in self._of(left) and _constant(shadow.ids, -2):
                found[source] = Shadow(shadow.ids[..., :1, :].expand(out.shape), True)
        self._put(out, found)

    def _read(self, reference: WeightRef, axis: int, shadows: Shadows) -> None:
        carried = {}
        for source, shadow in shadows.items():
            rows = shadow.ids.reshape(-1, shadow.ids.shape[-1])
            if bool((rows == rows[:1]).all()):
                carried[source] = (rows[0].long(), shadow.mixed)
        self.readings.append(Reading(reference, axis, carried))

    def _attention(self, out: Any, values: Shadows) -> None:
        result = out[0] if isinstance(out, (tuple, list)) else out
        found: Shadows = {}
        for source, shadow in values.items():
            ids = shadow.ids[..., :1, :]
            if _constant(shadow.ids, -2) and ids.ndim == result.ndim:
                ids = ids.repeat_interleave(result.shape[-3] // ids.shape[-3], dim=-3)
                found[source] = Shadow(ids.expand(result.shape), True)
        self._put(result, found)


def _move_ids(func: Any, ids: torch.Tensor, args: Any, kwargs: Any, out: Any) -> list[torch.Tensor]:
    """Return the shadows of the outputs of an operation that moves elements."""
    operation = func.overloadpacket
    if operation in _SAME:
        return [ids.reshape(out.shape)]
    moved = func(ids, *args[1:], **kwargs)
    return list(moved) if isinstance(moved, (tuple, list)) else [moved]


def _constant(ids: torch.Tensor, dim: int) -> bool:
    return bool((ids == ids.narrow(dim, 0, 1)).all())


def _multiply(flow: ChannelFlow, args: Any, out: torch.Tensor, shadows: list[Shadows]) -> Shadows:
    left, right = (*shadows, {}, {})[:2]
    both = set(left) & set(right)
    return {
        source: shadow.moved(shadow.ids.expand(out.shape))
        for source, shadow in (left | right).items()
        if source not in both
    }


def _divide(flow: ChannelFlow, args: Any, out: torch.Tensor, shadows: list[Shadows]) -> Shadows:
    return {s: v.moved(v.ids.expand(out.shape)) for s, v in shadows[0].items()}


def _add(flow: ChannelFlow, args: Any, out: torch.Tensor, shadows: list[Shadows]) -> Shadows:
    """Keep channels through the layer's own bias, or a sum of two carriers of the same ones."""
    left, right = shadows[:2]
    bias = flow.weight_ref(args[1])
    if bias is not None and bias.parameter == "bias":
        return {bias.module: left[bias.module]} if bias.module in left else {}
    return {
        source: Shadow(left[source].ids, left[source].mixed or right[source].mixed)
        for source in set(left) & set(right)
        if left[source].ids.shape == right[source].ids.shape == out.shape
        and torch.equal(left[source].ids, right[source].ids)
    }


_SAME = {
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten._reshape_alias,
    aten.clone,
    aten.contiguous,
    aten._to_copy,
    aten.alias,
    aten.detach,
    aten.lift_fresh,
}
_MOVES = _SAME | {
    aten.transpose,
    aten.permute,
    aten.t,
    aten.slice,
    aten.select,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.index,
    aten.index_select,
    aten.gather,
    aten.repeat,
    aten.flip,
    aten.cat,
    aten.stack,
}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_ELEMENTWISE: dict[Any, Callable[[ChannelFlow, Any, Any, list[Shadows]], Shadows]] = {
    aten.mul: _multiply,
    aten.mul_: _multiply,
    aten.div: _divide,
    aten.div_: _divide,
    aten.neg: _divide,
    aten.relu: _divide,
    aten.relu_: _divide,
    aten.add: _add,
    aten.add_: _add,
    aten.sub: _add,
}
