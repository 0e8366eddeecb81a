"""``slim-mindspore convert``."""

from __future__ import annotations

import argparse

from slim_mindspore.interchange import convert_checkpoint

HELP = "convert a float Llama between Hugging Face and MindSpore"
DESCRIPTION = """\
Convert a float Llama between Hugging Face and MindSpore; needs no MindSpore.

  slim-mindspore convert tiny-llama ms/model.ckpt          Hugging Face -> MindSpore
  slim-mindspore convert ms/model.ckpt hf --config-from tiny-llama          and back
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("source", help="Hugging Face directory, or weight file of either side")
    add("target", help=".ckpt or .safetensors file, or a directory for Hugging Face")
    add("--config-from", help="directory of config.json and tokenizer for Hugging Face")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    side = convert_checkpoint(options.source, options.target, config_from=options.config_from)
    print(f"Written with the names of {side}: {options.target}")
