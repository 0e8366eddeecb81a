"""Whole directories: compress, open, verify and decompress a checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slim_compress.codec import (
    Compressed,
    StreamInfo,
    check,
    compress,
    decompress,
    decompress_tile,
    inspect,
)
from slim_compress.config import CompressConfig
from slim_compress.description import (
    WEIGHT_FILE,
    compressed_description,
    description_file,
    is_sparse_weight,
    refuse_16_bit,
    restored_description,
    tensor_types,
    types_of,
)
from slim_compress.device import compress_for_device
from slim_compress.errors import VerificationError
from slim_compress.quant_types import QuantType
from slim_core.checkpoint import Checkpoint, ShardWriter, copy_side_files, open_checkpoint
from slim_core.checkpoint.discover import read_json_object
from slim_core.errors import CheckpointError, InvalidValueError, PatternError
from slim_core.files import PathLike, as_path, check_output_dir, staged_dir, write_json
from slim_core.progress import track
from slim_core.validate import check_int, check_type, did_you_mean

_PARTS = (".weight", ".index", ".info")
_SPARSE_FILE = "quant_model_weight_w8a8s"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did.

    Attributes
    ----------
    tensors : int
        Weights compressed or restored.
    raw_bytes, stored_bytes : int
        Of these weights, before and after compression (index and info included).
    total_raw_bytes, total_stored_bytes : int
        Of all tensors of the checkpoint, before and after.
    """

    tensors: int
    raw_bytes: int
    stored_bytes: int
    total_raw_bytes: int
    total_stored_bytes: int


