"""From scores to the heads that keep their whole history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim_core.errors import InvalidValueError
from slim_core.validate import check_int
from slim_ra.config import check_ratio
from slim_ra.profile import RetrievalHeads
from slim_ra.scores import HeadScores

Heads = dict[int, list[int]]


def top_heads(
    scores: Tensor, ratio: float, *, min_heads: int = 0, layers: Sequence[int] | None = None
) -> Heads:
    """Pick the ``round(n * ratio)`` best heads of all layers together, and those tied with them.

    Parameters
    ----------
    scores : Tensor
        ``[layers, kv_heads]``.
    ratio : float
        Share of the ``n`` heads.
    min_heads : int
        Pick at least so many.
    layers : sequence of int, optional
        Only heads of these layers are candidates.

    Returns
    -------
    dict of int to list of int
        Ascending KV heads of each layer that has any.
    """
    check_ratio("ratio", ratio)
    allowed = list(range(len(scores))) if layers is None else list(layers)
    pool = scores[allowed].flatten()
    count = min(max(round(len(pool) * ratio), check_int("min_heads", min_heads, low=0)), len(pool))
    if not count:
        return {}
    threshold = pool.topk(count).values[-1]
    picked: Heads = {}
    for layer in allowed:
        heads = (scores[layer] >= threshold).nonzero().flatten().tolist()
        if heads:
            picked[layer] = heads
    return picked


def select_heads(
    scores: HeadScores,
    *,
    induction_ratio: float,
    echo_ratio: float,
    min_heads: int = 0,
    needle_ratio: float = 0.0,
    protect_first_layers: int = 0,
) -> RetrievalHeads:
    """Pick induction and echo heads, each by its own share of all KV heads.

    With ``needle_ratio`` the best heads by needle score join the induction heads, and so do all
    heads of ``protect_first_layers`` first layers.

    Raises
    ------
    InvalidValueError
        A share is outside ``[0, 1]``, or needle scores are asked for and were not made.
    """
    layers = scores.candidates or None
    induction = top_heads(scores.induction, induction_ratio, min_heads=min_heads, layers=layers)
    echo = top_heads(scores.echo, echo_ratio, min_heads=min_heads, layers=layers)
    if needle_ratio:
        if scores.needle is None:
            raise InvalidValueError("needle_ratio is above 0 but no needle score was made")
        extra = top_heads(scores.needle, needle_ratio, layers=layers)
        induction = {
            layer: sorted({*induction.get(layer, []), *extra.get(layer, [])})
            for layer in sorted({*induction, *extra})
        }
    check_int("protect_first_layers", protect_first_layers, low=0, high=len(scores.induction))
    for layer in range(protect_first_layers):
        induction[layer] = list(range(scores.induction.shape[1]))
    return RetrievalHeads(induction, echo)


def select_by_bytes(scores: HeadScores, budget: float, *, kept: float) -> RetrievalHeads:
    """Pick as many heads as a share of the full cache's bytes allows, best first.

    A head counts with its best score of any kind.

    Parameters
    ----------
    scores : HeadScores
    budget : float
        Bytes of the compressed cache over those of the full one, in ``[0, 1]``.
    kept : float
        Share of its tokens that a compressed head keeps at the length in mind.

    Raises
    ------
    InvalidValueError
        The budget is below what the compressed heads alone need.
    """
    check_ratio("budget", budget)
    check_ratio("kept", kept)
    if budget < kept:
        raise InvalidValueError(
            f"budget must be at least {kept:.4f}, what compressed heads keep, not {budget}"
        )
    best = torch.maximum(scores.induction, scores.echo)
    if scores.needle is not None:
        best = torch.maximum(best, scores.needle)
    layers = scores.candidates or tuple(range(len(best)))
    pool = best[list(layers)].flatten()
    share = 1.0 if kept == 1.0 else (budget - kept) / (1.0 - kept)
    # Heads tied at the threshold would break the budget, so the order decides between them.
    chosen = pool.argsort(descending=True, stable=True)[: int(share * len(pool))]
    picked: Heads = {}
    for index in sorted(chosen.tolist()):
        picked.setdefault(layers[index // best.shape[1]], []).append(index % best.shape[1])
    return RetrievalHeads(picked, {})
