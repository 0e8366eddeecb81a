"""What the configuration of a model says about its attention heads and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from slim_core.errors import StructureError

Encoding = Literal["rotary", "alibi"]

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_head_kv")
_ROTARY = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base")


@dataclass(frozen=True)
class HeadGeometry:
    """Counts and sizes of the attention heads of a decoder.

    Attributes
    ----------
    layers, heads, kv_heads : int
        Decoder layers, and query and key/value heads of each.
    head_dim : int
        Size of one key.
    hidden_size : int
        Width of the residual stream.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


def text_config(config: Any) -> Any:
    """Return the configuration of the text decoder inside ``config``."""
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if callable(getter) else config


def head_geometry(config: Any) -> HeadGeometry:
    """Read the head geometry from a Hugging Face configuration.

    Raises
    ------
    StructureError
        A count is missing, not positive, or does not divide.
    """
    config = text_config(config)
    layers = _first(config, _LAYERS)
    heads = _first(config, _HEADS)
    hidden = _first(config, ("hidden_size", "d_model", "n_embd"))
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1  # Falcon's old layout also carries num_kv_heads, which then means nothing
    else:
        kv_heads = _first(config, _KV_HEADS, default=heads)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if heads % kv_heads:
        raise StructureError(f"{heads} attention heads are no multiple of {kv_heads} KV heads")
    return HeadGeometry(layers, heads, kv_heads, int(head_dim), hidden)


def position_encoding(model: nn.Module) -> Encoding | None:
    """Tell how the model encodes positions: ``"rotary"``, ``"alibi"``, or None for neither."""
    config = text_config(getattr(model, "config", None))
    kind = getattr(config, "model_type", "")
    rotary = any(name.rsplit(".", 1)[-1] == "inv_freq" for name, _ in model.named_buffers())
    attention = getattr(config, "attn_config", None)
    if (
        getattr(config, "alibi", False) is True
        or getattr(attention, "alibi", False) is True
        or getattr(config, "position_embedding_type", None) == "alibi"
        or kind == "bloom"
        or (kind == "baichuan" and not rotary)
    ):
        return "alibi"
    if rotary or any(getattr(config, name, None) is not None for name in _ROTARY):
        return "rotary"
    return None


def require_decoder(model: nn.Module) -> None:
    """Refuse encoder-decoder models.

    Raises
    ------
    StructureError
        The model is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise StructureError(f"{type(model).__name__} is an encoder-decoder, not a decoder")


def _first(config: Any, names: tuple[str, ...], default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise StructureError(f"the configuration's {name} must be an int >= 1: {value!r}")
            return value
    if default is None:
        raise StructureError(f"the configuration has none of {', '.join(names)}")
    return default
