"""Float checkpoints of the Llama family between Hugging Face and MindSpore; needs no MindSpore."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError, InvalidValueError
from slim_core.files import (
    PathLike,
    as_path,
    check_input_file,
    check_output_dir,
    staged_dir,
    write_bytes,
)
from slim_mindspore.hub import mindformers_tensors
from slim_mindspore.names import is_hugging_face, to_hugging_face
from slim_mindspore.tensors import WEIGHT_SUFFIXES, load_tensors, model_dir, write_tensors

CONFIG = "config.json"
SIDE_SUFFIXES = (".json", ".model", ".txt", ".jinja")
OWN_FILES = ("quant_model_description", "slim_report", "model.safetensors.index")


def convert_checkpoint(
    source: PathLike, target: PathLike, *, config_from: PathLike | None = None
) -> str:
    """Convert a float checkpoint to the other side's names, keeping every dtype.

    Parameters
    ----------
    source : path
        A Hugging Face directory or safetensors file, or a MindSpore ``.ckpt``.
    target : path
        From Hugging Face: a ``.ckpt`` or ``.safetensors`` file; ``config.json`` and tokenizer files
        are put beside it.  From MindSpore: a new directory.
    config_from : path, optional
        Directory of the ``config.json`` and tokenizer files for a Hugging Face directory; that of
        the source if None.

    Returns
    -------
    str
        ``mindformers`` or ``hugging_face``: the side that was written.

    Raises
    ------
    CheckpointError
        The tensors are not those of a Llama.
    InvalidValueError
        The target does not suit the direction.
    OutputExistsError
        The directory is not empty.
    """
    tensors = load_tensors(source)
    if is_hugging_face(tensors):
        _to_mindspore(source, target, tensors)
        return "mindformers"
    _to_hugging_face(source, target, tensors, config_from)
    return "hugging_face"


def _to_mindspore(source: PathLike, target: PathLike, tensors: dict[str, np.ndarray]) -> None:
    file = as_path("target", target)
    if file.suffix not in WEIGHT_SUFFIXES:
        raise InvalidValueError(f"target must end in .ckpt or .safetensors, not {file.name!r}")
    write_tensors(file, mindformers_tensors(tensors))
    path = as_path("source", source)
    _copy(open_checkpoint(path).side_files() if path.is_dir() else [], file.parent)


def _to_hugging_face(
    source: PathLike,
    target: PathLike,
    tensors: dict[str, np.ndarray],
    config_from: PathLike | None,
) -> None:
    check_output_dir(target)
    origin = as_path("config_from", config_from or model_dir(source))
    if not (origin / CONFIG).is_file():
        raise CheckpointError(
            f"{origin} has no {CONFIG} for the Hugging Face directory",
            hint="name a directory that has one by config_from (--config-from)",
        )
    renamed = {to_hugging_face(name): array for name, array in tensors.items()}
    sides = [
        file
        for file in sorted(origin.iterdir())
        if file.suffix in SIDE_SUFFIXES and not file.name.startswith(OWN_FILES)
    ]
    with staged_dir(target) as folder:
        write_tensors(folder / "model.safetensors", renamed)
        _copy(sides, folder)


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        write_bytes(folder / file.name, check_input_file(file).read_bytes())
