"""The table of ``slim-compress info``."""

from __future__ import annotations

from pathlib import Path

from slim_compress.codec import INFO_LENGTH, Compressed, StreamInfo, decompress, inspect
from slim_compress.statistics import entropy_ratio
from slim_core.checkpoint import Checkpoint, open_checkpoint
from slim_core.errors import CheckpointError


def print_table(path: Path, *, jobs: int = 1) -> None:
    """Print size, ratio and order-0 entropy limit of each compressed weight of a file or directory.

    Raises
    ------
    CheckpointError
        There is no weight compressed with slc1.
    CorruptStreamError
        One is damaged.
    """
    checkpoint = open_checkpoint(path)
    names = [name for name in checkpoint.tensors if _is_stream(checkpoint, name)]
    names.sort(key=_by_number)
    if not names:
        raise CheckpointError(f"{path} has no weight that was compressed with slc1")
    width = max(len("total"), *map(len, names))
    print(f"{'tensor':<{width}} {'n x k':>15} {'bytes':>13} {'ratio':>7} {'entropy':>8}  tiles")
    raw = stored = 0
    limit = 0.0
    for name in names:
        stem = name.removesuffix(".weight")
        stream = Compressed(
            *(checkpoint.load(stem + part) for part in (".weight", ".index", ".info"))
        )
        facts = inspect(*stream, name=name)
        entropy = entropy_ratio(decompress(*stream, jobs=jobs, name=name))
        shape = "{} x {}".format(*facts.shape)
        print(
            f"{name:<{width}} {shape:>15} {facts.stored_bytes:>13,} {facts.ratio:>7.4f} "
            f"{entropy:>8.4f}  {_modes(facts)}"
        )
        raw += facts.raw_bytes
        stored += facts.stored_bytes
        limit += entropy * facts.raw_bytes
    print(f"{'total':<{width}} {raw:>15,} {stored:>13,} {stored / raw:>7.4f} {limit / raw:>8.4f}")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort layer 10 behind layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _is_stream(checkpoint: Checkpoint, name: str) -> bool:
    if not name.endswith(".weight"):
        return False
    info = checkpoint.tensors.get(name.removesuffix(".weight") + ".info")
    return info is not None and info.shape == (INFO_LENGTH,)


def _modes(facts: StreamInfo) -> str:
    return " ".join(f"{mode}:{count}" for mode, count in facts.modes.items() if count)
