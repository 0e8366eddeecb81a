"""How much a compressed cache forgets: passkeys and decode-phase perplexity, over bytes held.

Everything is measured on tokens that are decoded *after* the cache was cut; attention within the
prompt is exact and would hide the loss.  Positions are handed to the model explicitly, so caches
that do not report their true length are treated fairly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from slim_core.errors import CalibrationError, NumericalError
from slim_core.progress import track
from slim_ra.arguments import cache_argument
from slim_ra.cache import RazorCache
from slim_ra.geometry import text_config
from slim_ra.sequences import begin_id, usable_ids

Prefill = Callable[[Any, Tensor], tuple[Any, Tensor]]
"""Feeds ids ``[1, T]`` and returns the cache and the logits ``[1, vocabulary]`` of the last one."""


@dataclass(frozen=True)
class Retrieval:
    """Result of :func:`passkey_accuracy`.

    Attributes
    ----------
    accuracy : float
        Share of answer tokens that the model holds most likely.
    nbytes, full_nbytes : int
        Largest storage that the cache held at the end of a sample, and that of the full cache.
    """

    accuracy: float
    nbytes: int
    full_nbytes: int

    @property
    def ratio(self) -> float:
        """Share of the full cache's bytes."""
        return self.nbytes / self.full_nbytes


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`decode_perplexity`.

    Attributes
    ----------
    perplexity : float
    divergence : float
        Mean KL divergence, in nats, from the full cache's prediction to this one's.
    agreement : float
        Share of tokens whose most likely next token is the same as with the full cache.
    nbytes, full_nbytes : int
    """

    perplexity: float
    divergence: float
    agreement: float
    nbytes: int
    full_nbytes: int

    @property
    def ratio(self) -> float:
        """Share of the full cache's bytes."""
        return self.nbytes / self.full_nbytes


def with_cache(new_cache: Callable[[], Any]) -> Prefill:
    """Return a prefill that feeds the prompt to a fresh cache."""

    def prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor]:
        cache = new_cache()
        return cache, feed(model, ids, cache, 0)[:, -1]

    return prefill


def full_cache(model: Any) -> Prefill:
    """Return a prefill with the full cache."""
    return with_cache(lambda: DynamicCache(config=model.config))


def feed(model: Any, ids: Tensor, cache: Any, start: int) -> Tensor:
    """Feed ids ``[1, T]`` at positions ``start ..`` and return their logits."""
    kwargs = {cache_argument(model): cache}
    if _takes_positions(model):
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        kwargs["position_ids"] = places[None]
    logits: Tensor = model(ids, use_cache=True, **kwargs).logits
    if not bool(logits[:, -1].isfinite().all()):
        raise NumericalError(f"logits at position {start + ids.shape[1] - 1} are not finite")
    return logits


def held_bytes(cache: Any) -> int:
    """Bytes of the storage of all tensors that a cache holds."""
    if isinstance(cache, RazorCache):
        return cache.allocated_nbytes()
    storages = {}
    for layer in cache.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class Passkey:
    """A text with a passkey in it, and the cue that asks for it.

    Attributes
    ----------
    context, cue, answer : Tensor
        int64 ids ``[1, n]``.
    """

    context: Tensor
    cue: Tensor
    answer: Tensor


