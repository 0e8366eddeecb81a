"""Names of the tensors of a Llama: Hugging Face on one side, MindFormers on the other.

Only the name of a cell is translated; what follows it (``weight``, ``bias``, ``weight_scale`` ...)
stays, so quantized tensors are renamed like float ones.  Both sides store weights ``(out, in)``
and rotary channels in the same order, so no tensor changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from slim_core.errors import CheckpointError

_CELLS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BACK = {mine: theirs for theirs, mine in _CELLS.items()}
_EMBEDDING_HF = "model.embed_tokens.weight"
_EMBEDDING_MS = "model.tok_embeddings.embedding_weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def to_mindformers(name: str) -> str:
    """Return the MindFormers name of a tensor or cell of a Hugging Face Llama.

    Raises
    ------
    CheckpointError
        The name does not belong to a Llama.
    """
    if name == _EMBEDDING_HF:
        return _EMBEDDING_MS
    if name == "model.norm" or name.startswith("model.norm."):
        return name.replace("model.norm", "model.norm_out", 1)
    if name == "lm_head" or name.startswith("lm_head."):
        return name
    return _rename(name, _CELLS, "Hugging Face")


def to_hugging_face(name: str) -> str:
    """Return the Hugging Face name of a tensor or cell of a MindFormers Llama.

    Raises
    ------
    CheckpointError
        The name does not belong to a Llama.
    """
    if name == _EMBEDDING_MS:
        return _EMBEDDING_HF
    if name == "model.norm_out" or name.startswith("model.norm_out."):
        return name.replace("model.norm_out", "model.norm", 1)
    if name == "lm_head" or name.startswith("lm_head."):
        return name
    return _rename(name, _BACK, "MindFormers")


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether the names are those of Hugging Face rather than of MindFormers."""
    known = set(names)
    if _EMBEDDING_MS in known:
        return False
    return _EMBEDDING_HF in known or any(".self_attn." in name for name in known)


def _rename(name: str, cells: dict[str, str], side: str) -> str:
    match = _LAYER.fullmatch(name)
    if match:
        layer, rest = match.groups()
        for old, new in cells.items():
            if rest == old or rest.startswith(f"{old}."):
                return f"model.layers.{layer}.{new}{rest[len(old) :]}"
    raise CheckpointError(f"{name} is not the name of a tensor of a Llama of {side}")
