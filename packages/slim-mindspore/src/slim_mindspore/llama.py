"""A Llama in ``mindspore.nn``, with the cell and parameter names of MindFormers.

It runs on a CPU in PyNative and in graph mode, has no fused kernels, and computes in float32 or
float64 (``LlamaConfig.dtype``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_mindspore.framework import Parameter, Tensor, ms, nn, ops
from slim_mindspore.kv_cache import FloatKV, KVCache
from slim_mindspore.llama_config import LlamaConfig


class RMSNorm(nn.Cell):  # type: ignore[misc]
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def __init__(self, size: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = Tensor(np.array(eps, dtype))  # MindSpore makes float32 of a Python number
        self.weight = Parameter(Tensor(np.ones(size, dtype)), name="weight")

    def construct(self, x: Any) -> Any:
        """Normalize the last axis."""
        mean = ops.mean(ops.square(x), -1, True)
        return x * ops.rsqrt(mean + self.eps) * self.weight


class TokenEmbedding(nn.Cell):  # type: ignore[misc]
    """Rows of ``embedding_weight``, shape (vocabulary, hidden)."""

    def __init__(self, vocab_size: int, size: int, dtype: str) -> None:
        super().__init__()
        table = np.zeros((vocab_size, size), dtype)
        self.embedding_weight = Parameter(Tensor(table), name="embedding_weight")

    def construct(self, ids: Any) -> Any:
        """Return the rows of int32 ``ids``."""
        return ops.gather(self.embedding_weight, ids, 0)


class Attention(nn.Cell):  # type: ignore[misc]
    """Causal grouped-query attention with rotary positions.

    ``key_quant`` and ``value_quant`` stand between the projections and the attention; they are
    replaced to quantize the cache.  ``early_key_quant`` stands before the rotation instead, for
    checkpoints whose scales of keys were found there.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        options = {"has_bias": config.attention_bias, "dtype": getattr(ms, config.dtype)}
        self.wq = nn.Dense(config.hidden_size, width, **options)
        self.wk = nn.Dense(config.hidden_size, kv_width, **options)
        self.wv = nn.Dense(config.hidden_size, kv_width, **options)
        self.wo = nn.Dense(width, config.hidden_size, **options)
        self.early_key_quant: Any = FloatKV()
        self.key_quant: Any = FloatKV()
        self.value_quant: Any = FloatKV()
        self.scaling = Tensor(np.array(float(self.head_dim) ** -0.5, config.dtype))

    def construct(self, x: Any, cos: Any, sin: Any, mask: Any) -> Any:
        """Attend within ``x``, shape (batch, length, hidden)."""
        query, key, value = self.project(x, cos, sin)
        return self.attend(query, self.key_quant(key), self.value_quant(value), mask)

    def project(self, x: Any, cos: Any, sin: Any) -> Any:
        """Return query, key and value, each (batch, length, heads, head_dim)."""
        batch, length, _ = x.shape
        query = self.wq(x).reshape(batch, length, self.heads, self.head_dim)
        key = self.wk(x).reshape(batch, length, self.kv_heads, self.head_dim)
        key = self.early_key_quant(key)
        value = self.wv(x).reshape(batch, length, self.kv_heads, self.head_dim)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """Return the output of the layer; ``mask`` (queries, keys) is added to the scores."""
        batch, length = query.shape[0], query.shape[1]
        query = query.transpose(0, 2, 1, 3)
        key = self.spread(key.transpose(0, 2, 3, 1))
        value = self.spread(value.transpose(0, 2, 1, 3))
        scores = ops.matmul(query, key) * self.scaling + mask
        mixed = ops.matmul(ops.softmax(scores, -1), value)
        width = self.heads * self.head_dim
        return self.wo(mixed.transpose(0, 2, 1, 3).reshape(batch, length, width))

    def spread(self, x: Any) -> Any:
        """Repeat each key or value head for the query heads that share it."""
        if self.heads == self.kv_heads:
            return x
        batch, _, rows, columns = x.shape
        repeat = self.heads // self.kv_heads
        x = x.expand_dims(2).broadcast_to((batch, self.kv_heads, repeat, rows, columns))
        return x.reshape(batch, self.heads, rows, columns)


