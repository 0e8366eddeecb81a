"""Opening a checkpoint by its headers and loading its tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from slim_core.checkpoint.discover import (
    SAFETENSORS,
    WeightFiles,
    find_weight_files,
    read_json_object,
)
from slim_core.checkpoint.safetensors_file import SafetensorsFile
from slim_core.checkpoint.side_files import CONFIG_FILE, find_side_files
from slim_core.checkpoint.tensor_info import TensorInfo
from slim_core.checkpoint.torch_shard import TorchShard
from slim_core.errors import CheckpointError
from slim_core.files import PathLike, as_path
from slim_core.validate import did_you_mean


class Shard(Protocol):
    """A weight file whose header has been read."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]

    def load(self, name: str) -> np.ndarray:
        """Read one tensor into an array of its own."""

    def will_load(self, name: str) -> None:
        """Let the system read a tensor ahead, if it can."""


class Checkpoint:
    """The weights, configuration and further files of a model; made by :func:`open_checkpoint`.

    Attributes
    ----------
    path : Path
        The directory or the single file.
    tensors : mapping of str to TensorInfo
        Every stored tensor, in the order of the files.
    aliases : mapping of str to str
        Tensors of a ``.bin`` file that are the same view of the same storage as an earlier one,
        with the name of that one.  Both names are in ``tensors``.  A tensor that is not stored
        since ``tie_word_embeddings`` implies it is not there at all.
    config : dict
        Content of ``config.json``; empty for a single file or if there is none.
    """

    def __init__(self, path: Path, files: WeightFiles, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._shards: dict[Path, Shard] = {file: _open_shard(file) for file in files.files}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(self._shards))
        if files.weight_map is not None:
            _compare_with_index(files, self.tensors)
        self.aliases: Mapping[str, str] = MappingProxyType(
            {name: same for shard in self._shards.values() for name, same in shard.aliases.items()}
        )

    def load(self, name: str) -> np.ndarray:
        """Read one tensor.

        Parameters
        ----------
        name : str
            A key of ``tensors``.

        Returns
        -------
        numpy.ndarray
            C-contiguous, writable, with memory of its own.

        Raises
        ------
        CheckpointError
            There is no such tensor, or the file has been cut short since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}",
                hint=did_you_mean(name, list(self.tensors)),
            )
        return self._shards[info.file].load(name)

    def will_load(self, names: Iterable[str]) -> None:
        """Let the system read tensors ahead, into its own memory, while other work is done.

        Names of tensors that are not there are passed over.
        """
        for name in names:
            info = self.tensors.get(name)
            if info is not None:
                self._shards[info.file].will_load(name)

    def iter_shards(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield each weight file with its tensors, in the order of their bytes.

        Loading them in this order reads every file once, front to back.
        """
        for file, shard in self._shards.items():
            yield file, list(shard.tensors)

    def side_files(self) -> list[Path]:
        """Return every file beside the weights that a complete copy of the model needs.

        Tokenizer, chat template, code, configuration ...; no weights of any framework, no index,
        no description of a quantized checkpoint, no hidden file, no sub-directory.
        """
        return find_side_files(self.path) if self.path.is_dir() else []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared ones counted once."""
        return sum(info.nbytes for name, info in self.tensors.items() if name not in self.aliases)


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a checkpoint; only headers are read and checked.

    Parameters
    ----------
    path : path
        A directory in the layout of Hugging Face (safetensors, or ``pytorch_model*.bin``, single
        or in shards with or without index; see :func:`find_weight_files` for which go first),
        which quantized checkpoints have too; or one ``.safetensors``, ``.bin`` or ``.pt`` file.

    Raises
    ------
    FileNotFoundError
        There is nothing at ``path``.
    FileSecurityError
        A file could have been tampered with, see :func:`slim_core.files.check_input_file`.
    CheckpointError
        Files are missing, damaged or contradict one another; names the file and the tensor.
    """
    root = as_path("path", path)
    if not root.exists():
        raise FileNotFoundError(f"no such file or directory: {root}")
    if not root.is_dir():
        return Checkpoint(root, WeightFiles((root,)), {})
    config = root / CONFIG_FILE
    return Checkpoint(
        root, find_weight_files(root), read_json_object(config) if config.exists() else {}
    )


def _open_shard(file: Path) -> Shard:
    return SafetensorsFile(file) if file.suffix == SAFETENSORS else TorchShard(file)


def _merge(shards: Mapping[Path, Shard]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, shard in shards.items():
        for name, info in shard.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{name} is both in {tensors[name].file.name} and in {file}")
            tensors[name] = info
    return tensors


def _compare_with_index(files: WeightFiles, tensors: Mapping[str, TensorInfo]) -> None:
    weight_map = files.weight_map or {}
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{files.index} says that {name} is in {file}; it is not")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{info.file} holds {name}, which {files.index} does not list")
