"""Named tensors of a network: loading them from any file, and into a network, strictly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from slim_core.errors import CheckpointError
from slim_core.files import PathLike, as_path, make_dir
from slim_mindspore.ckpt import read_ckpt, write_ckpt

WEIGHT_SUFFIXES = (".ckpt", ".safetensors")
_SHOWN = 8


def load_tensors(path: PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a ``.ckpt`` or safetensors file, or of a directory of either.

    Parameters
    ----------
    path : path
        A file, a Hugging Face directory, or a directory with exactly one ``.ckpt`` file.

    Raises
    ------
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    CheckpointError
        There are no weights, several ``.ckpt`` files, or damaged ones.
    """
    source = as_path("path", path)
    if source.is_dir():
        files = sorted(source.glob("*.ckpt"))
        if len(files) > 1:
            raise CheckpointError(
                f"{source} holds {len(files)} .ckpt files; name one of them",
                hint=", ".join(file.name for file in files[:_SHOWN]),
            )
        if files:
            return read_ckpt(files[0])
    elif source.suffix == ".ckpt" or not source.exists():
        return read_ckpt(source)
    checkpoint = open_checkpoint(source)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def compare_names(
    what: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]
) -> None:
    """Require exactly the expected tensors, of the expected shapes.

    Raises
    ------
    CheckpointError
        Lists the missing, the unexpected and the misshapen ones.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name].shape}, the network {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
        rest = f"\n  - and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{what} does not fit the network:{lines}{rest}")


def load_into(
    network: Any, tensors: Mapping[str, np.ndarray], what: str = "the checkpoint"
) -> None:
    """Set every parameter of a network, converting between floating-point dtypes.

    MindSpore's own loading reports names that do not match in a list that is easily overlooked;
    here they are errors.

    Parameters
    ----------
    network : Cell
    tensors : mapping of str to numpy.ndarray
        Exactly the parameters of the network.
    what : str
        What errors call the source.

    Raises
    ------
    CheckpointError
        A parameter is missing, unexpected, or of another shape or kind; nothing was set.
    """
    from slim_mindspore.framework import Tensor, ms

    parameters = dict(network.parameters_and_names())
    compare_names(what, {name: p.shape for name, p in parameters.items()}, tensors)
    for name, parameter in parameters.items():
        integer = np.issubdtype(tensors[name].dtype, np.integer)
        if integer != ("Int" in str(parameter.dtype)):
            raise CheckpointError(
                f"{what}: {name} is {tensors[name].dtype}, the network wants {parameter.dtype}"
            )
    for name, parameter in parameters.items():
        array = tensors[name]
        if not np.issubdtype(array.dtype, np.integer):
            array = array.astype(np.float64 if parameter.dtype == ms.float64 else np.float32)
        parameter.set_data(Tensor(np.ascontiguousarray(array)).astype(parameter.dtype))


def parameters_of(network: Any) -> dict[str, np.ndarray]:
    """Return the parameters of a network as numpy arrays, bfloat16 as of ml_dtypes."""
    import ml_dtypes

    from slim_mindspore.framework import ms

    arrays = {}
    for name, parameter in network.parameters_and_names():
        if parameter.dtype == ms.bfloat16:
            exact = parameter.astype(ms.float32).asnumpy()
            arrays[name] = exact.astype(ml_dtypes.bfloat16)
        else:
            arrays[name] = parameter.asnumpy()
    return arrays


def write_tensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], int4: frozenset[str] = frozenset()
) -> Path:
    """Write a ``.ckpt`` or ``.safetensors`` file, mode 0400, creating its directory.

    Parameters
    ----------
    path : path
        Ends in one of ``WEIGHT_SUFFIXES``.
    tensors : mapping of str to numpy.ndarray
    int4 : set of str
        Names of packed tensors that a ``.ckpt`` marks ``Int4``.
    """
    file = as_path("path", path)
    make_dir(file.parent)
    if file.suffix == ".ckpt":
        write_ckpt(file, tensors, int4=int4)
        return file
    with ShardWriter(file.parent, file.stem) as writer:
        for name, array in tensors.items():
            writer.add(name, np.asarray(array))
    return file


def model_dir(path: PathLike) -> Path:
    """Return the directory of a model given by its directory or its weight file."""
    source = as_path("path", path)
    return source if source.is_dir() else source.parent


def model_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Return the dtype that most tensors of a float model have."""
    counts = Counter(np.dtype(info.dtype) for info in checkpoint.tensors.values())
    return counts.most_common(1)[0][0]


def owner_of(name: str, cells: Container[str]) -> str | None:
    """Return the longest of the cells that a tensor lies in, None if it lies in none."""
    while (name := name.rpartition(".")[0]) and name not in cells:
        pass
    return name or None
