"""Which files of a directory are the checkpoint, and do they form a whole one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.errors import CheckpointError
from slim_core.files import check_input_file

SAFETENSORS = ".safetensors"
BIN = ".bin"
_MAX_JSON_BYTES = 256 << 20
_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.\w+")
# What transformers looks for, first.
_PREFERRED = {SAFETENSORS: "model", BIN: "pytorch_model"}


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Weight files in the order of their names and, from the index, the file of each tensor."""

    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None
    index: Path | None = None


def find_weight_files(directory: Path) -> WeightFiles:
    """Choose the weight files of a directory.

    safetensors files go before ``pytorch_model*.bin`` files.  Of each kind ``model`` (or
    ``pytorch_model``) goes first, whole before indexed, then any one other name, indexed or not.

    Raises
    ------
    CheckpointError
        There are none, several that could be meant, or some shards are missing.
    """
    names = sorted(file.name for file in directory.iterdir() if not file.name.startswith("."))
    for suffix, preferred in _PREFERRED.items():
        weights = [name for name in names if name.endswith(suffix)]
        if suffix == BIN:  # training_args.bin and the like are no weights
            weights = [name for name in weights if name.startswith(preferred)]
        indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
        found = _choose(directory, weights, indexes, preferred + suffix)
        if found is not None:
            return found
    raise CheckpointError(
        f"{directory} has no weights: neither *.safetensors nor pytorch_model*.bin",
        hint=f"it has {', '.join(names[:8])}" if names else "it is empty",
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises
    ------
    CheckpointError
        It is not JSON, or something other than an object.
    """
    text = check_input_file(path, max_bytes=_MAX_JSON_BYTES).read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _choose(
    directory: Path, weights: list[str], indexes: list[str], preferred: str
) -> WeightFiles | None:
    if preferred in weights:
        return WeightFiles((directory / preferred,))
    preferred_index = f"{preferred}.index.json"
    if preferred_index in indexes:
        indexes = [preferred_index]
    if len(indexes) > 1:
        raise _ambiguous(directory, indexes)
    if indexes:
        return _read_index(directory / indexes[0], Path(preferred).suffix)
    groups: dict[str, list[str]] = {}
    for name in weights:
        shard = _SHARD.fullmatch(name)
        groups.setdefault(shard["prefix"] if shard else name, []).append(name)
    if len(groups) > 1:
        raise _ambiguous(directory, groups)
    for group in groups.values():
        _check_complete(directory, group)
        return WeightFiles(tuple(directory / name for name in group))
    return None


def _ambiguous(directory: Path, candidates: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{directory} holds more than one checkpoint: {', '.join(sorted(candidates))}",
        hint="give the path of one file, or keep only one in the directory",
    )


def _check_complete(directory: Path, names: list[str]) -> None:
    shards = [shard for shard in map(_SHARD.fullmatch, names) if shard]
    counts = {int(shard["count"]) for shard in shards}
    if len(counts) > 1:
        raise CheckpointError(f"{directory} mixes shards of two checkpoints: {', '.join(names)}")
    have = {int(shard["number"]) for shard in shards}
    for count in counts:
        missing = [
            number for number in range(1, min(count, len(have) + 1) + 1) if number not in have
        ]
        if missing:
            raise CheckpointError(
                f"{directory}: shard {missing[0]} of {count} of {shards[0]['prefix']} is missing"
            )


def _read_index(index: Path, suffix: str) -> WeightFiles:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise CheckpointError(f"{index}: {name} is in {file!r:.80}, not in a {suffix} file")
    files = tuple(index.parent / file for file in sorted(set(weight_map.values())))
    for path in files:
        if not path.exists():
            raise CheckpointError(f"{index} lists {path.name}, which is missing")
    return WeightFiles(files, weight_map, index)
