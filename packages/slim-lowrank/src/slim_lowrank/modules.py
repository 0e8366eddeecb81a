"""Modules that stand in for a decomposed layer.

The state-dict names of a layer ``L`` become ``L.0.weight``, ``L.1.weight``, ... ``L.n.bias``, as in
a plain ``torch.nn.Sequential``.  ``weight`` is the dense product, for models that read it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Sequential):
    """``Linear(in, r, bias=False)`` followed by ``Linear(r, out, bias)``."""

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(_weight(self[0]).shape[-1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(_weight(self[-1]).shape[0])

    @property
    def weight(self) -> Tensor:
        """Dense weight ``(out, in)``, computed at each access."""
        return _weight(self[-1]) @ _weight(self[0])

    @property
    def bias(self) -> Tensor | None:
        """Bias ``(out,)`` of the last factor."""
        return _bias(self[-1])


class FactoredHFConv1D(FactoredLinear):
    """The same in the place of a transformers ``Conv1D``, whose dense weight is ``(in, out)``."""


class FactoredEmbedding(nn.Sequential):
    """``Embedding(n, r)`` followed by ``Linear(r, width, bias=False)``."""

    @property
    def num_embeddings(self) -> int:
        """Number of entries."""
        return int(_weight(self[0]).shape[0])

    @property
    def embedding_dim(self) -> int:
        """Width of the output."""
        return int(_weight(self[-1]).shape[0])

    @property
    def padding_idx(self) -> int | None:
        """Entry that gets no gradient."""
        return cast("int | None", self[0].padding_idx)

    @property
    def weight(self) -> Tensor:
        """Dense table ``(n, width)``, computed at each access."""
        return _weight(self[0]) @ _weight(self[-1]).T


class FactoredConv(nn.Sequential):
    """Two or three convolutions in the place of one; see :mod:`slim_lowrank.conv_forms`."""


class TransposedLinear(nn.Module):
    """``y = x W`` with ``W (in, out)``: reads the second factor of a tied embedding.

    Parameters
    ----------
    weight : Parameter, shape (in, out)
        Shared with the embedding's ``Linear(r, width)``.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return x @ self.weight


class TiedLinear(nn.Sequential):
    """Head tied to a :class:`FactoredEmbedding`: both its weights are the embedding's own."""

    def __init__(self, embedding: FactoredEmbedding, bias: nn.Parameter | None) -> None:
        table = cast(nn.Parameter, embedding[0].weight)
        last = nn.Linear(
            table.shape[1], table.shape[0], bias=False, device="meta", dtype=table.dtype
        )
        last.weight = table
        if bias is not None:
            last.bias = bias
        super().__init__(TransposedLinear(cast(nn.Parameter, embedding[1].weight)), last)

    @property
    def weight(self) -> Tensor:
        """Dense weight ``(out, in)``, computed at each access."""
        return _weight(self[1]) @ _weight(self[0]).T

    @property
    def bias(self) -> Tensor | None:
        """Bias ``(out,)``."""
        return _bias(self[1])


class PivotLinear(nn.Module):
    """Rank-r linear layer that stores r of its own output rows (Zhao et al., PIFA, ICML 2025).

    ``r (in + out) - r^2`` weights instead of ``r (in + out)``: the pivot rows are outputs already,
    so only the other ``out - r`` are combined from them.

    Parameters
    ----------
    in_features, out_features, rank : int
        Widths, and ``rank < out_features``.
    bias : bool
        Whether there is a bias ``(out,)``.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pivot = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)
        self.register_buffer("order", torch.arange(out_features, device=device))

    @property
    def weight(self) -> Tensor:
        """Dense weight ``(out, in)``, computed at each access."""
        pivot = _weight(self.pivot)
        return torch.cat([pivot, _weight(self.rest) @ pivot])[self.order]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        pivot = self.pivot(x)
        y = torch.cat([pivot, self.rest(pivot)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _bias(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", module.bias)
