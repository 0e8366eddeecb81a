"""Ranges of keys and values over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slim_core.dtypes import INT8
from slim_core.errors import CalibrationError
from slim_core.numerics import affine_params, check_finite
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.kv.sources import CacheSource


def cache_scheme(*, symmetric: bool) -> TensorScheme:
    """Return the scheme of a cache: int8, one scale and offset a channel."""
    return TensorScheme(INT8, Granularity.PER_CHANNEL, symmetric)


class CacheRanges:
    """Smallest and largest value of every cached channel, running over all calibration data.

    Parameters
    ----------
    sources : iterable of CacheSource
    """

    def __init__(self, sources: Iterable[CacheSource]) -> None:
        self.sources = tuple(sources)
        self._low: dict[str, torch.Tensor] = {}
        self._high: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Take in the outputs of the linear layers of ``root`` while the context is open."""
        handles = [
            root.get_submodule(name).register_forward_hook(self._hook(name))
            for name in dict.fromkeys(source.linear for source in self.sources)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        check_finite(name, "output", low)
        check_finite(name, "output", high)
        return affine_params(low, high, scheme)

    def _hook(self, name: str) -> Any:
        def watch(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if not output.numel():
                return
            rows = output.detach().reshape(-1, output.shape[-1])
            low, high = (part.float().cpu() for part in torch.aminmax(rows, dim=0))
            if name in self._low:
                low = torch.minimum(low, self._low[name])
                high = torch.maximum(high, self._high[name])
            self._low[name], self._high[name] = low, high

        return watch
