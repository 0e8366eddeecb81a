"""Building the reference Llama from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from slim_core.errors import CheckpointError
from slim_core.files import PathLike, check_input_file
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.names import is_hugging_face, to_mindformers
from slim_mindspore.tensors import load_into, load_tensors, model_dir

_MAX_CONFIG = 1 << 20


def read_config(path: PathLike) -> LlamaConfig:
    """Return the sizes that the ``config.json`` beside the weights states.

    Raises
    ------
    FileNotFoundError
        There is none.
    CheckpointError, StructureError
        It is no JSON object, or not of a Llama.
    """
    file = check_input_file(model_dir(path) / "config.json", max_bytes=_MAX_CONFIG)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold an object, not {type(values).__name__}")
    return LlamaConfig.from_hugging_face(values)


def mindformers_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors by their MindFormers names, whichever side they come from."""
    if not is_hugging_face(tensors):
        return dict(tensors)
    return {
        to_mindformers(name): array
        for name, array in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def load_llama(path: PathLike, config: LlamaConfig | None = None) -> Any:
    """Return a float :class:`slim_mindspore.llama.LlamaForCausalLM` with its weights.

    Parameters
    ----------
    path : path
        A Hugging Face directory, or a ``.ckpt`` or safetensors file of either side's names.
    config : LlamaConfig, optional
        Sizes; read from the ``config.json`` beside the weights if None.

    Raises
    ------
    FileNotFoundError, FileSecurityError, CheckpointError, StructureError
        The files are not there, unsafe, damaged, or do not fit the sizes.
    """
    from slim_mindspore.llama import LlamaForCausalLM

    sizes = config or read_config(path)
    tensors = mindformers_tensors(load_tensors(path))
    if sizes.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    network = LlamaForCausalLM(sizes)
    load_into(network, tensors, str(path))
    return network


def load_any(path: PathLike, config: LlamaConfig | None = None) -> Any:
    """Return a Llama of a float or a quantized checkpoint, whichever is at ``path``.

    Parameters and errors are those of :func:`load_llama` and
    :func:`slim_mindspore.load.load_quantized`.
    """
    from slim_mindspore.load import is_quantized_file, load_quantized

    return load_quantized(path, config) if is_quantized_file(path) else load_llama(path, config)