def passkeys(
    config: Any,
    tokenizer: Any | None = None,
    *,
    length: int,
    samples: int = 8,
    answer: int = 16,
    cue: int = 4,
    seed: int = 0,
) -> list[Passkey]:
    """Make random texts whose parts at evenly spread depths are asked for by their first tokens.

    Raises
    ------
    CalibrationError
        ``length`` is too short for cue and answer.
    """
    if length < 4 * (answer + cue):
        raise CalibrationError(
            f"length must be at least {4 * (answer + cue)} for an answer of {answer} tokens and a "
            f"cue of {cue}, not {length}"
        )
    usable = usable_ids(config, tokenizer)
    first = begin_id(text_config(config), tokenizer)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(samples):
        text = usable[torch.randint(len(usable), (length,), generator=generator)]
        at = round((index + 0.5) / samples * (length // 2))  # deep enough to be out of a window
        lead = torch.tensor([] if first is None else [first], dtype=torch.int64)
        made.append(
            Passkey(
                torch.cat([lead, text])[None],
                text[None, at : at + cue],
                text[None, at + cue : at + cue + answer],
            )
        )
    return made


@torch.inference_mode()
def passkey_accuracy(
    model: Any,
    samples: Sequence[Passkey],
    prefill: Prefill,
    *,
    aware: bool = False,
    forced: bool = True,
) -> Retrieval:
    """Ask for passkeys and count the tokens said right.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode, and enabled if the prefill uses a RazorCache.
    samples : sequence of Passkey
    prefill : callable
        How the prompt is fed, and with which cache.
    aware : bool
        The cue is part of what is compressed; otherwise it comes after.
    forced : bool
        Feed the right answer whatever was said, so that one slip counts once; otherwise the model
        goes on from what it said.
    """
    device = model.get_input_embeddings().weight.device
    right = total = held = full = 0
    for sample in track(list(samples), "passkeys"):
        context, cue = sample.context.to(device), sample.cue.to(device)
        prompt = torch.cat([context, cue], 1) if aware else context
        cache, logits = prefill(model, prompt)
        seen = prompt.shape[1]
        if not aware:
            logits = feed(model, cue, cache, seen)[:, -1]
            seen += cue.shape[1]
        for expected in sample.answer[0].tolist():
            said = logits.argmax(-1)
            right += int(said) == expected
            total += 1
            fed = torch.full_like(said, expected) if forced else said
            logits = feed(model, fed[:, None], cache, seen)[:, -1]
            seen += 1
        held = max(held, held_bytes(cache))
        full = max(full, _full_bytes(model, cache, seen))
    return Retrieval(right / total, held, full)


@torch.inference_mode()
def decode_perplexity(
    model: Any,
    texts: Sequence[Tensor],
    prefill: Prefill,
    *,
    prompt: int,
    reference: Sequence[Tensor] | None = None,
) -> Perplexity:
    """Perplexity of the tokens after a prompt, fed one by one.

    Parameters
    ----------
    model : PreTrainedModel
    texts : sequence of Tensor
        int64 ids ``[1, T]`` with ``T > prompt + 1``.
    prefill : callable
    prompt : int
        Tokens that are fed at once, and then compressed.
    reference : sequence of Tensor, optional
        What :func:`full_logits` returns for the same texts; computed if not given.

    Raises
    ------
    CalibrationError
        A text is too short.
    """
    if not texts or any(text.shape[1] < prompt + 2 for text in texts):
        raise CalibrationError(f"texts need at least {prompt + 2} tokens")
    if reference is None:
        reference = full_logits(model, texts, prompt=prompt)
    device = model.get_input_embeddings().weight.device
    loss = divergence = agreement = 0.0
    count = held = full = 0
    for text, expected in track(list(zip(texts, reference, strict=True)), "perplexity"):
        ids = text.to(device)
        logits, cache = _decoded(model, ids, prefill, prompt)
        target = ids[0, prompt:]
        loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        own, wanted = logits.log_softmax(-1), expected.log_softmax(-1)
        divergence += float((wanted.exp() * (wanted - own)).sum())
        agreement += float((own.argmax(-1) == wanted.argmax(-1)).sum())
        count += len(target)
        held = max(held, held_bytes(cache))
        full = max(full, _full_bytes(model, cache, ids.shape[1]))
    return Perplexity(math.exp(loss / count), divergence / count, agreement / count, held, full)


@torch.inference_mode()
def full_logits(model: Any, texts: Sequence[Tensor], *, prompt: int) -> list[Tensor]:
    """Logits of the full cache for the tokens after each prompt, fp32 ``[n, vocabulary]``."""
    device = model.get_input_embeddings().weight.device
    prefill = full_cache(model)
    return [
        _decoded(model, text.to(device), prefill, prompt)[0] for text in track(list(texts), "full")
    ]


def _decoded(model: Any, ids: Tensor, prefill: Prefill, prompt: int) -> tuple[Tensor, Any]:
    """Logits that predict ids ``prompt ..``, fp32 ``[n, vocabulary]``, and the cache."""
    cache, logits = prefill(model, ids[:, :prompt])
    rows = [logits]
    for at in range(prompt, ids.shape[1] - 1):
        rows.append(feed(model, ids[:, at : at + 1], cache, at)[:, -1])
    return torch.cat(rows).float(), cache


def _full_bytes(model: Any, cache: Any, tokens: int) -> int:
    """Bytes that a full cache of this model holds after so many tokens."""
    layers = cache.layers
    if isinstance(cache, RazorCache):
        geometry = cache.policy.geometry
        store = cache.razor_layers[0].stores[0]
        width = store.keys.shape[3] + store.values.shape[3]
        return width * store.keys.element_size() * geometry.layers * geometry.kv_heads * tokens
    size: int = sum(
        layer.keys.shape[:2].numel()
        * (layer.keys.shape[3] + layer.values.shape[3])
        * layer.keys.element_size()
        for layer in layers
    )
    return size * tokens


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
