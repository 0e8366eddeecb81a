"""Scaling only the outlier channels, with the threshold that loses least when quantized.

After the observation of Outlier Suppression+ (arXiv:2304.09145) that few channels are at fault and
that scaling the others only makes the weights harder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slim_core.dtypes import INT8
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
from slim_ptq.transforms.smooth import column_absmax, smooth_scales
from slim_ptq.transforms.statistics import ChannelStats

INT8_ROWS = TensorScheme(INT8, Granularity.PER_CHANNEL)
INT8_TENSOR = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
STEPS = 20
MOST_READERS = 8
MOST_ROWS = 256


@dataclass(frozen=True)
class ThresholdSmooth:
    """Search which channels to scale (``m2`` of the classic interface).

    For each threshold between the largest channel and the spread of the activation, the channels
    above it are scaled by SmoothQuant's rule; no scaling at all is a candidate too.  The one whose
    quantized products differ least from the float ones wins.

    Parameters
    ----------
    alpha : float
        Share of the activation in SmoothQuant's rule.
    weight, activation : TensorScheme
        How readers and their input will be quantized.
    tokens : int
        How many tokens the candidates are compared on.
    """

    alpha: float = 0.5
    weight: TensorScheme = INT8_ROWS
    activation: TensorScheme = INT8_TENSOR
    tokens: int = 256

    def scales(
        self, link: Link, stats: ChannelStats, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the scales of a link, ``[link.width]``.

        Parameters
        ----------
        stats : ChannelStats
            Of what the readers read, with tokens.
        weights : sequence of torch.Tensor
            Weights ``[out, in]`` of the readers that will be quantized; of many readers (experts)
            and of many rows the errors are measured on some, evenly chosen.
        """
        chosen = [_some(weight, MOST_ROWS).float() for weight in _some(weights, MOST_READERS)]
        best, least = torch.ones(link.width), float("inf")
        for per_input in self._candidates(stats, column_absmax(weights)):
            scales = link.to_source(per_input)
            error = self._error(scales[link.targets[0].index.to(scales.device)], stats, chosen)
            if error < least:
                best, least = scales, error
        return best

    def _candidates(self, stats: ChannelStats, columns: torch.Tensor) -> Iterator[torch.Tensor]:
        absmax = stats.absmax.float()
        none = torch.ones_like(absmax)
        yield none
        centred = stats.tokens - (stats.low + stats.high) / 2
        low, high = float(centred.std()), float(absmax.max())
        if not 0.0 < low < high:
            return
        smooth = smooth_scales(absmax, columns, self.alpha)
        for step in range(STEPS):
            threshold = high * (low / high) ** (step / STEPS)
            yield torch.where(absmax >= threshold, smooth, none)

    def _error(
        self, scales: torch.Tensor, stats: ChannelStats, weights: Sequence[torch.Tensor]
    ) -> float:
        """Return the squared error of the quantized products, relative to each reader's output."""
        tokens = stats.tokens.float()
        noisy = self._noisy_tokens(tokens / scales, stats, scales)
        total = 0.0
        for weight in weights:
            moved = weight * scales
            scale, offset = weight_params(moved, self.weight)
            codes = quantize_weight(moved, scale, offset, self.weight)
            exact = tokens @ weight.T
            gap = noisy @ dequantize_weight(codes, scale, offset).T - exact
            size = float(exact.square().sum())
            total += float(gap.square().sum()) / size if size else 0.0
        return total

    def _noisy_tokens(
        self, tokens: torch.Tensor, stats: ChannelStats, scales: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.activation.dtype
        if self.activation.granularity is Granularity.PER_TOKEN:
            codes, scale = quantize_per_token(tokens, dtype)
            return dequantize(codes, scale, None)  # type: ignore[no-any-return]
        low, high = (stats.low / scales).min(), (stats.high / scales).max()
        scale, offset = affine_params(low.float(), high.float(), self.activation)
        codes = quantize(tokens, scale, offset, dtype)
        return dequantize(codes, scale, offset)  # type: ignore[no-any-return]


def _some(items: Any, most: int) -> Any:
    """Return every so-many-th item, ``most`` or fewer."""
    return items[:: -(-len(items) // most)]
