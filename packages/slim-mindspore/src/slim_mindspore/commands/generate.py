"""``slim-mindspore generate``."""

from __future__ import annotations

import argparse

HELP = "continue a text with a float or quantized Llama"
DESCRIPTION = HELP[0].upper() + HELP[1:] + "."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("model", help="directory or weight file, float or quantized, with a config.json beside it")
    add("prompt")
    add("--max-new-tokens", type=int, default=40)
    add("--sample", action="store_true", help="draw tokens instead of taking the best")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--temperature", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--config-from", help="directory of config.json and tokenizer.json")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from slim_mindspore.hub import load_any, read_config
    from slim_mindspore.modes import prepare_cpu
    from slim_mindspore.tensors import model_dir
    from slim_mindspore.text import load_tokenizer

    prepare_cpu()
    origin = model_dir(options.config_from or options.model)
    tokenizer = load_tokenizer(origin)
    network = load_any(options.model, read_config(origin))
    output = network.generate(
        [tokenizer.encode(options.prompt).ids],
        max_new_tokens=options.max_new_tokens,
        do_sample=options.sample,
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(tokenizer.decode(output[0].tolist()))
