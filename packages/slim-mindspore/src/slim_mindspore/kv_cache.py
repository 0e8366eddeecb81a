"""Keys and values between projection and attention: float or int8, and the cache of a generation.

Tensors have the shape (batch, length, kv_heads, head_dim).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.errors import InvalidValueError
from slim_core.numerics import EPS
from slim_mindspore.framework import Parameter, Tensor, ms, nn, ops


class FloatKV(nn.Cell):  # type: ignore[misc]
    """Leaves keys or values as they are."""

    def construct(self, x: Any) -> Any:
        """Return what a reader of the cache gets."""
        return x

    def encode(self, x: Any) -> Any:
        """Return what the cache stores: codes and scales."""
        return x, None

    def decode(self, codes: Any, scale: Any, dtype: Any) -> Any:
        """Return what :meth:`construct` returns, in a dtype, from what :meth:`encode` returned."""
        return codes


class ChannelKV(nn.Cell):  # type: ignore[misc]
    """int8 with a fixed scale per channel, found by calibration.

    Parameters
    ----------
    scale : numpy.ndarray, float32, shape (kv_heads * head_dim,)
    kv_heads : int
    """

    def __init__(self, scale: np.ndarray, kv_heads: int) -> None:
        super().__init__()
        table = np.asarray(scale, np.float32).reshape(kv_heads, -1)
        self.scale = Parameter(Tensor(table), name="scale", requires_grad=False)

    def construct(self, x: Any) -> Any:
        """Return what a reader of the cache gets."""
        return ops.clamp(ops.round(x / self.scale), -128, 127) * self.scale

    def encode(self, x: Any) -> Any:
        """Return codes and scales; the scales are not stored with the tokens."""
        return ops.cast(ops.clamp(ops.round(x / self.scale), -128, 127), ms.int8), None

    def decode(self, codes: Any, scale: Any, dtype: Any) -> Any:
        """Return keys or values of stored codes."""
        return ops.cast(codes, dtype) * self.scale


class TokenKV(nn.Cell):  # type: ignore[misc]
    """int8 with one scale per token, found when it is stored; needs no calibration."""

    def construct(self, x: Any) -> Any:
        """Return what a reader of the cache gets."""
        scale = self.token_scale(x)
        return ops.clamp(ops.round(x / scale), -127, 127) * scale

    def encode(self, x: Any) -> Any:
        """Return codes and scales."""
        scale = self.token_scale(x)
        return ops.cast(ops.clamp(ops.round(x / scale), -127, 127), ms.int8), scale

    def decode(self, codes: Any, scale: Any, dtype: Any) -> Any:
        """Return keys or values of stored codes."""
        return ops.cast(codes, dtype) * scale

    def token_scale(self, x: Any) -> Any:
        """Return the scales, shape (batch, length, 1, 1)."""
        batch, length, heads, channels = x.shape
        rows = ops.abs(x).reshape(batch, length, heads * channels)
        peak = ops.amax(rows, -1).reshape(batch, length, 1, 1)
        return ops.maximum(peak / 127.0, EPS)


class LayerCache:
    """What one layer has stored."""

    def __init__(self) -> None:
        self._stored: list[tuple[Any, Any]] | None = None

    def extend(self, attention: Any, key: Any, value: Any) -> tuple[Any, Any]:
        """Store new keys and values; return all of them as attention reads them."""
        new = [attention.key_quant.encode(key), attention.value_quant.encode(value)]
        if self._stored is None:
            self._stored = new
        else:
            self._stored = [
                (ops.cat((old[0], item[0]), 1), _cat(old[1], item[1]))
                for old, item in zip(self._stored, new, strict=True)
            ]
        (keys, key_scale), (values, value_scale) = self._stored
        return (
            attention.key_quant.decode(keys, key_scale, key.dtype),
            attention.value_quant.decode(values, value_scale, value.dtype),
        )

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return 0 if self._stored is None else int(self._stored[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales stored."""
        tensors = [item for pair in self._stored or [] for item in pair if item is not None]
        return sum(int(tensor.nbytes) for tensor in tensors)


class KVCache:
    """The cache of a generation.

    Parameters
    ----------
    layers : int
    max_positions : int
        Longest sequence of the network.
    """

    def __init__(self, layers: int, max_positions: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self._limit = max_positions

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(layer.nbytes for layer in self.layers)

    def check_room(self, tokens: int) -> None:
        """Require room for more tokens.

        Raises
        ------
        InvalidValueError
            The sequence would be longer than the network allows.
        """
        if self.length + tokens > self._limit:
            raise InvalidValueError(
                f"{self.length + tokens} tokens are more than the {self._limit} positions "
                "of the network"
            )


def _cat(old: Any, new: Any) -> Any:
    return None if old is None else ops.cat((old, new), 1)
