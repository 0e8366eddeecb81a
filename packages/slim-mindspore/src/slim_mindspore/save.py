"""Writing quantized networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.attention_types import AFTER_ROTARY
from slim_core.checkpoint import copy_side_files, open_checkpoint
from slim_core.errors import CheckpointError, PlanError
from slim_core.export import CheckpointExport
from slim_core.files import PathLike, as_path, staged_dir, write_json
from slim_core.formats import DESCRIPTION_FILE, FORMATS
from slim_core.validate import check_choice
from slim_mindspore.ascend_format import check_ascend
from slim_mindspore.cache_format import CACHE_TYPE, encode_cache
from slim_mindspore.layouts import (
    COMPUTE_DTYPES,
    LAYOUT_OF,
    LAYOUTS,
    PACKED,
    encode_layer,
    unsupported,
)
from slim_mindspore.names import to_hugging_face
from slim_mindspore.quantize import QuantizedNetwork
from slim_mindspore.quantized_layer import type_name
from slim_mindspore.tensors import (
    WEIGHT_SUFFIXES,
    model_dtype,
    owner_of,
    parameters_of,
    write_tensors,
)


def default_layout(quantized: QuantizedNetwork) -> str:
    """Return the layout that Golden Stick uses for the method."""
    return LAYOUT_OF[quantized.config.quant_method]


def save_quantized(
    quantized: QuantizedNetwork,
    path: PathLike,
    *,
    layout: str | None = None,
    compute_dtype: str = "float32",
) -> Path:
    """Write a ``.ckpt`` or ``.safetensors`` file and ``quant_model_description.json`` beside it.

    Parameters
    ----------
    quantized : QuantizedNetwork
    path : path
        Its suffix decides the file type; directories are created with mode 0750, the weights get
        0400 and the description 0600.
    layout : str, optional
        One of :data:`slim_mindspore.layouts.LAYOUTS`; that of the method if None.
    compute_dtype : str
        ``float32`` or ``float16``: the dtype of float tensors and of the scales that the layout
        keeps in it.

    Raises
    ------
    InvalidValueError
        The suffix, layout or dtype is unknown.
    PlanError
        Layers that the layout cannot hold; lists all of them.
    FormatError
        A value does not fit its place in the file; names the layer.
    """
    file = as_path("path", path)
    check_choice("the suffix of path", file.suffix, WEIGHT_SUFFIXES)
    chosen = check_choice("layout", layout or default_layout(quantized), LAYOUTS)
    check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
    check_layout(quantized, chosen)
    tensors, types, int4 = _collect(quantized, chosen, np.dtype(compute_dtype))
    write_tensors(file, tensors, frozenset(int4))
    write_json(file.with_name(DESCRIPTION_FILE), _header(quantized) | types)
    return file


def check_layout(quantized: QuantizedNetwork, layout: str) -> None:
    """Require that a layout can hold every layer; as in :func:`save_quantized`."""
    problems = [
        f"{name}: {problem}"
        for name, result in quantized.layers.items()
        if (problem := unsupported(layout, result))
    ]
    if problems:
        raise PlanError(problems, hint="layout gs-ptq holds every scheme")


def save_ascend(
    quantized: QuantizedNetwork, source: PathLike, directory: PathLike, overwrite: bool = False
) -> Path:
    """Write a directory in the ``ascend_v1`` format with the names of Hugging Face.

    Engines and slim-ptq read it like what slim-ptq writes.  Tensors that are not quantized, nor
    smoothed norms, are those of the source, bit for bit.

    Parameters
    ----------
    quantized : QuantizedNetwork
        Of a Llama.
    source : path
        Directory of the float model; its configuration and tokenizer are copied.
    directory : path
        Must not exist, or be empty, unless ``overwrite``.
    overwrite : bool
        Replace what the directory holds.

    Raises
    ------
    FormatError
        As :func:`slim_mindspore.layouts.check_ascend`.
    OutputExistsError
        The directory is not empty.
    CheckpointError
        The source is not the model that was quantized.
    """
    check_ascend(quantized.config)
    checkpoint = open_checkpoint(source)
    by_cell = {to_hugging_face(name): result.layer for name, result in quantized.layers.items()}
    floats = parameters_of(quantized.network)
    changed = {to_hugging_face(name): floats[name] for name in quantized.changed if name in floats}
    missing = [name for name in by_cell if f"{name}.weight" not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{checkpoint.path} has no {missing[0]}.weight")
    kind = _model_type(quantized)
    group = max((layer.scheme.group_size for layer in by_cell.values()), default=0)
    dtype = model_dtype(checkpoint)
    with staged_dir(directory, overwrite=overwrite) as folder:
        form = FORMATS["ascend_v1"]
        with CheckpointExport(folder, form, model_type=kind, group_size=group) as export:
            for name in checkpoint.tensors:
                cell, _, local = name.rpartition(".")
                if cell not in by_cell:
                    array = checkpoint.load(name)
                    if name in changed:
                        array = changed[name].astype(array.dtype)
                    export.add_float(name, array)
                elif local == "weight":
                    export.add_layer(_with_dtype(by_cell[cell], cell, dtype))
            _add_caches(export, quantized)
        copy_side_files(checkpoint, folder)
    return as_path("directory", directory)


def _with_dtype(layer: Any, name: str, dtype: np.dtype) -> Any:
    bias = None if layer.bias is None else np.asarray(layer.bias).astype(dtype)
    return replace(layer, name=name, model_dtype=dtype.name, bias=bias)


def _add_caches(export: CheckpointExport, quantized: QuantizedNetwork) -> None:
    for attention, scales in quantized.caches.items():
        for cell, scale in (("wk", scales.key), ("wv", scales.value)):
            name = to_hugging_face(f"{attention}.{cell}")
            export.add_float(f"{name}.kv_cache_scale", scale, CACHE_TYPE)
            export.add_float(f"{name}.kv_cache_offset", np.zeros_like(scale), CACHE_TYPE)
    if quantized.caches:
        export.note(AFTER_ROTARY, True)


def _collect(
    quantized: QuantizedNetwork, layout: str, dtype: np.dtype
) -> tuple[dict[str, np.ndarray], dict[str, str], set[str]]:
    """Return the tensors of the file, their types and the names of packed int4 tensors."""
    tensors: dict[str, np.ndarray] = {}
    types: dict[str, str] = {}
    int4: set[str] = set()
    written: set[str] = set()
    for name, array in parameters_of(quantized.network).items():
        cell = owner_of(name, quantized.layers)
        if cell is None:
            if not name.rpartition(".")[0].endswith((".key_quant", ".value_quant")):
                tensors[name] = array.astype(dtype)
                types[name] = "FLOAT"
        elif cell not in written:
            written.add(cell)
            result = quantized.layers[cell]
            kind = type_name(result.layer.scheme)
            named = {f"{cell}.{k}": v for k, v in encode_layer(layout, result, dtype).items()}
            tensors |= named
            types |= dict.fromkeys(named, kind)
            if kind.startswith("W4"):
                int4.add(f"{cell}.{PACKED}")
    for attention, scales in quantized.caches.items():
        named = {f"{attention}.{k}": v for k, v in encode_cache(scales, dtype).items()}
        tensors |= named
        types |= dict.fromkeys(named, CACHE_TYPE)
    return tensors, types, int4


def _header(quantized: QuantizedNetwork) -> dict[str, Any]:
    config = quantized.config.model_dump(mode="json")
    return {
        "version": "1.0.0",
        "model_quant_type": _model_type(quantized),
        "quantization_config": config,
    }


def _model_type(quantized: QuantizedNetwork) -> str:
    """Return the type of most layers, FLOAT if there are none."""
    counts = Counter(type_name(result.layer.scheme) for result in quantized.layers.values())
    return counts.most_common(1)[0][0] if counts else "FLOAT"