class FeedForward(nn.Cell):  # type: ignore[misc]
    """``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        options = {"has_bias": config.mlp_bias, "dtype": getattr(ms, config.dtype)}
        self.w1 = nn.Dense(config.hidden_size, config.intermediate_size, **options)
        self.w2 = nn.Dense(config.intermediate_size, config.hidden_size, **options)
        self.w3 = nn.Dense(config.hidden_size, config.intermediate_size, **options)

    def construct(self, x: Any) -> Any:
        """Apply the gated layer."""
        return self.w2(ops.silu(self.w1(x)) * self.w3(x))


class DecoderLayer(nn.Cell):  # type: ignore[misc]
    """Attention and feed-forward, each behind a norm and with a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.dtype)

    def construct(self, x: Any, cos: Any, sin: Any, mask: Any) -> Any:
        """Map hidden states to hidden states."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def decode(self, x: Any, cos: Any, sin: Any, mask: Any, cache: Any) -> Any:
        """As :meth:`construct`, attending to the cache of this layer, which grows (PyNative)."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        key, value = cache.extend(self.attention, key, value)
        x = x + self.attention.attend(query, key, value, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaModel(nn.Cell):  # type: ignore[misc]
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size, config.dtype)
        self.layers = nn.CellList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm_out = RMSNorm(config.hidden_size, config.rms_norm_eps, config.dtype)
        cos, sin = rotary_tables(config)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.positions = Tensor(np.arange(config.max_positions, dtype=np.int32))

    def construct(self, ids: Any) -> Any:
        """Return the last hidden states of int32 ``ids``, shape (batch, length)."""
        length = ids.shape[1]
        position = self.positions[:length]
        hidden = position.expand_dims(0) > position.expand_dims(1)
        cos, sin = self.cos[:length], self.sin[:length]
        mask = ops.cast(hidden, cos.dtype) * -1e9
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm_out(x)

    def decode(self, ids: Any, cache: KVCache) -> Any:
        """As :meth:`construct` for ``ids`` that follow what is in the cache (PyNative)."""
        start, length = cache.length, ids.shape[1]
        position = self.positions[: start + length]
        hidden = position.expand_dims(0) > position[start:].expand_dims(1)
        cos, sin = self.cos[start : start + length], self.sin[start : start + length]
        mask = ops.cast(hidden, cos.dtype) * -1e9
        x = self.tok_embeddings(ids)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.decode(x, cos, sin, mask, layer_cache)
        return self.norm_out(x)


class LlamaForCausalLM(nn.Cell):  # type: ignore[misc]
    """A Llama with its output layer.

    Parameters
    ----------
    config : LlamaConfig
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            dtype = getattr(ms, config.dtype)
            self.lm_head = nn.Dense(
                config.hidden_size, config.vocab_size, has_bias=False, dtype=dtype
            )
        self.set_train(False)

    def construct(self, ids: Any) -> Any:
        """Return logits, shape (batch, length, vocabulary), of int32 ids (batch, length)."""
        return self.logits(self.model(ids))

    def logits(self, hidden: Any) -> Any:
        """Return the logits of hidden states."""
        if self.tied:
            return ops.matmul(hidden, self.model.tok_embeddings.embedding_weight.T)
        return self.lm_head(hidden)

    def decode(self, ids: Any, cache: KVCache) -> Any:
        """Return the logits of ids that follow what is in the cache; PyNative mode."""
        return self.logits(self.model.decode(ids, cache))

    def new_cache(self) -> KVCache:
        """Return an empty cache for :meth:`decode`."""
        return KVCache(self.config.num_layers, self.config.max_positions)

    def generate(self, input_ids: Any, **options: Any) -> np.ndarray:
        """Continue token ids; see :func:`slim_mindspore.generation.generate`."""
        from slim_mindspore.generation import generate

        return generate(self, input_ids, **options)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Turn channel pairs ``(i, i + head_dim / 2)`` of (batch, length, heads, head_dim)."""
    half = x.shape[-1] // 2
    turned = ops.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.expand_dims(1) + turned * sin.expand_dims(1)


def rotary_tables(config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines, shape (positions, head_dim), in the dtype of the network."""
    real = np.dtype(config.dtype).type
    channel = np.arange(0, config.head_dim, 2, dtype=real) / real(config.head_dim)
    frequency = real(1.0) / real(config.theta) ** channel
    angle = np.arange(config.max_positions, dtype=real)[:, None] * frequency[None, :]
    angle = np.concatenate([angle, angle], axis=1)
    return np.cos(angle), np.sin(angle)
