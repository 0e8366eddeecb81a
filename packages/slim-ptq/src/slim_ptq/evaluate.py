"""Perplexity of a language model on a text.

The text is cut into windows that do not overlap and each window is scored alone, so that every
token but the first of a window is predicted from at most ``window - 1`` tokens before it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slim_core.errors import InvalidTypeError, InvalidValueError, NumericalError
from slim_core.files import PathLike, check_input_file
from slim_core.progress import track
from slim_core.validate import check_int, check_type

_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity, and on how much text it was measured.

    Parameters
    ----------
    value : float
        ``exp`` of the mean negative log likelihood of the predicted tokens.
    tokens : int
        Number of predicted tokens; the first token of a window is given.
    windows : int
    """

    value: float
    tokens: int
    windows: int


def read_text(path: PathLike) -> str:
    """Return the text of a UTF-8 file; every end of line becomes a single line feed.

    Raises
    ------
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    InvalidValueError
        The file is empty or not UTF-8.
    """
    file = check_input_file(path, max_bytes=_MAX_BYTES)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{file} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidValueError(f"{file} holds no text")
    return text


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the token ids of a text, int64, shape (tokens,), without special tokens."""
    check_type("text", text, str)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def perplexity(
    model: Callable[..., Any],
    token_ids: torch.Tensor | Sequence[int],
    *,
    window: int = 512,
    batch_size: int = 4,
) -> Perplexity:
    """Return the perplexity of a model on a sequence of tokens.

    Parameters
    ----------
    model : callable
        A Hugging Face causal language model, or any function from token ids of shape
        (batch, length) to logits of shape (batch, length, vocabulary).  A module is put into
        evaluation mode for the time of the call.
    token_ids : tensor or sequence of int, shape (tokens,) or (1, tokens)
    window : int
        Tokens scored together.  The last window holds the rest and may be shorter.
    batch_size : int
        Windows in one forward pass; the result depends on it by float rounding only.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Fewer than two tokens, a token outside the vocabulary, or a window longer than the model
        takes.
    NumericalError
        A window whose logits are NaN or give a token no probability.

    Notes
    -----
    Likelihoods are computed in float32 from the logits and summed in float64 over all tokens, so
    that short windows do not weigh more than long ones.
    """
    check_int("batch_size", batch_size, low=1)
    check_int("window", window, low=2)
    ids = _check_tokens(token_ids)
    _check_model_limits(model, ids, window)
    windows = [part for part in torch.split(ids, window) if len(part) > 1]
    total, tokens, done = 0.0, 0, 0
    with evaluating(model), torch.no_grad():
        for batch in track(_batches(windows, batch_size), "perplexity"):
            losses = _token_losses(_forward(model, batch), batch)
            _check_finite(losses, done, window)
            total += float(losses.sum())
            tokens += losses.numel()
            done += len(batch)
    mean = total / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, len(windows))


def _check_tokens(token_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"token_ids must be a sequence of int: {error}") from error
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InvalidValueError(f"token_ids must have one axis, not shape {tuple(ids.shape)}")
    if len(ids) < 2:
        raise InvalidValueError(f"token_ids must hold at least 2 tokens, not {len(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidTypeError(f"token_ids must be integers, not {ids.dtype}")
    if int(ids.min()) < 0:
        raise InvalidValueError(f"token_ids must be at least 0, not {int(ids.min())}")
    return ids.to(torch.int64)


def _check_model_limits(model: Callable[..., Any], ids: torch.Tensor, window: int) -> None:
    """Compare with the limits in the configuration of a Hugging Face model."""
    config = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise InvalidValueError(
            f"window must be at most {longest} (max_position_embeddings of the model), not {window}"
        )
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise InvalidValueError(
            f"token_ids must be below {vocabulary} (vocabulary of the model), not {int(ids.max())}",
            hint="the tokenizer belongs to another model",
        )


@contextlib.contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Switch every module to evaluation mode, and those that were training back."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(windows: list[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
    """Stack windows of equal length; the shorter last one goes alone."""
    whole = [part for part in windows if len(part) == len(windows[0])]
    rest = windows[len(whole) :]
    starts = range(0, len(whole), batch_size)
    batches = [torch.stack(whole[start : start + batch_size]) for start in starts]
    return batches + [part[None] for part in rest]


def _forward(model: Callable[..., Any], batch: torch.Tensor) -> torch.Tensor:
    """Return the logits, shape (batch, length, vocabulary), on the device of the model."""
    options: dict[str, Any] = {}
    if isinstance(model, torch.nn.Module):
        batch = batch.to(input_device(model))
        if "use_cache" in inspect.signature(model.forward).parameters:
            options["use_cache"] = False
    output = model(batch, **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != batch.shape:
        shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise InvalidValueError(
            f"the model must return logits of shape {(*batch.shape, 'vocabulary')}, not {shape}"
        )
    return logits


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device that takes the input: that of the first parameter that has one."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _token_losses(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Return negative log likelihoods, float64 on the CPU, shape (batch, length - 1)."""
    targets = batch.to(logits.device)[:, 1:]
    # One window at a time: float32 logits of a batch over a large vocabulary take gigabytes.
    losses = [
        torch.nn.functional.cross_entropy(one[:-1].float(), target, reduction="none")
        for one, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).cpu().double()


def _check_finite(losses: torch.Tensor, first: int, window: int) -> None:
    bad = ~torch.isfinite(losses).all(dim=1)
    if bool(bad.any()):
        index = first + int(bad.nonzero()[0])
        raise NumericalError(
            f"the logits of window {index} (tokens {index * window} and on) are not finite",
            hint="a scale has overflowed or a weight is damaged; look at the layers with the "
            "largest errors in the report",
        )
