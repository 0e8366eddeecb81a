"""Reading quantized checkpoints of any layout into a network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.attention_types import AFTER_ROTARY, read_attention
from slim_core.errors import CheckpointError
from slim_core.files import PathLike, as_path, check_input_file
from slim_core.formats import DESCRIPTION_FILE
from slim_core.quantized import QuantizedCheckpoint, is_quantized
from slim_mindspore.cache_format import PREFIX, decode_cache
from slim_mindspore.ckpt import CkptFile
from slim_mindspore.layout_reader import decode_layer
from slim_mindspore.layouts import PACKED
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.names import to_mindformers
from slim_mindspore.quantized_layer import CacheScales, SmoothedLinear
from slim_mindspore.sparse_format import decode_sparse
from slim_mindspore.tensors import load_tensors, owner_of

_MAX_DESCRIPTION = 64 << 20
_CACHE_TENSORS = (".kv_cache_scale", ".kv_cache_offset")
_MARKS = ("_handler.weight", PACKED, "deq_scale")


@dataclass(eq=False)
class QuantizedTensors:
    """The content of a quantized checkpoint, by MindFormers names.

    Parameters
    ----------
    layers : dict of str to SmoothedLinear
    floats : dict of str to numpy.ndarray
        Everything else.
    caches : dict of str to CacheScales
        By the names of the attention cells.
    cache_per_token : bool
        Whether the cache is int8 with scales found at run time.
    """

    layers: dict[str, SmoothedLinear] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    caches: dict[str, CacheScales] = field(default_factory=dict)
    cache_per_token: bool = False


def read_quantized(path: PathLike) -> QuantizedTensors:
    """Read a quantized checkpoint without building a network.

    Parameters
    ----------
    path : path
        A directory in ``ascend_v1`` or ``safe_tensor`` format (slim-ptq, msModelSlim), or a
        ``.ckpt`` or safetensors file in a Golden Stick layout or of sparse quantization.

    Raises
    ------
    FileNotFoundError, FileSecurityError, CheckpointError, FormatError
        The files are not there, unsafe, damaged or of no known layout.
    """
    source = as_path("path", path)
    if source.is_dir() and is_quantized(source) and not list(source.glob("*.ckpt")):
        description = _description(source)
        if "quantization_config" not in description:
            return _read_ascend(source)
    return _read_named(source)


def is_quantized_file(path: PathLike) -> bool:
    """Whether a checkpoint has integer weights or says that its cache is quantized."""
    source = as_path("path", path)
    directory = source if source.is_dir() else source.parent
    if (directory / DESCRIPTION_FILE).is_file() or is_quantized(directory):
        return True
    return source.suffix == ".ckpt" and any(n.endswith(_MARKS) for n in CkptFile(source).tensors)


def load_quantized(path: PathLike, config: LlamaConfig | None = None) -> Any:
    """Return a Llama that runs on the integer weights of a checkpoint.

    Parameters
    ----------
    path : path
        As for :func:`read_quantized`.
    config : LlamaConfig, optional
        Sizes; those of the ``config.json`` beside the weights if None.

    Raises
    ------
    FileNotFoundError, FileSecurityError, CheckpointError, FormatError, StructureError
        The files are not there, unsafe, damaged, or do not fit the network: missing, unexpected
        and misshapen tensors are named.
    """
    from slim_mindspore.hub import read_config
    from slim_mindspore.llama import LlamaForCausalLM

    content = read_quantized(path)
    sizes = config or read_config(path)
    if sizes.tie_word_embeddings:
        content.floats.pop("lm_head.weight", None)
    network = LlamaForCausalLM(sizes)
    fill_network(network, content, str(path))
    return network


def fill_network(
    network: Any, content: QuantizedTensors, what: str, layout: str = "gs-ptq"
) -> None:
    """Put the content of a checkpoint into a network; see :func:`load_quantized`.

    The network is a float one, or one whose cells have been replaced already; ``layout`` tells
    whose names the parameters of the new cells have.
    """
    from slim_mindspore.cells import activation_of, find_quantized, quant_cell, weight_shape
    from slim_mindspore.kv_cache import ChannelKV, TokenKV
    from slim_mindspore.linears import find_linears, replace_cell
    from slim_mindspore.tensors import load_into

    linears = find_linears(network) | find_quantized(network)
    floats = dict(content.floats)
    for name, result in content.layers.items():
        if name not in linears:
            raise CheckpointError(f"{what}: {name} is no linear cell of the network")
        shape = weight_shape(linears[name])
        if result.layer.codes.shape != shape:
            raise CheckpointError(
                f"{what}: {name} has shape {result.layer.codes.shape}, the network {shape}"
            )
    kept: dict[str, np.ndarray] = {}
    for name, result in content.layers.items():
        cell = quant_cell(result, activation_of(linears[name]), layout)
        replace_cell(network, name, cell)
        kept |= {f"{name}.{local}": p.asnumpy() for local, p in cell.parameters_and_names()}
    load_into(network, floats | kept, what)
    for name, attention in network.cells_and_names():
        if name in content.caches:
            scales = content.caches[name]
            side = "key_quant" if scales.rotated else "early_key_quant"
            setattr(attention, side, ChannelKV(scales.key, attention.kv_heads))
            attention.value_quant = ChannelKV(scales.value, attention.kv_heads)
        elif content.cache_per_token and hasattr(attention, "key_quant"):
            attention.key_quant, attention.value_quant = TokenKV(), TokenKV()
    network.update_parameters_name()


def _read_ascend(directory: Path) -> QuantizedTensors:
    stored = QuantizedCheckpoint(directory)
    if stored.norm_extras:
        names = ", ".join(sorted(stored.norm_extras)[:3])
        raise CheckpointError(
            f"{directory} has norms with a bias ({names}), which this Llama cannot hold"
        )
    content = QuantizedTensors()
    used: set[str] = set()
    for name in stored.layers:
        used.update(stored.tensor_names(name))
        content.layers[to_mindformers(name)] = SmoothedLinear(stored.layer(name))
    used.update(name for name in stored.checkpoint.tensors if name.endswith(_CACHE_TENSORS))
    for name in stored.checkpoint.tensors:
        if name not in used and not name.endswith("rotary_emb.inv_freq"):
            content.floats[to_mindformers(name)] = stored.checkpoint.load(name)
    content.caches = _ascend_caches(stored)
    return content


def _ascend_caches(stored: QuantizedCheckpoint) -> dict[str, CacheScales]:
    attention_parts = read_attention(stored.description, stored.checkpoint.load)
    if attention_parts.attentions:
        name = next(iter(attention_parts.attentions))
        raise CheckpointError(f"{name} has int8 queries, which this Llama cannot compute")
    found = {to_mindformers(name): params for name, params in attention_parts.caches.items()}
    for name, (_, offset) in found.items():
        if offset.any():
            raise CheckpointError(f"the cache of {name} has offsets; only symmetric ones are read")
    rotated = bool(stored.description.get("metadata", {}).get(AFTER_ROTARY))
    caches = {}
    for name in found:
        attention = name.rpartition(".")[0]
        sides = [f"{attention}.{cell}" for cell in ("wk", "wv")]
        if any(side not in found for side in sides):
            raise CheckpointError(f"{attention} has the cache scales of one side only")
        key, value = (found[side][0] for side in sides)
        caches[attention] = CacheScales(key, value, rotated)
    return caches


def _read_named(source: Path) -> QuantizedTensors:
    """Read a file whose layers are told by the names of their tensors."""
    file = _weight_file(source)
    tensors = load_tensors(file)
    description = _description(file.parent)
    int4 = CkptFile(file).int4 if file.suffix == ".ckpt" else frozenset()
    int4 |= {n for n, kind in description.items() if str(kind).startswith("W4")}
    content = QuantizedTensors()
    cells = {
        name.removesuffix(f".{mark}") for name in tensors for mark in _MARKS if name.endswith(mark)
    }
    by_cell: dict[str, dict[str, np.ndarray]] = {cell: {} for cell in cells}
    by_cache: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        cell = owner_of(name, by_cell)
        attention, found, rest = name.partition(f".{PREFIX}")
        if found:
            by_cache.setdefault(attention, {})[PREFIX + rest] = tensor
        elif cell is not None:
            by_cell[cell][name[len(cell) + 1 :]] = tensor
        else:
            content.floats[name] = tensor
    for cell, locals_ in by_cell.items():
        if "deq_scale" in locals_:
            content.layers[cell] = SmoothedLinear(decode_sparse(cell, locals_), None, "sparse")
        else:
            content.layers[cell] = decode_layer(cell, locals_, f"{cell}.{PACKED}" in int4)
    for attention, locals_ in by_cache.items():
        width = next(iter(locals_.values())).shape[-1]
        content.caches[attention] = decode_cache(attention, locals_, width)
    config = description.get("quantization_config") or {}
    content.cache_per_token = (
        config.get("kvcache_dtype") == "int8"
        and config.get("kvcache_quant_granularity") == "per_token"
    )
    if not content.layers and not content.caches and not content.cache_per_token:
        raise CheckpointError(f"{file} holds no quantized layer of a known layout")
    return content


def _weight_file(source: Path) -> Path:
    if not source.is_dir():
        return check_input_file(source)
    files = sorted([*source.glob("*.ckpt"), *source.glob("*.safetensors")])
    if len(files) != 1:
        raise CheckpointError(
            f"{source} must hold one .ckpt or .safetensors file, not {len(files)}"
        )
    return files[0]


def _description(directory: Path) -> dict[str, Any]:
    file = directory / DESCRIPTION_FILE
    if not file.is_file():
        return {}
    text = check_input_file(file, max_bytes=_MAX_DESCRIPTION).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold an object")
    return content
