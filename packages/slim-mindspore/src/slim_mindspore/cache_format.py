"""Tensors of an int8 cache with fixed scales, as Golden Stick and the engines of Ascend name them.

Golden Stick keeps, below ``<attention>.paged_attention_mgr.quant_pa.``, the scales of keys and
values together (``k_v_scale_fusion`` int64 (2, n): bits of float32), apart (``k_scale_no_fusion``
(n,)), and as the input quantizers hold them (``_key_input_quantizer.t_scale``), each with zero
points.  ``ascend_v1`` has ``k_proj.kv_cache_scale`` and ``.kv_cache_offset``, float32 (n,).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slim_core.errors import FormatError
from slim_core.formats import decode_deq_scale, encode_deq_scale
from slim_mindspore.quantized_layer import CacheScales

PREFIX = "paged_attention_mgr.quant_pa."
CACHE_TYPE = "C8"


def encode_cache(scales: CacheScales, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return the tensors behind ``<attention>.`` by Golden Stick's names."""
    both = np.stack([scales.key, scales.value]).astype(np.float32)
    tensors = {
        "k_v_scale_fusion": encode_deq_scale(both, "float32"),
        "k_v_zp_fusion": np.zeros(both.shape, np.int32),
    }
    for side, letter, scale in (("key", "k", scales.key), ("value", "v", scales.value)):
        tensors[f"{letter}_scale_no_fusion"] = scale.astype(dtype)
        tensors[f"{letter}_zp_no_fusion"] = np.zeros(scale.shape, dtype)
        tensors[f"_{side}_input_quantizer.t_scale"] = scale.astype(dtype)
        tensors[f"_{side}_input_quantizer.t_zp"] = np.zeros(scale.shape, np.int8)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def decode_cache(attention: str, tensors: Mapping[str, np.ndarray], width: int) -> CacheScales:
    """Return the scales that :func:`encode_cache` wrote.

    Parameters
    ----------
    attention : str
        Name of the cell, for errors.
    tensors : mapping of str to numpy.ndarray
        By the names behind ``<attention>.``.
    width : int
        Number of channels, ``kv_heads * head_dim``.

    Raises
    ------
    FormatError
        The scales are missing or have the wrong dtype or shape, or a zero point is not 0.
    """
    stored = tensors.get(PREFIX + "k_v_scale_fusion")
    if stored is None or stored.dtype != np.int64 or stored.shape != (2, width):
        found = "missing" if stored is None else f"{stored.dtype} of shape {stored.shape}"
        raise FormatError(
            f"{attention}.{PREFIX}k_v_scale_fusion must be int64 of shape (2, {width}): {found}"
        )
    shifted = [name for name in tensors if "zp" in name and tensors[name].any()]
    if shifted:
        raise FormatError(f"{attention}.{shifted[0]} is not 0; only symmetric caches are read")
    key, value = decode_deq_scale(stored)
    return CacheScales(key, value)
