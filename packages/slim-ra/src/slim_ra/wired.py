"""A two-layer Llama whose retrieval heads are wired by hand, so that they are known.

Layer 0, query head 0 attends to the previous token.  Layer 1, query head 2 (KV head 1) is an
induction head and writes the token it finds to the output; query head 6 (KV head 3) is an echo
head.  All other heads attend evenly to everything and write nothing.  The model repeats what
followed the current token before, so it answers passkeys exactly as long as KV head 1 of layer 1
holds the passkey.
"""

from __future__ import annotations

from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, CODE = 8, 4, 128, 64
INDUCTION, ECHO = (1, 2), (1, 6)  # layer and query head
_HIDDEN = 256  # token code | code of the previous token | answer | a constant
_THETA = 1e12  # half of the rotary pairs turn fast, half stand nearly still
_CONSTANT = 8.0


def wired_llama(vocabulary: int = 512, *, seed: int = 0) -> Any:
    """Build the model, fp32, on the CPU.

    Parameters
    ----------
    vocabulary : int
        Ids; 0 starts a text.
    seed : int
        Of the random token codes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=_HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=2,
        intermediate_size=8,
        vocab_size=vocabulary,
        max_position_embeddings=1 << 17,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    _set_theta(config)
    model: Any = LlamaForCausalLM(config)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (vocabulary, CODE), generator=generator) * 2.0 - 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :CODE] = codes
        model.model.embed_tokens.weight[:, -1] = _CONSTANT
        first, second = (layer.self_attn for layer in model.model.layers)
        rms = ((CODE + _CONSTANT**2) / _HIDDEN) ** 0.5
        _wire_previous_token(first, rms)
        rms = ((2 * CODE + _CONSTANT**2) / _HIDDEN) ** 0.5
        _wire_match(second, 2, slice(CODE, 2 * CODE), rms)
        _wire_match(second, 6, slice(0, CODE), rms)
        _wire_value(second, 2, slice(2 * CODE, 3 * CODE), rms)
        model.lm_head.weight[:, 2 * CODE : 3 * CODE] = codes
    return model


def _set_theta(config: Any) -> None:
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": _THETA}
    else:
        config.rope_theta = _THETA


def _wire_previous_token(attention: Any, rms: float, sharpness: float = 30.0) -> None:
    """Head 0: equal keys everywhere, and a query that is turned back by one position."""
    pairs = torch.arange(24)
    angles = _THETA ** (-2.0 * pairs / HEAD_DIM)
    size = (sharpness * HEAD_DIM**0.5) ** 0.5 * rms / _CONSTANT
    attention.q_proj.weight[pairs, -1] = size * angles.cos()
    attention.q_proj.weight[pairs + HEAD_DIM // 2, -1] = -size * angles.sin()
    attention.k_proj.weight[pairs, -1] = size
    _wire_value(attention, 0, slice(CODE, 2 * CODE), rms)


def _wire_match(
    attention: Any, head: int, keys: slice, rms: float, sharpness: float = 100.0
) -> None:
    """Query the token's own code against ``keys``, in pairs that hardly turn."""
    still = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])
    size = (sharpness * HEAD_DIM**0.5 / CODE) ** 0.5 * rms
    unit = torch.eye(CODE) * size
    kv_head = head // (HEADS // KV_HEADS)
    attention.q_proj.weight[head * HEAD_DIM + still, :CODE] = unit
    attention.k_proj.weight[kv_head * HEAD_DIM + still, keys] = unit


def _wire_value(attention: Any, head: int, target: slice, rms: float) -> None:
    """Carry the attended token's code to ``target``."""
    kv_head = head // (HEADS // KV_HEADS)
    start = kv_head * HEAD_DIM
    attention.v_proj.weight[start : start + CODE, :CODE] = torch.eye(CODE) * rms
    start = head * HEAD_DIM
    attention.o_proj.weight[target, start : start + CODE] = torch.eye(CODE)
