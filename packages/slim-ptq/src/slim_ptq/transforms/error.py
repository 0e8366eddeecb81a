"""How much the products of a link lose when its readers and their input are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from slim_core.numerics import (
    affine_params,
    dequantize,
    dequantize_weight,
    quantize,
    quantize_per_token,
    quantize_weight,
    weight_params,
)
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq.structure import Link
from slim_ptq.transforms.base import Reader
from slim_ptq.transforms.statistics import ChannelStats

MOST_READERS = 8
MOST_ROWS = 256


class LinkError:
    """The error of the quantized products of a link as a function of its scales.

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
        inputs: dict[TensorScheme | None, torch.Tensor] = {}
        total = 0.0
        for (weight, scheme), exact in zip(self._readers, self._exact, strict=True):
            if scheme.activation not in inputs:
                inputs[scheme.activation] = self._noisy_tokens(columns, scheme.activation)
            noisy = _noisy_weight(weight * columns, scheme.weight)
            gap = inputs[scheme.activation] @ noisy.T - exact
            size = float(exact.square().sum())
            total += float(gap.square().sum()) / size if size else 0.0
        return total

    def _noisy_tokens(self, columns: torch.Tensor, scheme: TensorScheme | None) -> torch.Tensor:
        """Return the tokens after scaling and quantization: per token, or with the full range."""
        tokens = self._tokens / columns
        if scheme is None:
            return tokens
        if scheme.granularity is Granularity.PER_TOKEN:
            codes, scale = quantize_per_token(tokens, scheme.dtype)
            return dequantize(codes, scale, None)  # type: ignore[no-any-return]
        low, high = (self._stats.low / columns).min(), (self._stats.high / columns).max()
        scale, offset = affine_params(low.float(), high.float(), scheme)
        codes = quantize(tokens, scale, offset, scheme.dtype)
        return dequantize(codes, scale, offset)  # type: ignore[no-any-return]


def _noisy_weight(weight: torch.Tensor, scheme: TensorScheme | None) -> torch.Tensor:
    if scheme is None:
        return weight
    scale, offset = weight_params(weight, scheme)
    codes = quantize_weight(weight, scale, offset, scheme)
    return dequantize_weight(codes, scale, offset)  # type: ignore[no-any-return]


def _some(items: Any, most: int) -> Any:
    """Return every so-many-th item, ``most`` or fewer."""
    return items[:: -(-len(items) // most)]


def best_scales(candidates: Iterable[torch.Tensor], error: LinkError) -> torch.Tensor:
    """Return the scales with the least error, the first of equals."""
    return min(candidates, key=error)
