"""Several codes in an int32 word, as the formats of GPTQ, AWQ and compressed-tensors have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORD = 32


def pack_words(
    values: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None
) -> np.ndarray:
    """Pack unsigned codes into words, the first one in the lowest bits.

    Parameters
    ----------
    values : numpy.ndarray of integers, two-dimensional
        In [0, 2**bits - 1]; the axis is filled up with zeros to whole words.
    bits : int
        A divisor of 32.
    axis : int
        0 or 1.
    order : sequence of int, optional
        Which of the codes of a word comes at each place; in their order if not given.

    Returns
    -------
    numpy.ndarray of int32
    """
    per_word = WORD // bits
    table = np.moveaxis(values, axis, -1).astype(np.uint32)
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % per_word)))
    table = table.reshape(table.shape[0], -1, per_word)
    if order is not None:
        table = table[:, :, list(order)]
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(table << shifts, axis=-1, dtype=np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def unpack_words(
    words: np.ndarray, bits: int, axis: int, length: int, order: Sequence[int] | None = None
) -> np.ndarray:
    """Return the codes of :func:`pack_words` as uint8, ``length`` of them along the axis."""
    per_word = WORD // bits
    table = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint32)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    codes = (table[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    if order is not None:
        codes = codes[:, :, np.argsort(order)]
    codes = codes.reshape(table.shape[0], -1)[:, :length].astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(codes, -1, axis))
