"""How much the products of a link lose when its readers and their input are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from slim_core.method import MethodSpec
from slim_core.numerics import affine_params
from slim_ptq.methods import PtqMethods, make_method
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.structure import Link
from slim_ptq.transforms.base import Reader
from slim_ptq.transforms.statistics import ChannelStats

MOST_READERS = 8
MOST_ROWS = 256


class LinkError:
    """The error of the quantized products of a link as a function of its scales.

    Weights are quantized by the default method of their scheme, static activations with the range
    of all calibration tokens.

    Parameters
    ----------
    link : Link
    stats : ChannelStats
        Of what the readers read, with tokens.
    readers : sequence of Reader
        Of many readers (experts) and of many rows the error is measured on some, evenly chosen.
    """

    def __init__(self, link: Link, stats: ChannelStats, readers: Sequence[Reader]) -> None:
        self._stats = stats
        self._tokens = stats.tokens.float()
        self._index = link.targets[0].index.to(self._tokens.device)
        self._readers = [
            Reader(_some(weight, MOST_ROWS).float(), scheme)
            for weight, scheme in _some(readers, MOST_READERS)
        ]
        self._exact = [self._tokens @ reader.weight.T for reader in self._readers]

    def __call__(self, scales: torch.Tensor) -> float:
        """Return the squared error relative to each reader's output, summed over the readers.

        Parameters
        ----------
        scales : torch.Tensor
            Of the source's channels, ``[link.width]``.
        """
        columns = scales.to(self._tokens)[self._index]
        tokens, total = self._tokens / columns, 0.0
        for reader, exact in zip(self._readers, self._exact, strict=True):
            gap = quantized_reader(reader, columns, self._stats)(tokens) - exact
            size = float(exact.square().sum())
            total += float(gap.square().sum()) / size if size else 0.0
        return total


def quantized_reader(
    reader: Reader,
    columns: torch.Tensor,
    stats: ChannelStats,
    *,
    method: MethodSpec | None = None,
    bias: torch.Tensor | None = None,
) -> FakeQuantLinear:
    """Return a reader with its columns scaled, quantized as it will be deployed.

    Parameters
    ----------
    reader : Reader
        With a float32 weight.
    columns : torch.Tensor
        Scales of the input channels, ``[in]``.
    stats : ChannelStats
        Of what it reads before that is scaled; static activations get the range of all tokens.
    method : MethodSpec, optional
        One without needs; the default of the scheme if not given.
    """
    scheme = reader.scheme
    assert scheme.weight is not None  # narrowing: only quantized layers are readers
    made = make_method(method or PtqMethods().default(scheme))
    layer = made.quantize("", reader.weight * columns, scheme.weight).layer(
        "", scheme, bias, "float32"
    )
    if scheme.is_static and scheme.activation is not None:
        low, high = (stats.low / columns).min(), (stats.high / columns).max()
        ends = low.float().reshape(1), high.float().reshape(1)
        scale, offset = affine_params(*ends, scheme.activation)
        layer = replace(layer, input_scale=scale, input_offset=offset)
    return FakeQuantLinear(layer, torch.float32)


def best_scales(
    candidates: Iterable[torch.Tensor], error: Callable[[torch.Tensor], float]
) -> torch.Tensor:
    """Return the scales with the least error, the first of equals."""
    return min(candidates, key=error)


def _some(items: Any, most: int) -> Any:
    """Return every so-many-th item, ``most`` or fewer."""
    return items[:: -(-len(items) // most)]
