"""Read text files and cut them into windows of tokens."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import CalibrationError, InvalidValueError
from slim_core.files import PathLike, check_input_file
from slim_core.validate import check_int

MAX_BYTES = 1 << 30
_KEYS = ("text", "inputs_pretokenized")


def read_texts(path: PathLike) -> list[str]:
    """Return the texts of a file.

    Parameters
    ----------
    path : path
        ``.jsonl``: one JSON object a line with the key ``text`` or ``inputs_pretokenized``.
        Anything else is one text in UTF-8.

    Raises
    ------
    InvalidValueError
        A line is not such an object, naming it.
    CalibrationError
        There is no text.
    """
    file = check_input_file(path, max_bytes=MAX_BYTES)
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        texts = [content] if content.strip() else []
    else:
        lines = enumerate(content.splitlines(), start=1)
        texts = [_text(str(file), number, line) for number, line in lines if line.strip()]
    if not texts:
        raise CalibrationError(f"{file} holds no text")
    return texts


def token_windows(
    tokenizer: Any, path: PathLike, *, length: int, samples: int | None, batch: int = 8
) -> list[dict[str, Tensor]]:
    """Return batches of windows of consecutive tokens.

    Parameters
    ----------
    tokenizer : tokenizer of transformers
        Called on each text.
    path : path
        As for :func:`read_texts`; the texts are joined.
    length : int
        Tokens in a window, at least 2; what does not fill one is dropped.
    samples : int or None
        How many windows at most.
    batch : int
        Windows in a batch.

    Returns
    -------
    list of dict
        ``input_ids`` and ``labels``, the same int64 tensor ``(<= batch, length)``.

    Raises
    ------
    CalibrationError
        The text does not fill one window.
    """
    check_int("length", length, low=2)
    ids = [token for text in read_texts(path) for token in tokenizer(text)["input_ids"]]
    count = len(ids) // length
    if count == 0:
        raise CalibrationError(
            f"{path} has {len(ids)} tokens, too few for a window of {length}",
            hint="give more text or a smaller --length",
        )
    count = count if samples is None else min(count, samples)
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": part, "labels": part} for part in rows.split(batch)]  # type: ignore[no-untyped-call]


def _text(file: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidValueError(f"{file}, line {number}: not JSON: {error}") from error
    found = [value[key] for key in _KEYS if key in value] if isinstance(value, dict) else []
    if not found or not isinstance(found[0], str):
        raise InvalidValueError(f"{file}, line {number}: no str under {' or '.join(_KEYS)}")
    return str(found[0])
