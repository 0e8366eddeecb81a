"""The command line: ``slim-mindspore``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from slim_core.errors import SlimError
from slim_core.logging import set_logger_level
from slim_mindspore.__about__ import __version__
from slim_mindspore.commands import convert, dequantize, generate, inspect, prepare, quantize

COMMANDS = {
    "quantize": quantize,
    "convert": convert,
    "dequantize": dequantize,
    "generate": generate,
    "inspect": inspect,
    "prepare": prepare,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="slim-mindspore",
        description="Quantize MindSpore networks, convert and inspect their checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"slim-mindspore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 after printing what is wrong."""
    options = build_parser().parse_args(arguments)
    if getattr(options, "debug", False):
        set_logger_level("debug")
    try:
        COMMANDS[options.command].run(options)
    except (SlimError, OSError) as error:
        print(f"slim-mindspore {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
