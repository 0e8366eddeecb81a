"""Ranges of keys and values over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slim_core.dtypes import INT8
from slim_core.errors import CalibrationError, StructureError
from slim_core.numerics import affine_params, check_finite
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.attention.hooking import hook, unhook
from slim_ptq.kv.rotated_keys import KeyWatcher
from slim_ptq.kv.sources import CacheSource

_KEYS = "keys after the rotary embedding"  # beside the names of linear layers


def cache_scheme(*, symmetric: bool) -> TensorScheme:
    """Return the scheme of a cache: int8, one scale and offset a channel."""
    return TensorScheme(INT8, Granularity.PER_CHANNEL, symmetric)


class CacheRanges:
    """Smallest and largest value of every cached channel, running over all calibration data.

    Parameters
    ----------
    sources : iterable of CacheSource
    rotated : str, optional
        Name of the attention module whose keys are measured after the rotary embedding; at the
        output of their layer if not given.
    """

    def __init__(self, sources: Iterable[CacheSource], rotated: str | None = None) -> None:
        self.sources = tuple(sources)
        self._rotated = rotated
        self._low: dict[str, torch.Tensor] = {}
        self._high: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Take in what the linear layers below ``root`` put out while the context is open.

        And the keys of its attention module, if it was given.
        """
        handles = [
            root.get_submodule(name).register_forward_hook(self._hook(name))
            for name in dict.fromkeys(source.linear for source in self.sources)
        ]
        attention = None if self._rotated is None else root.get_submodule(self._rotated)
        if attention is not None:
            hook(attention, KeyWatcher(lambda keys: self._take(_KEYS, keys)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if attention is not None:
                unhook(attention)

    def merge(self, other: CacheRanges) -> None:
        """Take in what another one has seen of the same layers."""
        for name, low in other._low.items():
            high = other._high[name]
            self._low[name] = torch.minimum(low, self._low.get(name, low))
            self._high[name] = torch.maximum(high, self._high.get(name, high))

    def params(
        self, source: CacheSource, scheme: TensorScheme, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset, float32, shape (cached channels,), on the CPU.

        Parameters
        ----------
        name : str
            Of the layer, for messages.

        Raises
        ------
        CalibrationError
            The layer was not reached.
        NumericalError
            Its output has NaN or infinity.
        """
        if source.linear not in self._low:
            raise CalibrationError(f"no calibration token reached {name}, whose output is cached")
        low, high = self._low[source.linear], self._high[source.linear]
        if source.channels is not None:
            low, high = low[source.channels], high[source.channels]
        if self._rotated is not None and source.part == "k_proj":
            low, high = self._rotated_range(len(low), name)
        check_finite(name, "output", low)
        check_finite(name, "output", high)
        return affine_params(low, high, scheme)

    def _rotated_range(self, width: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if _KEYS not in self._low or len(self._low[_KEYS]) != width:
            seen = len(self._low.get(_KEYS, ()))
            raise StructureError(f"{name} gives {width} channels of keys, and attention saw {seen}")
        return self._low[_KEYS], self._high[_KEYS]

    def _hook(self, name: str) -> Any:
        def watch(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            self._take(name, output)

        return watch

    def _take(self, name: str, values: torch.Tensor) -> None:
        if not values.numel():
            return
        rows = values.detach().reshape(-1, values.shape[-1])
        low, high = (part.float().cpu() for part in torch.aminmax(rows, dim=0))
        if name in self._low:
            low = torch.minimum(low, self._low[name])
            high = torch.maximum(high, self._high[name])
        self._low[name], self._high[name] = low, high
