"""What checkpoints hold of norms besides their own parameters, after outlier suppression."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class FloatTensor(NamedTuple):
    """A tensor that is not quantized; ``tensor`` is None where another name holds it."""

    name: str
    tensor: torch.Tensor | None
    is_copy: bool = False  # one of the entries that tell MindIE of a smoothed norm
    is_added: bool = False  # a bias that the class of the model does not have


def norm_entries(name: str, norm: nn.Module, *, copies: bool) -> Iterator[FloatTensor]:
    """Yield what engines want to see of a smoothed norm besides its own parameters: a bias.

    Parameters
    ----------
    name : str
        Of the norm in the checkpoint.
    copies : bool
        Whether to give the ``.module`` entries of the ``safe_tensor`` layout as well.
    """
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = getattr(norm, "bias", None)
    if bias is None:
        bias = torch.zeros_like(weight)
        yield FloatTensor(f"{name}.bias", bias, is_added=True)
    if copies:
        yield FloatTensor(f"{name}.module.weight", weight, is_copy=True)
        yield FloatTensor(f"{name}.module.bias", bias, is_copy=True)
