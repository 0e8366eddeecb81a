"""The slopes of ALiBi models."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def standard_slopes(heads: int) -> Tensor:
    """Slopes of Press et al. (2022), as in Bloom, Falcon and Baichuan, fp64 ``[heads]``.

    Powers of two get ``2^(-8 i / heads)``; other counts the series of the power of two below,
    then every second one of the doubled series.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    extra = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(slopes + extra, dtype=torch.float64)


def mpt_slopes(heads: int, bias_max: int = 8) -> Tensor:
    """Slopes of MPT, fp64 ``[heads]``; another set and order when ``heads`` is no power of two."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float64) * (-bias_max / power)
    slopes = torch.exp2(exponents)
    if power == heads:
        return slopes
    return torch.cat([slopes[1::2], slopes[::2]])[:heads]
