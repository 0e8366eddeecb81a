"""``slim-mindspore inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from slim_core.checkpoint import TensorInfo, open_checkpoint
from slim_mindspore.ckpt import CkptFile

HELP = "list the tensors of a checkpoint"
DESCRIPTION = HELP[0].upper() + HELP[1:] + "; reads structure only and needs no MindSpore."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("checkpoint", help=".ckpt or safetensors file, or directory")
    parser.add_argument("--match", default="", help="only names that contain this")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    path = Path(options.checkpoint)
    tensors: dict[str, TensorInfo]
    int4: frozenset[str] = frozenset()
    if path.suffix == ".ckpt":
        file = CkptFile(path)
        tensors, int4 = file.tensors, file.int4
    else:
        tensors = dict(open_checkpoint(path).tensors)
    shown = [info for name, info in tensors.items() if options.match in name]
    for info in shown:
        kind = "int4" if info.name in int4 else info.dtype.name
        shape = "x".join(str(size) for size in info.shape)
        print(f"{info.name:60s} {kind:9s} {shape}")
    print(f"{len(shown)} tensors, {sum(info.nbytes for info in shown):,} bytes")
