"""``quant_model_description.json``: what is read from it, and what is written after compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slim_compress.codec import VERSION
from slim_compress.quant_types import COMPRESSED_TYPE, META_KEYS, TYPE_NAMES, QuantType
from slim_core.errors import CheckpointError, InvalidTypeError, InvalidValueError

CODEC_KEY = "compress_codec"
WEIGHT_FILE = "quant_model_weight_w8a8sc.safetensors"
_HEADS = (["lm_head", "weight"], ["embed_out", "weight"])
_PARTS = (".weight", ".index", ".info")


def tensor_types(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the type of each tensor, in the order of the description.

    Keys that speak of the model as a whole are left out, and so are notes of scripts: keys without
    a dot whose value is no type.

    Raises
    ------
    InvalidValueError
        ``model_quant_type`` is missing.
    InvalidTypeError
        A tensor has a type that does not exist.
    """
    if "model_quant_type" not in description:
        raise InvalidValueError("quant_model_description must have the key 'model_quant_type'")
    types = {}
    for key, value in description.items():
        if key in META_KEYS or ("." not in key and value not in TYPE_NAMES):
            continue
        if not isinstance(value, str) or value not in TYPE_NAMES:
            raise InvalidTypeError(
                f"quant_model_description: {key} has the type {value!r:.80}, which does not exist",
                hint=f"types: {', '.join(sorted(TYPE_NAMES))}",
            )
        types[key] = value
    return types


def types_of(tensors: Iterable[str], types: Mapping[str, str]) -> dict[str, str]:
    """Return the types of the tensors, in the order of the description, which must be of the same.

    A float output head may be described and not stored: it is the embedding then, and left out.

    Raises
    ------
    CheckpointError
        Names the tensors that only one of them has.
    """
    names = set(tensors)
    unknown = sorted(names - types.keys())
    missing = sorted(name for name in types.keys() - names if not _is_tied_head(name, types[name]))
    if unknown:
        raise CheckpointError(
            f"the weights and the description do not match: {_some(unknown)} not in the description"
        )
    if missing:
        raise CheckpointError(
            f"the weights and the description do not match: {_some(missing)} "
            "in the description but not in the weights"
        )
    return {name: kind for name, kind in types.items() if name in names}


def is_sparse_weight(name: str, kind: str) -> bool:
    """Is this a weight that gets compressed?  Norms stay as they are, whatever their type."""
    return kind == QuantType.W8A8S and name.endswith(".weight") and "norm" not in name


def refuse_16_bit(types: Mapping[str, str]) -> None:
    """Require that no tensor is 16-bit sparse.

    Raises
    ------
    CheckpointError
        One is; names it.
    """
    for name, kind in types.items():
        if kind == QuantType.W16A16S:
            raise CheckpointError(
                f"{name} has the type W16A16S: only int8 weights (W8A8S) are compressed"
            )


def compressed_description(
    description: Mapping[str, Any], compressed: Iterable[str], codec: str
) -> dict[str, Any]:
    """Return the description after the named weights have been replaced by three tensors each."""
    kind = COMPRESSED_TYPE[codec].value
    done = set(compressed)
    result: dict[str, Any] = {}
    for key, value in description.items():
        if key in done:
            stem = key.removesuffix(".weight")
            result.update({stem + part: kind for part in _PARTS})
        else:
            result[key] = value
    if done:
        result["model_quant_type"] = kind
        if codec == "slc1":
            notes = dict(result.get("metadata") or {})
            result["metadata"] = {**notes, CODEC_KEY: "slc1", f"{CODEC_KEY}_version": VERSION}
    return result


def restored_description(description: Mapping[str, Any], restored: Iterable[str]) -> dict[str, Any]:
    """Undo :func:`compressed_description` of slc1 for the named weights."""
    done = set(restored)
    parts = {name.removesuffix(".weight") + part for name in done for part in _PARTS[1:]}
    result: dict[str, Any] = {}
    for key, value in description.items():
        if key in done:
            result[key] = QuantType.W8A8S.value
        elif key == "metadata" and isinstance(value, dict):
            notes = {k: v for k, v in value.items() if not k.startswith(CODEC_KEY)}
            result[key] = notes
        elif key not in parts:
            result[key] = value
    if done:
        result["model_quant_type"] = QuantType.W8A8S.value
    return result


def description_file(description: Mapping[str, Any], suffix: str) -> str:
    """Return the name of the file: with a version plain, without one with the type in it."""
    versioned = description.get("version") not in (None, "", "0.0.0")
    return f"quant_model_description{'' if versioned else f'_{suffix}'}.json"


def _is_tied_head(name: str, kind: str) -> bool:
    return kind == QuantType.FLOAT and name.rsplit(".", 2)[-2:] in _HEADS


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"
