"""What a causal language model answers: likelihoods of given continuations, or greedy text.

Prompts are tokenized as one string with their continuation.  Batches are padded on the right, which
a causal model cannot see, so the numbers do not depend on the batch size but for float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError, NumericalError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.validate import check_int, check_type
from slim_ptq.evaluate import evaluating, input_device
from slim_ptq.limits import positions

_log = get_logger("ptq")


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence to run: the likelihoods of ``ends`` after ``start`` belong to a choice each."""

    question: int
    start: tuple[int, ...]
    ends: dict[int, tuple[int, ...]]  # by number of the choice; several only if of one token

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model reads; the last token of a continuation is only predicted."""
        (first, *rest) = self.ends.values()
        return self.start if rest else self.start + first[:-1]


class Scorer:
    """A model and its tokenizer.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model, float or fake-quantized, on any device.
    tokenizer : object
        Called with a text, gives ``input_ids``.
    batch_size : int
        Sequences that run at once.

    Raises
    ------
    InvalidTypeError, InvalidValueError
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 1) -> None:
        self.model = check_type("model", model, nn.Module)
        if not callable(tokenizer):
            raise InvalidTypeError(f"tokenizer must be callable, not {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.batch_size = check_int("batch_size", batch_size, low=1)
        config = getattr(model, "config", None)
        self._longest = None if config is None else positions(config.to_dict())

    def choices(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return the log likelihood of each continuation of each prompt, in nats.

        Parameters
        ----------
        questions : sequence of (str, sequence of str)
            Prompts and their possible continuations.

        Raises
        ------
        NumericalError
            The model gives NaN.
        """
        rows = [row for index, each in enumerate(questions) for row in self._rows(index, *each)]
        rows = self._fit(rows)
        found = [[0.0] * len(choices) for _, choices in questions]
        order = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
        batches = [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]
        with evaluating(self.model), torch.no_grad():
            for batch in track(batches, "Asking"):
                for row, logits in zip(batch, self._logits(batch), strict=True):
                    for choice, value in _likelihoods(row, logits):
                        found[row.question][choice] = value
        return found

    def generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Return the greedy continuation of each prompt, at most so many tokens long.

        Prompts of one length run together, so nothing is padded.
        """
        check_int("tokens", tokens, low=1)
        encoded = [self._ids(prompt) for prompt in prompts]
        if self._longest is not None:
            room = max(self._longest - tokens, 1)
            encoded = [ids[-room:] for ids in encoded]
        answers = [""] * len(prompts)
        with evaluating(self.model), torch.no_grad():
            for batch in track(self._same_length(encoded), "Answering"):
                ids = torch.tensor([encoded[index] for index in batch], dtype=torch.long)
                ids = ids.to(input_device(self.model))
                made = self._generate(ids, tokens)[:, ids.shape[1] :]
                for index, row in zip(batch, made, strict=True):
                    answers[index] = self.tokenizer.decode(row.tolist(), skip_special_tokens=True)
        return answers

    def _generate(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        model: Any = self.model
        if not hasattr(model, "generate"):
            raise InvalidTypeError(f"{type(model).__name__} cannot generate text")
        pad = getattr(self.tokenizer, "pad_token_id", None)
        made: torch.Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
        )
        return made

    def _rows(self, index: int, prompt: str, choices: Sequence[str]) -> Iterator[_Row]:
        ends: dict[int, tuple[int, ...]] = {}
        start = self._ids(prompt)
        for number, choice in enumerate(choices):
            whole = self._ids(prompt + choice)
            # Characters on both sides of the seam may have become one token.
            same = next(
                (at for at, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b),
                min(len(start), len(whole)),
            )
            if same == len(start) and len(whole) == same + 1:
                ends[number] = whole[same:]
                continue
            cut = min(same, len(whole) - 1)
            if cut < 1:
                raise InvalidValueError(f"a prompt has no token before {choice!r}: {prompt!r:.60}")
            yield _Row(index, whole[:cut], {number: whole[cut:]})
        if ends:
            if not start:
                raise InvalidValueError("a prompt must have a token")
            yield _Row(index, start, ends)

    def _fit(self, rows: list[_Row]) -> list[_Row]:
        """Cut the beginning of sequences that have more tokens than the model has positions."""
        if self._longest is None:
            return rows
        kept, cut = [], set()
        for row in rows:
            over = len(row.tokens) - self._longest
            if over >= len(row.start):
                raise InvalidValueError(
                    f"an answer has more tokens than the {self._longest} positions of the model"
                )
            if over > 0:
                cut.add(row.question)
                row = _Row(row.question, row.start[over:], row.ends)
            kept.append(row)
        if cut:
            _log.warning(
                "%d prompts have more tokens than the %d positions of the model; "
                "their beginning was left out",
                len(cut),
                self._longest,
            )
        return kept

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, verbose=False)["input_ids"])

    def _logits(self, rows: Sequence[_Row]) -> Iterator[torch.Tensor]:
        """Yield the logits of each row, shape (tokens, vocabulary)."""
        lengths = [len(row.tokens) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : lengths[line]] = torch.tensor(row.tokens)
            mask[line, : lengths[line]] = 1
        device = input_device(self.model)
        output = self.model(ids.to(device), attention_mask=mask.to(device))
        for line, length in enumerate(lengths):
            yield output.logits[line, :length]

    def _same_length(self, encoded: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return batches of numbers of prompts that have equally many tokens."""
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(index)
        return [
            group[start : start + self.batch_size]
            for group in by_length.values()
            for start in range(0, len(group), self.batch_size)
        ]


def _likelihoods(row: _Row, logits: torch.Tensor) -> Iterator[tuple[int, float]]:
    first = len(row.start) - 1  # the logits here predict the first token of a continuation
    table = torch.log_softmax(logits[first:].float(), dim=-1).cpu().double()
    if bool(torch.isnan(table).any()):
        raise NumericalError(
            "the logits of the model are NaN",
            hint="a scale has overflowed or a weight is damaged; measure the perplexity",
        )
    for choice, end in row.ends.items():
        yield choice, float(table[: len(end)].gather(1, torch.tensor(end)[:, None]).sum())
