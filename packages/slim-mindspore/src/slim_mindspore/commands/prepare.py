"""``slim-mindspore prepare``."""

from __future__ import annotations

import argparse

from slim_mindspore.compression import prepare_for_compressor

HELP = "collect the integer weights of a sparse checkpoint for the weight compressor"
DESCRIPTION = HELP[0].upper() + HELP[1:] + "; needs no MindSpore."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("source", help="quantized .ckpt file")
    add("target", help=".npz or .safetensors file, or .npy for scripts that load pickled data")
    add("--disable", nargs="*", default=[], metavar="CELL", help="cells to leave out")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    summary = prepare_for_compressor(options.source, options.target, options.disable)
    for name, weight in summary.items():
        print(f"{name:60s} {weight.shape!s:14s} {weight.zeros:6.2%} zeros")
    total = sum(weight.size for weight in summary.values())
    zeros = sum(weight.zeros * weight.size for weight in summary.values()) / total
    print(f"Written: {options.target} ({len(summary)} weights, {zeros:.2%} zeros)")
