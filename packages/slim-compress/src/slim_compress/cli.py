"""Command line: ``slim-compress compress | decompress | verify | info``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slim_compress.checkpoint import Summary

# The heavy modules are imported by the commands: --help must not wait for numpy.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for an error, 2 for wrong usage."""
    from slim_compress.__about__ import __version__

    parser = _parser(__version__)
    options = parser.parse_args(arguments)
    from slim_core.errors import SlimError

    try:
        options.run(options)
    except SlimError as error:
        print(f"slim-compress: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"slim-compress: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("slim-compress: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slim-compress",
        description="Lossless compression of sparse-quantized (W8A8S) weights.",
    )
    parser.add_argument("--version", action="version", version=f"slim-compress {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("compress", help="compress a W8A8S directory")
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("output", metavar="OUT", type=Path)
    command.add_argument("--codec", choices=("slc1", "device"), default="slc1")
    command.add_argument("--executor", type=Path, help="program of the device codec (needs CANN)")
    command.add_argument("--fast", action="store_true", help="larger, but faster to decode")
    command.add_argument(
        "--disable", action="append", default=[], metavar="NAME", help="leave a weight as it is"
    )
    command.add_argument("--verify", action="store_true", help="decode again and compare")
    _add_output_options(command)
    command.set_defaults(run=_compress)

    command = commands.add_parser("decompress", help="restore the W8A8S directory")
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("output", metavar="OUT", type=Path)
    _add_output_options(command)
    command.set_defaults(run=_decompress)

    command = commands.add_parser("verify", help="decode everything, checking all checksums")
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("--original", metavar="DIR", type=Path, help="compare with this directory")
    _add_jobs(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("info", help="ratio of each compressed weight and its limit")
    command.add_argument("path", metavar="DIR_OR_FILE", type=Path)
    _add_jobs(command)
    command.set_defaults(run=_info)
    return parser


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: all)"
    )


def _add_output_options(command: argparse.ArgumentParser) -> None:
    _add_jobs(command)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    command.add_argument(
        "--shard-size", type=float, metavar="GIB", help="split the weights into files of this size"
    )


def _shard_bytes(options: argparse.Namespace) -> int | None:
    from slim_core.errors import InvalidValueError

    if options.shard_size is None:
        return None
    if not options.shard_size > 0:
        raise InvalidValueError(f"--shard-size must be above 0, not {options.shard_size}")
    return max(1, int(options.shard_size * (1 << 30)))


def _compress(options: argparse.Namespace) -> None:
    from slim_compress.checkpoint import compress_checkpoint
    from slim_compress.config import CompressConfig

    config = CompressConfig(
        compress_disable_layers=options.disable,
        multiprocess_num=options.jobs,
        codec=options.codec,
        fast=options.fast,
        executor=options.executor,
    )
    summary = compress_checkpoint(
        options.directory,
        options.output,
        config,
        verify=options.verify,
        overwrite=options.overwrite,
        max_shard_bytes=_shard_bytes(options),
    )
    checked = ", all decoded and compared" if options.verify else ""
    print(f"{summary.tensors} weights compressed{checked}: {options.output}")
    _print_sizes(summary)


def _decompress(options: argparse.Namespace) -> None:
    from slim_compress.checkpoint import decompress_checkpoint

    summary = decompress_checkpoint(
        options.directory,
        options.output,
        jobs=options.jobs,
        overwrite=options.overwrite,
        max_shard_bytes=_shard_bytes(options),
    )
    print(f"{summary.tensors} weights restored: {options.output}")
    _print_sizes(summary)


def _verify(options: argparse.Namespace) -> None:
    from slim_compress.checkpoint import verify_checkpoint

    count = verify_checkpoint(options.directory, options.original, jobs=options.jobs)
    compared = f" and every tensor equals {options.original}" if options.original else ""
    print(f"{count} compressed weights decode without error{compared}")


def _info(options: argparse.Namespace) -> None:
    from slim_compress.table import print_table

    print_table(options.path, jobs=options.jobs)


def _print_sizes(summary: Summary) -> None:
    rows = (
        ("weights", summary.raw_bytes, summary.stored_bytes),
        ("all tensors", summary.total_raw_bytes, summary.total_stored_bytes),
    )
    for what, raw, stored in rows:
        print(
            f"{what:<12} {raw:>14,} bytes raw {stored:>14,} bytes compressed ({stored / raw:.4f})"
        )


if __name__ == "__main__":
    sys.exit(main())
