"""Continuing token ids with a network that has ``decode`` and ``new_cache``."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.validate import check_float, check_int, check_type
from slim_mindspore.framework import Tensor, ms
from slim_mindspore.modes import pynative


def generate(
    network: Any,
    input_ids: Any,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continue sequences of token ids.

    Parameters
    ----------
    network : Cell
        With ``decode(ids, cache)`` and ``new_cache()``, such as
        :class:`slim_mindspore.llama.LlamaForCausalLM`; run in PyNative mode.
    input_ids : array_like of int, shape (batch, length) or (length,)
        Sequences of one length.
    max_new_tokens, max_length : int, optional
        How many tokens to add, or how long the result is at most; by default 20 new ones.
    do_sample : bool
        Sample from the distribution; the most likely token otherwise.
    top_k, top_p, temperature, seed
        Of the sampling: keep the k most likely (0: all), keep the most likely that make up
        ``top_p``, divide the logits, start of the random numbers.

    Returns
    -------
    numpy.ndarray, int64, shape (batch, length + new)
        A sequence that met ``eos_token_id`` is filled up with it.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        An argument is wrong, or the sequence would not fit the network.
    """
    tokens = as_ids("input_ids", input_ids)
    count = _count(tokens.shape[1], max_new_tokens, max_length)
    check_type("do_sample", do_sample, bool)
    check_int("top_k", top_k, low=0)
    check_float("top_p", top_p, low=0.0, high=1.0)
    if check_float("temperature", temperature, low=0.0) == 0.0:
        raise InvalidValueError("temperature must be above 0; do_sample=False takes the best token")
    vocab, eos = network.config.vocab_size, network.config.eos_token_id
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise InvalidValueError(f"input_ids must lie in [0, {vocab - 1}]")
    cache = network.new_cache()
    cache.check_room(tokens.shape[1] + count - 1)
    random = np.random.default_rng(seed)
    done = np.zeros(len(tokens), bool)
    step = tokens
    with pynative():
        for _ in range(count):
            logits = network.decode(Tensor(step.astype(np.int32), ms.int32), cache)
            last = logits[:, -1].asnumpy().astype(np.float64)
            if do_sample:
                new = _sample(last / temperature, top_k, top_p, random)
            else:
                new = last.argmax(axis=-1)
            if eos is not None:
                new = np.where(done, eos, new)
                done |= new == eos
            step = new[:, None]
            tokens = np.concatenate([tokens, step], axis=1)
            if done.all():
                break
    return tokens


def as_ids(name: str, ids: Any) -> np.ndarray:
    """Return token ids as int64 of shape (batch, length).

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Not integers, empty, or not of one length.
    """
    try:
        array = ids.asnumpy() if isinstance(ids, Tensor) else np.asarray(ids)
    except ValueError as error:
        raise InvalidValueError(f"{name} must be sequences of one length") from error
    if array.dtype.kind not in "iu":
        raise InvalidTypeError(f"{name} must be integers, not {array.dtype}")
    array = array.reshape(-1, array.shape[-1]) if array.ndim else array
    if array.ndim != 2 or array.size == 0:
        raise InvalidValueError(f"{name} must have shape (batch, length), not {array.shape}")
    return array.astype(np.int64)


def _count(length: int, max_new_tokens: int | None, max_length: int | None) -> int:
    if max_new_tokens is not None:
        return check_int("max_new_tokens", max_new_tokens, low=1)
    if max_length is None:
        return 20
    return check_int("max_length", max_length, low=length + 1) - length


def _sample(
    logits: np.ndarray, top_k: int, top_p: float, random: np.random.Generator
) -> np.ndarray:
    """Draw one token for each row of logits."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1)
    weight = np.exp(ranked - ranked[:, :1])
    if top_k:
        weight[:, top_k:] = 0.0
    weight /= weight.sum(axis=-1, keepdims=True)
    before = np.cumsum(weight, axis=-1) - weight
    weight = np.where((before < top_p) | (np.arange(weight.shape[1]) == 0), weight, 0.0)
    weight /= weight.sum(axis=-1, keepdims=True)
    picks = [random.choice(weight.shape[1], p=row) for row in weight]
    return np.take_along_axis(order, np.asarray(picks)[:, None], axis=-1)[:, 0]
