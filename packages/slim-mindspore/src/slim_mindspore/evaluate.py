"""Perplexity and comparison of logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.errors import InvalidValueError
from slim_core.validate import check_int
from slim_mindspore.framework import Tensor, ms


def perplexity(network: Any, ids: Any, *, window: int = 512, batch: int = 1) -> float:
    """Return the perplexity of a token sequence in windows that do not overlap.

    Parameters
    ----------
    network : Cell
        Maps int32 ids (batch, length) to logits (batch, length, vocabulary).
    ids : array_like of int, shape (tokens,)
        The rest that fills no window is left out.
    window, batch : int
        Tokens a window; windows run at a time.

    Raises
    ------
    InvalidValueError
        There are fewer tokens than a window.
    """
    check_int("window", window, low=2)
    tokens = np.asarray(ids).reshape(-1)
    count = len(tokens) // window
    if count == 0:
        raise InvalidValueError(f"{len(tokens)} tokens do not fill a window of {window}")
    rows = tokens[: count * window].reshape(count, window).astype(np.int32)
    total = 0.0
    for start in range(0, count, batch):
        part = rows[start : start + batch]
        logits = network(Tensor(part, ms.int32)).asnumpy()[:, :-1].astype(np.float64)
        total += float(-_log_likelihood(logits, part[:, 1:]).sum())
    return float(np.exp(total / (count * (window - 1))))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ``||found - expected|| / ||expected||`` over all elements."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the log-probability of each target, for logits with one more axis."""
    peak = logits.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[..., 0]
    hit = np.take_along_axis(logits, targets[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.asarray(hit - norm)
