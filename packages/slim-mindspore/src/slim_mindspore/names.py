"""Names of the tensors of a Llama: Hugging Face on one side, MindFormers on the other.

Only the name of a cell is translated; what follows it (``weight``, ``bias``, ``weight_scale`` ...)
stays, so quantized tensors are renamed like float ones.  Both sides store weights ``(out, in)``
and rotary channels in the same order, so no tensor changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from slim_core.errors import CheckpointError

_EMBEDDING_HF = "model.embed_tokens.weight"
_EMBEDDING_MS = "model.tok_embeddings.embedding_weight"
_TO_MINDFORMERS = {
    _EMBEDDING_HF: _EMBEDDING_MS,
    "model.norm": "model.norm_out",
    "lm_head": "lm_head",
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
_TO_HUGGING_FACE = {mine: theirs for theirs, mine in _TO_MINDFORMERS.items()}
_OUTSIDE_LAYERS = ("lm_head", "model.norm", "model.norm_out", _EMBEDDING_HF, _EMBEDDING_MS)
_LAYER = re.compile(r"(model\.layers\.\d+\.)?(.+)")


def to_mindformers(name: str) -> str:
    """Return the MindFormers name of a tensor or cell of a Hugging Face Llama.

    Raises
    ------
    CheckpointError
        The name does not belong to a Llama.
    """
    return _rename(name, _TO_MINDFORMERS, "Hugging Face")


def to_hugging_face(name: str) -> str:
    """Return the Hugging Face name of a tensor or cell of a MindFormers Llama.

    Raises
    ------
    CheckpointError
        The name does not belong to a Llama.
    """
    return _rename(name, _TO_HUGGING_FACE, "MindFormers")


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether the names are those of Hugging Face rather than of MindFormers."""
    known = set(names)
    if _EMBEDDING_MS in known:
        return False
    return _EMBEDDING_HF in known or any(".self_attn." in name for name in known)


def _rename(name: str, cells: dict[str, str], side: str) -> str:
    match = _LAYER.fullmatch(name)
    layer, rest = (match.group(1) or "", match.group(2)) if match else ("", "")
    for old, new in cells.items():
        if (old in _OUTSIDE_LAYERS) != bool(layer) and (rest == old or rest.startswith(f"{old}.")):
            return f"{layer}{new}{rest[len(old) :]}"
    raise CheckpointError(f"{name} is not the name of a tensor of a Llama of {side}")
