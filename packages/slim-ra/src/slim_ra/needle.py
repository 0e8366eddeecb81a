"""Needle score: how often a head looks at the very token the model has to say next.

Retrieval heads in the sense of Wu et al. (2024), who count copies during generation.  Here the
answer is forced: a random key and its value (the needle) stand somewhere in a haystack of random
tokens, the key is repeated at the end, and for each value token the head scores one if its largest
attention falls on that token in the needle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import InvalidValueError
from slim_ra.geometry import text_config
from slim_ra.lse import dots
from slim_ra.observe import Attention
from slim_ra.sequences import begin_id, usable_ids

NEEDLE_LENGTH = 16  # tokens of the needle; a quarter of it is the key
HAYSTACK = 1024


@dataclass(frozen=True)
class NeedleSample:
    """One haystack with a needle, and the needle again at its end.

    Attributes
    ----------
    ids : Tensor
        int64 ``[1, T]``.
    start : int
        Where the needle stands.
    length, key_length : int
        Tokens of the needle, and how many of them are its key.
    """

    ids: Tensor
    start: int
    length: int
    key_length: int


def needle_samples(
    config: Any, tokenizer: Any | None = None, *, count: int, seed: int = 0,
    length: int = NEEDLE_LENGTH,
) -> list[NeedleSample]:  # fmt: skip
    """Make ``count`` samples with needles at evenly spread depths.

    Raises
    ------
    InvalidValueError
        The vocabulary or context cannot hold a needle and a haystack.
    """
    context = getattr(text_config(config), "max_position_embeddings", None) or HAYSTACK
    haystack = min(HAYSTACK, context - 2 * length - 2)
    if haystack < 4 * length:
        raise InvalidValueError(f"a context of {context} tokens is too short for a needle search")
    usable = usable_ids(config, tokenizer)
    if len(usable) < 2 * length:
        raise InvalidValueError(f"{len(usable)} usable ids are too few for a needle of {length}")
    first = begin_id(text_config(config), tokenizer)
    lead = torch.tensor([] if first is None else [first], dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        # The haystack reuses its tokens when the vocabulary is small; the needle never does.
        pool = usable[torch.randperm(len(usable), generator=generator)]
        needle, rest = pool[:length], pool[length:]
        hay = rest[torch.randint(len(rest), (haystack,), generator=generator)]
        start = len(lead) + round((index + 0.5) / count * (haystack - 1))
        ids = torch.cat([lead, hay])
        ids = torch.cat([ids[:start], needle, ids[start:], needle])
        samples.append(NeedleSample(ids[None], start, length, max(1, length // 4)))
    return samples


def needle_score(attention: Attention, sample: NeedleSample) -> Tensor:
    """Share of value tokens at which a head looks first, fp64 ``[1, Hq]``."""
    total = sample.ids.shape[1]
    # The query that has to say value token j is the token before it, at the end.
    said = torch.arange(sample.key_length, sample.length, device=attention.query.device)
    rows = total - sample.length + said - 1
    logits = dots(attention.query[:, :, rows], attention.key, attention.scale, attention.softcap)
    columns = torch.arange(total, device=logits.device)
    hidden = columns > rows[:, None]
    if attention.window is not None:
        hidden |= columns <= rows[:, None] - attention.window
    hit = logits.masked_fill(hidden, -torch.inf).argmax(-1) == sample.start + said
    return hit.double().mean(-1)
