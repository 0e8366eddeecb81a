"""Token sequences that make retrieval heads show themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import InvalidValueError
from slim_core.logging import get_logger
from slim_ra.geometry import text_config

UNIT_LENGTH = 2500  # random tokens, and how often they are repeated: the published setting
REPEATS = 4
_MIN_UNIT = 4
_log = get_logger("ra")


@dataclass(frozen=True)
class RepeatedIds:
    """Random tokens repeated several times.

    Attributes
    ----------
    ids : Tensor
        int64 ``[N, lead + unit_length * repeats]``.
    unit_length, repeats : int
    lead : int
        Tokens before the first unit: 1 with a begin-of-text token, else 0.
    """

    ids: Tensor
    unit_length: int
    repeats: int
    lead: int


def repeated_ids(
    config: Any,
    tokenizer: Any | None = None,
    *,
    unit_length: int | None = None,
    repeats: int = REPEATS,
    samples: int = 1,
    seed: int = 0,
) -> RepeatedIds:
    """Draw ids without replacement from the vocabulary, special ids left out, and repeat them.

    Parameters
    ----------
    config : PretrainedConfig
        For the vocabulary, the context length, and the ids of special tokens.
    tokenizer : PreTrainedTokenizerBase, optional
        For its begin-of-text and special ids.
    unit_length : int, optional
        Distinct tokens.  Default: 2500, or what the vocabulary and the context allow.
    repeats, samples, seed : int
        Copies of the unit, sequences, and seed of the draw.

    Raises
    ------
    InvalidValueError
        The vocabulary or the context is too small for ``unit_length``.
    """
    config = text_config(config)
    usable = usable_ids(config, tokenizer)
    first = begin_id(config, tokenizer)
    lead = 0 if first is None else 1
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", 0)
    room = (context - lead) // repeats if context else UNIT_LENGTH
    largest = min(len(usable), room)
    if largest < _MIN_UNIT:
        raise InvalidValueError(
            f"a vocabulary of {len(usable)} usable ids and a context of {context} tokens leave no "
            f"room for {repeats} copies of {_MIN_UNIT} distinct tokens"
        )
    if unit_length is None:
        unit_length = min(UNIT_LENGTH, largest)
        if unit_length < UNIT_LENGTH:
            _log.warning(
                "unit_length is %d, not %d: %d usable ids, context of %s tokens",
                unit_length,
                UNIT_LENGTH,
                len(usable),
                context or "unknown",
            )
    elif unit_length > len(usable):
        raise InvalidValueError(
            f"unit_length must be at most {len(usable)} (usable ids), not {unit_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        order = torch.randperm(len(usable), generator=generator)[:unit_length]
        row = usable[order].repeat(repeats)
        rows.append(row if first is None else torch.cat([torch.tensor([first]), row]))
    return RepeatedIds(torch.stack(rows), unit_length, repeats, lead)


def begin_id(config: Any, tokenizer: Any | None) -> int | None:
    """Return the id that starts a text, or None."""
    begin = getattr(config, "bos_token_id", None)
    if tokenizer is not None:
        begin = tokenizer.bos_token_id
        if begin is None:
            begin = (tokenizer("")["input_ids"] or tokenizer("A")["input_ids"] or [None])[-1]
    return begin if isinstance(begin, int) and 0 <= begin < config.vocab_size else None


def usable_ids(config: Any, tokenizer: Any | None = None) -> Tensor:
    """Return the ids of the vocabulary that are not special, int64 ``[n]``."""
    config = text_config(config)
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    keep = torch.ones(size, dtype=torch.bool)
    keep[[i for i in special if isinstance(i, int) and 0 <= i < size]] = False
    return keep.nonzero().flatten()