class CompressedCheckpoint:
    """A directory with compressed weights, seen as the W8A8S checkpoint that it was made from.

    Made by :func:`open_compressed`.

    Attributes
    ----------
    path : Path
    description : dict
        The stored description.
    types : dict of str to str
        Type of each tensor of the original, in the order of the description; without a tied
        head that is described and not stored.
    compressed : list of str
        Weights that are stored compressed.
    """

    def __init__(self, checkpoint: Checkpoint, description: dict[str, Any]) -> None:
        self.path = checkpoint.path
        self.checkpoint = checkpoint
        self.description = description
        stored = types_of(checkpoint.tensors, tensor_types(description))
        self.compressed = [
            name
            for name, kind in stored.items()
            if kind == QuantType.W8A8SC_SLC1 and name.endswith(".weight")
        ]
        _check_parts(self.compressed, stored)
        types = tensor_types(restored_description(description, self.compressed))
        self.types = {name: kind for name, kind in types.items() if name in stored}

    def load(self, name: str, *, jobs: int = 1) -> np.ndarray:
        """Return a tensor of the original; a compressed one is decoded.

        Parameters
        ----------
        name : str
            A key of ``types``.
        jobs : int
            Threads.

        Raises
        ------
        CheckpointError
            There is no such tensor.
        CorruptStreamError
            Its stream is damaged; names tensor, tile and reason.
        """
        if name not in self.types:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}", hint=did_you_mean(name, list(self.types))
            )
        if name not in self.compressed:
            return self.checkpoint.load(name)
        stream = self.stream(name)
        transposed = inspect(*stream, name=name).transposed
        matrix = decompress(*stream, jobs=jobs, name=name)
        return matrix.T if transposed else matrix

    def tensors(self, *, jobs: int = 1) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and array of every tensor of the original, one in memory at a time."""
        for name in self.types:
            yield name, self.load(name, jobs=jobs)

    def stream(self, name: str) -> Compressed:
        """Return the stored arrays of a compressed weight."""
        stem = name.removesuffix(".weight")
        return Compressed(*(self.checkpoint.load(stem + part) for part in _PARTS))

    def tile(self, name: str, row: int, col: int) -> np.ndarray:
        """Return one tile of a compressed weight; see :func:`slim_compress.decompress_tile`."""
        stream = self.stream(name)
        return decompress_tile(stream.weight, stream.index, stream.info, row, col, name=name)

    def facts(self, name: str) -> StreamInfo:
        """Return what the header of a compressed weight says."""
        return inspect(*self.stream(name), name=name)


def open_compressed(path: PathLike) -> CompressedCheckpoint:
    """Open a directory that :func:`compress_checkpoint` or ``export_safetensors`` wrote.

    Raises
    ------
    CheckpointError
        The directory is no checkpoint, has no description, or the two do not match.
    """
    directory = as_path("path", path)
    return CompressedCheckpoint(open_checkpoint(directory), read_description(directory))


def read_description(directory: Path) -> dict[str, Any]:
    """Return the one ``quant_model_description*.json`` of a directory.

    Raises
    ------
    CheckpointError
        There is none, or several of which none has the plain name.
    """
    found = sorted(directory.glob("quant_model_description*.json"))
    plain = directory / "quant_model_description.json"
    if plain in found:
        return read_json_object(plain)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"{directory} must have one quant_model_description.json; it has: {names}"
        )
    return read_json_object(found[0])


def compress_checkpoint(
    source: PathLike,
    target: PathLike,
    config: CompressConfig | None = None,
    *,
    verify: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
) -> Summary:
    """Compress a W8A8S checkpoint into a new directory, one tensor in memory at a time.

    Parameters
    ----------
    source : path
        Directory with safetensors and ``quant_model_description*.json``.
    target : path
        Takes its name when it is complete; tokenizer, configuration and the like are copied.
    config : CompressConfig, optional
    verify : bool
        Decode each weight again and compare (slc1).
    overwrite : bool
        Replace a directory that is there.
    max_shard_bytes : int, optional
        As :class:`slim_core.checkpoint.ShardWriter`.

    Raises
    ------
    CheckpointError
        The source is damaged, has no sparse weight, or its description does not match.
    PatternError
        A layer to disable does not exist.
    OutputExistsError
        ``target`` is there already.
    VerificationError
        A weight did not come back as it was.
    """
    config = config or CompressConfig()
    check_type("verify", verify, bool)
    directory = as_path("source", source)
    check_output_dir(target, overwrite=overwrite)
    checkpoint, description = open_checkpoint(directory), read_description(directory)
    types = types_of(checkpoint.tensors, tensor_types(description))
    refuse_16_bit(types)
    names = _chosen(checkpoint, types, config.compress_disable_layers)
    if verify and config.codec == "device":
        raise InvalidValueError("verify is not possible with codec='device': only hardware decodes")
    counts = {"raw": 0, "stored": 0, "total": 0}
    with staged_dir(target, overwrite=overwrite) as staged:
        copy_side_files(checkpoint, staged)
        prefix = WEIGHT_FILE.removesuffix(".safetensors")
        with ShardWriter(staged, prefix, max_shard_bytes=max_shard_bytes) as writer:
            for name in track(list(types), "compressing"):
                array = checkpoint.load(name)
                if name in names:
                    stream = _compress(array, config, name, staged)
                    if verify:
                        _compare(name, array, decompress(*stream, jobs=config.multiprocess_num))
                    stored = {
                        name.removesuffix(".weight") + part: value
                        for part, value in zip(_PARTS, stream, strict=True)
                    }
                    counts["raw"] += array.nbytes
                    counts["stored"] += sum(value.nbytes for value in stored.values())
                else:
                    stored = {name: array}
                for key, value in stored.items():
                    writer.add(key, value)
                    counts["total"] += value.nbytes
        done = compressed_description(description, names, config.codec)
        write_json(staged / description_file(description, "w8a8sc"), done)
    return Summary(len(names), counts["raw"], counts["stored"], checkpoint.nbytes, counts["total"])


def decompress_checkpoint(
    source: PathLike,
    target: PathLike,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
) -> Summary:
    """Restore the W8A8S checkpoint of a compressed directory.

    Parameters
    ----------
    source, target : path
    jobs : int
        Threads.
    overwrite, max_shard_bytes
        As :func:`compress_checkpoint`.

    Raises
    ------
    CheckpointError, CorruptStreamError, OutputExistsError
        As :func:`open_compressed`, :meth:`CompressedCheckpoint.load`, :func:`compress_checkpoint`.
    """
    check_int("jobs", jobs, low=1)
    check_output_dir(target, overwrite=overwrite)
    compressed = open_compressed(source)
    description = restored_description(compressed.description, compressed.compressed)
    raw = total = 0
    with staged_dir(target, overwrite=overwrite) as staged:
        copy_side_files(compressed.checkpoint, staged)
        with ShardWriter(staged, _SPARSE_FILE, max_shard_bytes=max_shard_bytes) as writer:
            for name in track(list(compressed.types), "decompressing"):
                array = compressed.load(name, jobs=jobs)
                writer.add(name, array)
                total += array.nbytes
                raw += array.nbytes if name in compressed.compressed else 0
        write_json(staged / description_file(description, "w8a8s"), description)
    stored = compressed.checkpoint.nbytes
    return Summary(len(compressed.compressed), raw, raw + stored - total, total, stored)


def verify_checkpoint(path: PathLike, original: PathLike | None = None, *, jobs: int = 1) -> int:
    """Decode every compressed weight of a directory, checking all checksums.

    Parameters
    ----------
    path : path
    original : path, optional
        The W8A8S directory that it was made from: every tensor is compared with it.
    jobs : int
        Threads.

    Returns
    -------
    int
        Compressed weights checked.

    Raises
    ------
    CorruptStreamError
        A stream is damaged; names tensor, tile and reason.
    VerificationError
        A tensor differs from the original, or only one of the two has it.
    """
    check_int("jobs", jobs, low=1)
    compressed = open_compressed(path)
    source = open_checkpoint(original) if original is not None else None
    if source is not None and set(source.tensors) != set(compressed.types):
        odd = sorted(set(source.tensors) ^ set(compressed.types))
        raise VerificationError(f"{odd[0]} is only in one of {compressed.path} and {source.path}")
    if source is None:
        for name in track(compressed.compressed, "verifying"):
            check(*compressed.stream(name), jobs=jobs, name=name)
    else:
        for name in track(list(compressed.types), "verifying"):
            _compare(name, source.load(name), compressed.load(name, jobs=jobs))
    return len(compressed.compressed)


def _chosen(
    checkpoint: Checkpoint, types: dict[str, str], disabled: Collection[str]
) -> dict[str, None]:
    """Return the weights to compress, an ordered set."""
    unknown = [name for name in disabled if name not in types]
    if unknown:
        raise PatternError(
            f"compress_disable_layers names {unknown[0]!r}, which {checkpoint.path} does not have",
            hint=did_you_mean(unknown[0], list(types)),
        )
    names = {
        name: None
        for name, kind in types.items()
        if is_sparse_weight(name, kind) and name not in disabled
    }
    if not names:
        raise CheckpointError(f"{checkpoint.path} has no sparse weight (type W8A8S) to compress")
    for name in names:
        info = checkpoint.tensors[name]
        if info.dtype != np.int8 or len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{name} is typed W8A8S, but is {info.dtype} of shape {info.shape}: no int8 matrix"
            )
    return names


def _compress(array: np.ndarray, config: CompressConfig, name: str, scratch: Path) -> Compressed:
    if config.codec == "slc1" or config.executor is None:
        return compress(array, jobs=config.multiprocess_num, fast=config.fast, name=name)
    return compress_for_device(
        array,
        executor=config.executor,
        root=scratch,
        timeout=config.executor_timeout,
        name=name,
    )


def _compare(name: str, expected: np.ndarray, found: np.ndarray) -> None:
    same = expected.dtype == found.dtype and expected.shape == found.shape
    if not same or not np.array_equal(_as_bytes(expected), _as_bytes(found)):
        raise VerificationError(f"{name}: the stored tensor differs from the original")


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_parts(names: list[str], stored: dict[str, str]) -> None:
    for name in names:
        for part in _PARTS[1:]:
            if name.removesuffix(".weight") + part not in stored:
                raise CheckpointError(f"{name} is compressed but has no {part.lstrip('.')} tensor")
