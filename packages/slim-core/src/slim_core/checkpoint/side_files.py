"""The files of a model other than its weights: finding them and copying them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim_core.errors import OutputExistsError
from slim_core.files import PathLike, as_path, atomic_write, check_input_file, write_json

if TYPE_CHECKING:
    from slim_core.checkpoint.reader import Checkpoint

CONFIG_FILE = "config.json"
# What slim writes beside weights to tell how they were made: it is not true of other weights.
_OWN_FILES = (
    "slim_report.json",
    "slim_report.html",
    "slim_recipe.yaml",
    "slim_lowrank_report.json",
)
_WEIGHT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "ot", "npy", "npz", "dat"),
        *("gguf", "ggml", "onnx", "onnx_data", "om", "mindir", "tflite", "pdparams", "mlmodel"),
    )
)


def find_side_files(directory: Path) -> list[Path]:
    """Return the files directly in a directory that are neither weights nor speak of them.

    Reports and recipes of slim speak of the weights too.
    """
    return sorted(
        file
        for file in directory.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in _OWN_FILES
        and file.suffix not in _WEIGHT_SUFFIXES
        and not file.name.endswith("index.json")
        and not file.match("quant_model_description*.json")
    )


def copy_side_files(
    checkpoint: Checkpoint, target_dir: PathLike, config_changes: Mapping[str, Any] | None = None
) -> list[Path]:
    """Copy every side file into a directory, with mode 0600, and return the new paths.

    ``config.json`` loses ``quantization_config``, at the top and within ``text_config``: vLLM would
    take it for the description of the quantized weights.

    Parameters
    ----------
    checkpoint : Checkpoint
    target_dir : path
        Must exist and be another directory.
    config_changes : mapping, optional
        Top-level keys to set in ``config.json``.

    Raises
    ------
    OutputExistsError
        The target is the directory of the checkpoint itself.
    FileSecurityError
        A side file could have been tampered with.
    """
    target = as_path("target_dir", target_dir)
    if target.resolve() == checkpoint.path.resolve():
        raise OutputExistsError(f"{target} is the directory of the checkpoint itself")
    written = []
    for file in checkpoint.side_files():
        if file.name != CONFIG_FILE:
            written.append(_copy(file, target / file.name))
    config = _without_quantization(checkpoint.config) | dict(config_changes or {})
    if config:
        write_json(target / CONFIG_FILE, config)
        written.append(target / CONFIG_FILE)
    return written


def _copy(source: Path, target: Path) -> Path:
    with check_input_file(source).open("rb") as reader, atomic_write(target) as writer:
        shutil.copyfileobj(reader, writer)
    return target


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without_quantization(kept["text_config"])
    return kept
