"""The tensors of a checkpoint that tell how attention and its key-value cache are quantized.

``C8`` (int8 cache): ``<linear>.kv_cache_scale`` and ``.kv_cache_offset``, float32, shape
(cached channels,), for the linear layer of the keys and that of the values; where one layer gives
both, ``<linear>.k_proj.kv_cache_scale`` and so on.  The scales of keys are those after the rotary
embedding if the metadata of the description has :data:`AFTER_ROTARY`.

``FAQuant`` (int8 queries, keys and values): ``<attention>.fa_q.scale``, float32, and
``.fa_q.offset``, int8, shape (heads, 1); likewise ``fa_k`` and ``fa_v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slim_core.errors import FormatError

C8 = "C8"
FA_QUANT = "FAQuant"
ATTENTION_TYPES = frozenset({C8, FA_QUANT})

# What the description of a model says as a whole; readers look for either of the first two.
C8_KEYS = {"kv_cache_type": C8, "kv_quant_type": C8}
FA_QUANT_KEYS = {"fa_quant_type": FA_QUANT}

AFTER_ROTARY = "kv_cache_after_rotary"  # key in the metadata of a description

PARTS = ("fa_q", "fa_k", "fa_v")
_CACHE_SCALE, _CACHE_OFFSET = ".kv_cache_scale", ".kv_cache_offset"

Params = tuple[np.ndarray, np.ndarray]
Load = Callable[[str], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class StoredAttention:
    """What a checkpoint holds of quantized attention.

    Parameters
    ----------
    caches : dict
        Scale and offset by the name before ``.kv_cache_scale``.
    attentions : dict
        Scale and offset of ``fa_q``, ``fa_k`` and ``fa_v`` by the name of the attention module.
    """

    caches: dict[str, Params]
    attentions: dict[str, dict[str, Params]]


def attention_tensors(description: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of all tensors of quantized attention and caches."""
    headers = C8_KEYS.keys() | FA_QUANT_KEYS.keys()
    return frozenset(
        name
        for name, kind in description.items()
        if isinstance(kind, str) and kind in ATTENTION_TYPES and name not in headers
    )


def announcements(kinds: Iterable[str]) -> dict[str, str]:
    """Return what the description of a model with tensors of these types says as a whole."""
    found = set(kinds)
    return (C8_KEYS if C8 in found else {}) | (FA_QUANT_KEYS if FA_QUANT in found else {})


def read_attention(description: Mapping[str, Any], load: Load) -> StoredAttention:
    """Read and check the parameters of quantized attention and caches.

    Parameters
    ----------
    load : callable
        Returns a tensor by name; raises KeyError or a SlimError if it is not stored.

    Raises
    ------
    FormatError
        A tensor is missing, has the wrong shape or type, or a scale that is not positive.
    """
    names = attention_tensors(description)
    caches: dict[str, Params] = {}
    attentions: dict[str, dict[str, Params]] = {}
    for name in sorted(names):
        if name.endswith(_CACHE_SCALE):
            owner = name.removesuffix(_CACHE_SCALE)
            caches[owner] = _pair(name, f"{owner}{_CACHE_OFFSET}", names, load, ndim=1)
        elif name.endswith(".scale"):
            owner, _, part = name.removesuffix(".scale").rpartition(".")
            if part in PARTS:
                pair = _pair(name, f"{owner}.{part}.offset", names, load, ndim=2)
                attentions.setdefault(owner, {})[part] = pair
    lost = [name for name, parts in attentions.items() if len(parts) != len(PARTS)]
    if lost:
        raise FormatError(
            f"{lost[0]} must have {', '.join(PARTS)}, not {list(attentions[lost[0]])}"
        )
    _check_headers(description, bool(caches), bool(attentions))
    return StoredAttention(caches, attentions)


def _pair(
    scale_name: str, offset_name: str, described: frozenset[str], load: Load, *, ndim: int
) -> Params:
    if offset_name not in described:
        raise FormatError(f"{scale_name} is described and {offset_name} is not")
    try:
        scale, offset = load(scale_name), load(offset_name)
    except KeyError as error:
        raise FormatError(f"{error.args[0]} is described and not stored") from error
    scale = scale.astype(np.float32)
    if scale.ndim != ndim or scale.shape != offset.shape:
        raise FormatError(
            f"{scale_name} of shape {scale.shape} and its offset of shape {offset.shape} must have "
            f"{ndim} dimensions and the same shape"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise FormatError(f"{scale_name} has elements that are not positive and finite")
    return scale, offset.astype(np.float32)


def _check_headers(description: Mapping[str, Any], caches: bool, attentions: bool) -> None:
    """Require that what is stored is what the description announces."""
    announced = {C8: caches, FA_QUANT: attentions}
    for key, kind in (C8_KEYS | FA_QUANT_KEYS).items():
        if announced[kind] and description.get(key) != kind:
            raise FormatError(f"the description has {kind} tensors and no {key} {kind!r}")
        if not announced[kind] and description.get(key) == kind:
            raise FormatError(f"the description has {key} {kind!r} and no {kind} tensor")
