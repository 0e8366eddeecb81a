"""Command line: ``slim-lowrank decompose | sweep | perplexity | merge | show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from slim_core.errors import MissingDependencyError, SlimError
from slim_core.logging import set_logger_level
from slim_lowrank.__about__ import __version__

_EXTRAS = {"torch": "hf", "transformers": "hf", "accelerate": "hf", "matplotlib": "plot"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after an error of the user."""
    arguments = build_parser().parse_args(argv)
    set_logger_level(arguments.log_level)
    try:
        commands = import_module("slim_lowrank.commands")
        getattr(commands, arguments.command)(arguments)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        missing = MissingDependencyError(
            f"slim-lowrank {arguments.command} needs {error.name}",
            hint=f"pip install 'slim-lowrank[{extra}]'",
        )
        return _fail(missing)
    except (SlimError, OSError) as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"slim-lowrank: error: {error}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; needs no framework."""
    parser = argparse.ArgumentParser(
        prog="slim-lowrank",
        description="Low-rank decomposition of language models in the layout of Hugging Face.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--log-level", default="warning", help="debug, info, warning, error")
    commands = parser.add_subparsers(dest="command", required=True)

    decompose = commands.add_parser(
        "decompose", help="decompose a model under a budget and save it"
    )
    decompose.add_argument("model", help="directory of the model")
    decompose.add_argument("out", help="directory to create")
    decompose.add_argument(
        "--budget", type=float, required=True, help="share to keep of the layers taken, in (0, 1)"
    )
    decompose.add_argument("--unit", choices=("params", "flops", "bytes"), default="params")
    decompose.add_argument("--uniform", action="store_true", help="the same share in every layer")
    decompose.add_argument("--dry-run", action="store_true", help="show the ranks and stop")
    decompose.add_argument("--overwrite", action="store_true")
    decompose.add_argument("--eval", help="text on which to measure errors and perplexity")
    _add_choices(decompose)

    sweep = commands.add_parser("sweep", help="perplexity over kept parameters, with a plot")
    sweep.add_argument("model", help="directory of the model")
    sweep.add_argument("out", help="path of the plot, .svg or .png; the figures go to .json")
    sweep.add_argument("--eval", required=True, help="text on which to measure perplexity")
    sweep.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    _add_choices(sweep)

    perplexity = commands.add_parser("perplexity", help="perplexity of a model on a text")
    perplexity.add_argument("model", help="directory of a dense or decomposed model")
    perplexity.add_argument("--eval", required=True, help="the text")
    _add_data(perplexity)

    merge = commands.add_parser("merge", help="multiply out: an ordinary dense model again")
    merge.add_argument("model", help="directory of the decomposed model")
    merge.add_argument("out", help="directory to create")
    merge.add_argument("--overwrite", action="store_true")

    show = commands.add_parser("show", help="the ranks of a decomposed model")
    show.add_argument("model", help="directory of the decomposed model")
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calib", help="calibration text: .txt, or .jsonl with 'text'")
    parser.add_argument(
        "--method",
        choices=("plain", "output", "loss"),
        help="what to keep: weights, outputs, or the loss (default: loss with --calib, else plain)",
    )
    parser.add_argument(
        "--shrinkage",
        default="auto",
        help="how little to trust the calibration text: a number (1e-4 trusts it), or auto to "
        "find it on a part of the text held out (default: auto)",
    )
    parser.add_argument(
        "--sequential", action="store_true", help="later layers make up for earlier ones"
    )
    parser.add_argument("--storage", choices=("factors", "pivot"), default="factors")
    parser.add_argument("--divisor", type=int, default=8, help="ranks are multiples of it")
    parser.add_argument(
        "--include", nargs="+", help="globs of layers (default: all but embeddings and head)"
    )
    parser.add_argument("--exclude", nargs="+", default=[], help="globs of layers to leave dense")
    _add_data(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--samples", type=int, help="windows of calibration text at most")
    parser.add_argument("--eval-samples", type=int, help="windows of evaluation text at most")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, npu:0")


if __name__ == "__main__":
    sys.exit(main())
