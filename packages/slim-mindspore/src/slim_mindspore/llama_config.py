"""Sizes of a Llama, from Hugging Face or MindFormers configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slim_core.errors import InvalidValueError, StructureError
from slim_core.validate import check_choice, check_float, check_int

_HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_SILENT_ROPE = (None, "default")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of :class:`slim_mindspore.llama.LlamaForCausalLM`.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size, num_layers, num_heads, n_kv_heads, head_dim : int
    max_positions : int
        Longest sequence.
    rms_norm_eps, theta : float
        Of the norms; base of the rotary frequencies.
    attention_bias, mlp_bias, tie_word_embeddings : bool
    eos_token_id : int or None
        Ends a generation.
    dtype : {"float32", "float64"}
        Of the parameters and of everything that is computed, quantized or not.  In float64 an
        activation next to the middle between two codes does not depend on the order of sums, so
        that results can be compared with those of another framework.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A size is no positive int, ``n_kv_heads`` does not divide ``num_heads``, or the dtype is
        another one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (*_HF_KEYS.values(), "n_kv_heads", "head_dim", "max_positions"):
            check_int(name, getattr(self, name), low=1)
        check_float("rms_norm_eps", self.rms_norm_eps, low=0.0)
        check_float("theta", self.theta, low=1.0)
        check_choice("dtype", self.dtype, ("float32", "float64"))
        if self.num_heads % self.n_kv_heads:
            raise InvalidValueError(
                f"n_kv_heads={self.n_kv_heads} does not divide num_heads={self.num_heads}"
            )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the sizes of a ``config.json``.

        Raises
        ------
        StructureError
            Not a Llama, or one with scaled rotary frequencies; a key is missing.
        """
        if config.get("model_type") != "llama":
            raise StructureError(f"model_type must be llama, not {config.get('model_type')!r}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type")) not in _SILENT_ROPE:
            raise StructureError(f"rotary frequencies of type {rope!r:.80} are not supported")
        missing = [key for key in _HF_KEYS if key not in config]
        if missing:
            raise StructureError(f"config.json has no {', '.join(missing)}")
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        return cls(
            **{mine: config[theirs] for theirs, mine in _HF_KEYS.items()},
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
        )

    @classmethod
    def from_mindformers(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the sizes of a ``model.model_config`` block of a MindFormers YAML file.

        Raises
        ------
        StructureError
            A key is missing.
        """
        needed = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        missing = [key for key in needed if not config.get(key)]
        if missing:
            raise StructureError(
                f"model.model_config has no {', '.join(missing)}",
                hint="intermediate_size cannot be left to a rule of thumb here",
            )
        heads, hidden = config["num_heads"], config["hidden_size"]
        return cls(
            **{key: config[key] for key in needed},
            n_kv_heads=config.get("n_kv_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_positions=config.get("max_position_embedding") or config.get("seq_length", 2048),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
            theta=float(config.get("theta", 10000.0)),
            attention_bias=bool(config.get("qkv_has_bias", False)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_id=config.get("eos_token_id"),
        )
