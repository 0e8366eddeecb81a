"""Saving a model that holds quantized layers, under the file names of the classic interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.export import CheckpointExport
from slim_core.files import as_path, check_output_dir, staged_dir
from slim_core.formats import FORMATS, NpyWriter
from slim_core.layers import QuantizedLinear
from slim_core.logging import get_logger
from slim_core.quantized import ADDED_NORM_BIAS
from slim_core.tensor_parallel import COMMUNICATION_KEYS, GATHER
from slim_core.validate import check_choice, check_int, check_str_list, check_type
from slim_ptq.attention.names import attention_tensors
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.norm_entries import FloatTensor, norm_entries
from slim_ptq.offload import resident
from slim_ptq.structure import is_linear
from slim_ptq.tensor_parallel import ParallelLinear, parallel_tensors, saved_linear
from slim_ptq.tensors import from_numpy, to_numpy
from slim_ptq.transforms import has_added_bias, wrapped_norms

_log = get_logger("ptq")

SAVE_TYPES = {"safe_tensor": "safe_tensor", "ascendV1": "ascend_v1", "numpy": "npy"}
_GIB = 1 << 30


def save_model(
    model: nn.Module,
    output_path: Any,
    *,
    rename: Callable[[str], str],
    model_type: str,
    group_size: int,
    model_dtype: str,
    safetensors_name: str | None,
    json_name: str | None,
    save_type: list[str] | None,
    part_file_size: int | None,
) -> None:
    """Write the model in each of the save types; see :meth:`slim_ptq.Calibrator.save`."""
    if not isinstance(output_path, str):
        raise InvalidTypeError(f"output_path must be str, not {type(output_path).__name__}")
    formats = _formats(save_type)
    if "npy" in formats and _has_two_stages(model):
        formats = _without_npy(formats)
    parallel = [m for m in model.modules() if isinstance(m, ParallelLinear)]
    if parallel and "ascend_v1" in formats:
        raise InvalidValueError(
            "save_type ascendV1 cannot hold the slices of simulate_tp, which no reader of it knows",
            hint="use safe_tensor or numpy",
        )
    weight_file = _file_name("safetensors_name", safetensors_name, ".safetensors")
    description_file = _file_name("json_name", json_name, ".json")
    if part_file_size is not None:
        check_int("part_file_size", part_file_size, low=1)
    with _directory(as_path("output_path", output_path)) as directory:
        for name in formats:
            if name == "npy":
                _save_npy(model, rename, directory)
                continue
            export = CheckpointExport(
                directory,
                FORMATS[name],
                model_type=model_type,
                group_size=group_size,
                weight_file=weight_file and weight_file.removesuffix(".safetensors"),
                description_file=description_file,
                max_shard_bytes=part_file_size and part_file_size * _GIB,
            )
            with export:
                _export(model, rename, export, copies=name == "safe_tensor", model_type=model_type)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """Yield where to write: beside a new directory, which appears when it is complete.

    In a directory with files, such as those of an earlier save, each file is replaced as a whole.
    """
    target = check_output_dir(path, overwrite=True)
    if target.is_dir() and any(target.iterdir()):
        yield target
        return
    with staged_dir(target) as staging:
        yield staging


def iter_tensors(
    model: nn.Module, rename: Callable[[str], str], *, copies: bool
) -> Iterator[QuantizedLinear | FloatTensor]:
    """Yield every layer and tensor of a model under its name in a checkpoint.

    Parameters
    ----------
    rename : callable
        From names in the model to names in the checkpoint.
    copies : bool
        Give each smoothed norm the ``.module`` entries of the ``safe_tensor`` layout.
    """
    wrapped = wrapped_norms(model)
    seen: dict[int, nn.Parameter] = {}  # which also keeps them, so that no number comes again
    for path, module in model.named_modules():
        name = saved_linear(path, rename)
        if isinstance(module, FakeQuantLinear):
            with resident(module, recurse=False):
                yield module.layer(name)
            continue
        own = dict(module.named_parameters(recurse=False))
        tied = {local for local, parameter in own.items() if id(parameter) in seen}
        seen |= {id(parameter): parameter for parameter in own.values()}
        with resident(module, recurse=False):
            shifted = has_added_bias(module) and not is_linear(module)
            for local, parameter in module.named_parameters(recurse=False):
                yield FloatTensor(
                    rename(f"{path}.{local}" if path else local),
                    None if local in tied else parameter,
                    is_added=shifted and local == "bias",
                )
            if path in wrapped:
                yield from norm_entries(name, module, copies=copies)


def _export(
    model: nn.Module,
    rename: Callable[[str], str],
    export: CheckpointExport,
    *,
    copies: bool,
    model_type: str,
) -> None:
    added: list[str] = []
    for item in iter_tensors(model, rename, copies=copies):
        if isinstance(item, QuantizedLinear):
            export.add_layer(item)
        elif item.tensor is None:
            export.describe(item.name, "FLOAT")  # tied: engines look the name up all the same
        else:
            kind = model_type if item.is_copy else "FLOAT"
            export.add_float(item.name, to_numpy(item.tensor), kind)
            if item.is_added:
                added.append(item.name)
    for name, tensor, kind in attention_tensors(model, rename):
        export.add_float(name, to_numpy(tensor), kind)
    for name, tensor, kind in parallel_tensors(model, rename):
        export.add_float(name, to_numpy(tensor), kind)
        if name.endswith(GATHER):
            for key, value in COMMUNICATION_KEYS.items():
                export.describe(key, value)
    if added and not copies:
        export.note(ADDED_NORM_BIAS, added)


def _save_npy(model: nn.Module, rename: Callable[[str], str], directory: Path) -> None:
    writer = NpyWriter(directory, convert=from_numpy)
    form = FORMATS["safe_tensor"]
    for item in iter_tensors(model, rename, copies=True):
        if isinstance(item, QuantizedLinear):
            writer.add(item.name, form.encode(item))
        elif item.tensor is not None:
            layer, _, local = item.name.rpartition(".")
            writer.add(layer, {local: to_numpy(item.tensor)})
    for name, tensor, _ in (
        *attention_tensors(model, rename),
        *parallel_tensors(model, rename),
    ):
        layer, _, local = name.rpartition(".")
        writer.add(layer, {local: to_numpy(tensor)})
    writer.close()


def _formats(save_type: Any) -> list[str]:
    names = check_str_list("save_type", save_type) if save_type is not None else []
    for name in names:
        check_choice("save_type", name, SAVE_TYPES)
    if "ascendV1" in names and len(set(names)) > 1:
        _log.warning("save_type: ascendV1 is written alone, the others are left out")
        names = ["ascendV1"]
    return [SAVE_TYPES[name] for name in dict.fromkeys(names or ["safe_tensor"])]


def _has_two_stages(model: nn.Module) -> bool:
    return any(
        isinstance(module, FakeQuantLinear) and module.scheme.ascend_type == "W4A8_DYNAMIC"
        for module in model.modules()
    )


def _without_npy(formats: list[str]) -> list[str]:
    """Leave out ``npy``, which has no place for the second stage of W4A8_DYNAMIC."""
    others = [name for name in formats if name != "npy"]
    if not others:
        raise InvalidValueError(
            "save_type numpy cannot hold W4A8_DYNAMIC", hint="use safe_tensor or ascendV1"
        )
    _log.error("save_type: numpy is left out, it cannot hold W4A8_DYNAMIC")
    return others


def _file_name(parameter: str, value: Any, suffix: str) -> str | None:
    if value is None:
        return None
    name = check_type(parameter, value, str)
    if not name.endswith(suffix) or Path(name).name != name:
        raise InvalidValueError(f"{parameter} must be a file name ending in {suffix}, not {name!r}")
    return name
