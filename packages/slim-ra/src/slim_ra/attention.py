"""The attention and mask functions that transformers calls for models with a RazorCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slim_core.errors import StructureError
from slim_ra.layer import RazorLayer
from slim_ra.lse import attention_lse, with_sink
from slim_ra.padding import left_padding

NAME = "slim_ra"


def razor_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through the layer that marked ``key``; exact attention without such a mark.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, Hq, T, D]`` and ``[B, Hkv, T, D]``.
    attention_mask : Tensor or None
        What :func:`razor_mask` made: None, or bool ``[B, columns]``; for sliding-window layers
        the usual four-dimensional one.

    Returns
    -------
    output : Tensor
        ``[B, T, Hq, Dv]``.
    """
    if kwargs.get("position_bias") is not None:
        raise StructureError(f"{type(module).__name__} adds a position bias, which is unsupported")
    if kwargs.get("output_attentions"):
        raise StructureError("output_attentions needs whole attention matrices; they never exist")
    if dropout:
        raise StructureError("attention dropout is unsupported: call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sink = kwargs.get("softcap"), kwargs.get("s_aux")
    layer = take_layer(key)
    if layer is not None:
        if not getattr(module, "is_causal", True):
            raise StructureError(f"{type(module).__name__} is not causal")
        pads = _padding(attention_mask, layer.seen)
        output = layer.attend(query, scale=scale, pads=pads, softcap=softcap, sink=sink)
    else:
        window = kwargs.get("sliding_window")
        output = _exact(query, key, value, attention_mask, scale, window, softcap, sink)
    return output.transpose(1, 2).contiguous(), None


def take_layer(key: Tensor) -> RazorLayer | None:
    """Return the layer that ``update`` marked these keys with, and take the mark off."""
    layer = getattr(key, "slim_ra_layer", None)
    if not isinstance(layer, RazorLayer):
        return None
    del key.slim_ra_layer  # type: ignore[attr-defined]
    return layer


def razor_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function: None without padding, else the bool mask ``[B, columns]`` as it came.

    Layers with a local window get the usual mask, which their exact attention needs.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    if kwargs.get("local_size") is not None:
        local: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
        return local
    rule = kwargs.get("mask_function", causal_mask_function)
    if rule is not causal_mask_function or kwargs.get("use_vmap"):
        raise StructureError("masks other than causal ones with left padding are unsupported")
    mask = kwargs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    return torch.as_tensor(mask).bool()


def _padding(mask: Tensor | None, seen: int) -> Tensor | None:
    """Left padding of the first tokens; later ones must be real."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise StructureError("masks of four dimensions are unsupported with a RazorCache")
    if seen:
        if not bool(mask[:, seen:].all()):
            raise StructureError("padding is only allowed at the left of the first tokens")
        return None
    return left_padding(mask)


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    bias = None
    if mask is not None:
        seen = _four_dimensional(mask, rows, columns)
        if seen.dtype == torch.bool:
            bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
        else:
            bias = seen.float()
    # A mask that came along is complete; without one the layer is causal, within its window.
    tight = window if mask is None and window is not None and window < columns else None
    output, lse = attention_lse(
        query, key, value,
        scale=scale, causal=mask is None, bias=bias, window=tight, softcap=softcap,
    )  # fmt: skip
    return with_sink(output, lse, sink)[0].to(query.dtype)


def _four_dimensional(mask: Tensor, rows: int, columns: int) -> Tensor:
    if mask.ndim == 4:
        return mask[..., :columns]
    places = torch.arange(columns, device=mask.device)
    causal = places <= places[columns - rows :, None]
    return causal & mask[:, None, None, :columns]
