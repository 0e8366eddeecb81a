"""``slim-mindspore dequantize``."""

from __future__ import annotations

import argparse

from slim_mindspore.dequantize import DTYPES, dequantize_file

HELP = "write the float model that a quantized checkpoint stands for"
DESCRIPTION = HELP[0].upper() + HELP[1:] + "; needs no MindSpore."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("source", help="quantized .ckpt or safetensors file, or directory")
    add("target", help="file to write: .ckpt or .safetensors")
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--names", choices=("mindformers", "hugging_face"), default="mindformers")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    dequantize_file(options.source, options.target, dtype=options.dtype, names=options.names)
    print(f"Written: {options.target}")
