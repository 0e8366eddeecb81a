"""Which KV heads retrieve: induction, echo and needle scores of every head.

The scores are those of RazorAttention (Tang et al., 2024): on a random unit of ``P`` tokens
repeated ``R`` times, an *echo* head attends from a token to its earlier copies, an *induction* head
to the tokens that followed them.  Each entry ``A[i, j]`` that counts is computed as
``exp(q_i . k_j * scale - lse_i)``, so nothing of size ``T x T`` ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import NumericalError, StructureError
from slim_core.progress import track
from slim_core.validate import check_choice, check_int
from slim_ra.geometry import HeadGeometry, head_geometry, position_encoding
from slim_ra.lse import cap
from slim_ra.needle import NeedleSample, needle_samples, needle_score
from slim_ra.observe import Attention, observed
from slim_ra.sequences import REPEATS, RepeatedIds, repeated_ids

CHUNK = 1024  # query rows whose dot products are held at once
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda grouped: grouped.amax(-1),
    "mean": lambda grouped: grouped.mean(-1),
}


@dataclass(frozen=True)
class HeadScores:
    """Scores of the KV heads of a model.

    Attributes
    ----------
    induction, echo : Tensor
        fp32 ``[layers, kv_heads]`` in ``[0, 1]``.
    needle : Tensor or None
        fp32 ``[layers, kv_heads]``: how often a head looks at the needle token to be said next.
    candidates : tuple of int
        Layers with full attention; heads of sliding-window layers hold no long history.
    settings : dict
        How the scores were made, in plain types.
    """

    induction: Tensor
    echo: Tensor
    needle: Tensor | None = None
    candidates: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def search_heads(
    model: Any,
    tokenizer: Any | None = None,
    *,
    unit_length: int | None = None,
    repeats: int = REPEATS,
    samples: int = 1,
    batch_size: int = 1,
    seed: int = 0,
    group_reduce: str = "max",
    needles: int = 0,
) -> HeadScores:
    """Score every KV head of a decoder with rotary positions.

    Works with any attention implementation and needs about the time of one prefill a sample.

    Parameters
    ----------
    model : PreTrainedModel
        Set to eval; it is left as it was.
    tokenizer : PreTrainedTokenizerBase, optional
        For begin-of-text and special ids.
    unit_length : int, optional
        Random tokens ``P``.  Default: 2500, or what vocabulary and context allow.
    repeats : int, default 4
        Copies of the unit.
    samples, batch_size, seed : int
        Sequences to average over, how many run at once, and the seed of their draw.
    group_reduce : {"max", "mean"}
        How the query heads that share a KV head are reduced.
    needles : int, default 0
        Needle sequences for the needle score; 0 leaves it out.

    Raises
    ------
    StructureError
        A model without rotary positions, or whose attention cannot be looked into.
    NumericalError
        A score that is not finite.
    """
    check_int("repeats", repeats, low=2, high=64)
    check_int("samples", samples, low=1)
    check_int("batch_size", batch_size, low=1)
    check_int("seed", seed, low=0)
    check_int("needles", needles, low=0)
    if unit_length is not None:
        check_int("unit_length", unit_length, low=4)
    reduce = REDUCE[check_choice("group_reduce", group_reduce, REDUCE)]
    if position_encoding(model) != "rotary":
        raise StructureError(
            f"{type(model).__name__} has no rotary position encoding",
            hint="for ALiBi models search windows, not heads",
        )
    geometry = head_geometry(model.config)
    sequences = repeated_ids(
        model.config, tokenizer,
        unit_length=unit_length, repeats=repeats, samples=samples, seed=seed,
    )  # fmt: skip
    sums = _Sums(geometry, reduce)

    def observe(attention: Attention) -> None:
        sums.add(attention, *repeat_scores(attention, sequences))

    batches = torch.split(sequences.ids, batch_size)
    _run(model, batches, observe, geometry.layers, "scoring heads")
    induction, echo = sums.means(samples)
    needle = None
    if needles:
        needle = _needle_scores(model, tokenizer, needles, seed, geometry, reduce)
    settings = {
        "unit_length": sequences.unit_length, "repeats": repeats, "samples": samples,
        "seed": seed, "group_reduce": group_reduce, "needles": needles,
    }  # fmt: skip
    return HeadScores(induction, echo, needle, tuple(sorted(sums.full_layers)), settings)


def repeat_scores(attention: Attention, sequences: RepeatedIds) -> tuple[Tensor, Tensor]:
    """Induction and echo scores of one layer, each fp64 ``[B, Hq]``.

    The mean over queries ``i >= P`` of the attention to the tokens after all earlier copies
    (induction) and to the copies themselves (echo); positions count from the first unit.
    """
    unit, total = sequences.unit_length, sequences.unit_length * sequences.repeats
    shape = attention.query.shape[:2]
    induction = torch.zeros(shape, dtype=torch.float64, device=attention.query.device)
    echo = torch.zeros_like(induction)
    for back in range(unit, total, unit):
        echo += _diagonal_sum(attention, sequences.lead, back, total, back)
        induction += _diagonal_sum(attention, sequences.lead, back, total, back - 1)
    rows = total - unit
    return induction / rows, echo / rows


def _diagonal_sum(attention: Attention, lead: int, start: int, stop: int, distance: int) -> Tensor:
    """Sum ``A[i, i - distance]`` over ``start <= i < stop``, fp64 ``[B, Hq]``."""
    query, key, lse = attention.query, attention.key, attention.lse
    batch, heads = query.shape[:2]
    total = torch.zeros(batch, heads, dtype=torch.float64, device=query.device)
    if attention.window is not None and distance >= attention.window:
        return total
    for first in range(lead + start, lead + stop, CHUNK):
        last = min(first + CHUNK, lead + stop)
        rows = query[:, :, first:last].float()
        rows = rows.reshape(batch, key.shape[1], -1, *rows.shape[2:])
        there = key[:, :, None, first - distance : last - distance].float()
        logits = (rows * there).sum(-1).flatten(1, 2) * attention.scale
        total += (cap(logits, attention.softcap) - lse[:, :, first:last]).exp().sum(-1).double()
    return total


class _Sums:
    """Adds up per-layer scores, reduced to KV heads."""

    def __init__(self, geometry: HeadGeometry, reduce: Callable[[Tensor], Tensor]) -> None:
        self.geometry = geometry
        self.reduce = reduce
        self.totals: dict[int, list[Tensor]] = {}
        self.full_layers: set[int] = set()

    def add(self, attention: Attention, *scores: Tensor) -> None:
        # Some models repeat their KV heads before they attend.
        kv_heads = min(attention.key.shape[1], self.geometry.kv_heads)
        reduced = [
            self.reduce(score.reshape(len(score), kv_heads, -1)).sum(0).cpu() for score in scores
        ]
        if attention.window is None:
            self.full_layers.add(attention.layer)
        earlier = self.totals.get(attention.layer)
        self.totals[attention.layer] = (
            reduced if earlier is None else [a + b for a, b in zip(earlier, reduced, strict=True)]
        )

    def means(self, samples: int) -> list[Tensor]:
        layers = sorted(self.totals)
        if not layers or layers != list(range(self.geometry.layers)):
            raise StructureError(
                f"attention was seen in layers {layers}, not in all {self.geometry.layers}",
                hint="this model computes attention in a way that cannot be looked into",
            )
        stacked = [torch.stack(score) for score in zip(*self.totals.values(), strict=True)]
        order = torch.tensor(list(self.totals)).argsort()
        means = [(score[order] / samples).float() for score in stacked]
        for score in means:
            if not bool(score.isfinite().all()):
                bad = (~score.isfinite()).nonzero()[0].tolist()
                raise NumericalError(f"the score of layer {bad[0]}, KV head {bad[1]} is not finite")
        return means


def _needle_scores(
    model: Any,
    tokenizer: Any | None,
    needles: int,
    seed: int,
    geometry: HeadGeometry,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    samples = needle_samples(model.config, tokenizer, count=needles, seed=seed)
    sums = _Sums(geometry, reduce)
    for sample in samples:

        def observe(attention: Attention, _sample: NeedleSample = sample) -> None:
            sums.add(attention, needle_score(attention, _sample))

        _run(model, [sample.ids], observe, geometry.layers, "needles")
    return sums.means(len(samples))[0]


def _run(
    model: Any, batches: Any, observe: Callable[[Attention], None], layers: int, what: str
) -> None:
    """Run the batches through the decoder with a progress bar that counts layers."""
    batches = list(batches)
    ticks = track(range(layers * len(batches)), what)
    training = model.training
    device = model.get_input_embeddings().weight.device

    def tick(attention: Attention) -> None:
        next(ticks, None)
        observe(attention)

    model.eval()
    try:
        with observed(model, tick):
            # The body without its language-model head: logits of long inputs are large.
            body: nn.Module = getattr(model, "base_model", model)
            for ids in batches:
                body(input_ids=ids.to(device), use_cache=False)
    finally:
        model.train(training)
        for _ in ticks:
            pass
