"""Hold a real model of at least 0.5 billion parameters to what RazorAttention promises.

    python benchmarks/slim-ra/real_model.py MODEL TEXT [--length 4096] [--needles 20] [--device cpu]

MODEL is the directory of a RoPE model with its tokenizer, TEXT any long plain text.  Heads are
searched and kept as by default (14 % induction, 1 % echo), with a window of a fifth of the prompt.
Promised at no more than 40 % of the full cache's bytes:

- needle accuracy no more than 3 points below the full cache's, and no worse than the best of
  StreamingLLM, SnapKV and ExpectedAttention at as many bytes, asked after compression;
- perplexity of tokens decoded after the prompt no more than 2 % above the full cache's.

The exit status is 1 if one of them is not kept.  Without MODEL and TEXT nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from quality import RESULTS, TEXT_PRESSES, line, measure

from slim_ra import RazorPolicy, search_heads
from slim_ra.commands import load, text_windows
from slim_ra.evaluate import Passkey, decode_perplexity, full_cache, full_logits, passkey_accuracy
from slim_ra.select import select_heads

DECODED = 128
LARGEST_RATIO = 0.40


def needles(tokenizer, text, length, count):
    """Passages of the text with a number hidden at evenly spread depths."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1_000_000, 9_999_999, (count,), generator=generator).tolist()
    made = []
    for index, number in enumerate(numbers):
        name = f"box {index + 11}"
        fact = encode(tokenizer, f"\nThe secret number of {name} is {number}.\n")
        cue = encode(tokenizer, f"\nQuestion: what is the secret number of {name}?\n"
                                f"Answer: the secret number of {name} is")  # fmt: skip
        answer = encode(tokenizer, f" {number}")
        hay = text[index % len(text)][:, : length - fact.shape[1]]
        at = 1 + int((index + 0.5) / count * (hay.shape[1] - 1))
        context = torch.cat([hay[:, :at], fact, hay[:, at:]], 1)
        made.append(Passkey(context, cue, answer))
    return made


def encode(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model is None or arguments.text is None:
        print("skipped: needs MODEL and TEXT, a RoPE model of at least 0.5B and a long text")
        return 0
    model, tokenizer = load(arguments.model, ("auto", arguments.device, False))
    length = arguments.length
    texts = text_windows(arguments.text, tokenizer, length + DECODED, 8)
    heads = select_heads(
        search_heads(model, tokenizer), induction_ratio=0.14, echo_ratio=0.01, min_heads=1
    )
    policy = RazorPolicy.from_profile(heads, model.config, buffer_min=1)
    lines = needle_lines(model, tokenizer, texts, policy, length, arguments.needles)
    lines += text_lines(model, texts, policy, length)
    kept = promises(lines)
    for promise, held in kept.items():
        print(f"{'kept  ' if held else 'BROKEN'} {promise}")
    content = {
        "command": f"python benchmarks/slim-ra/real_model.py {Path(arguments.model).name} "
        f"{arguments.text.name} --length {length} --needles {arguments.needles}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "kept": kept,
        "rows": lines,
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"real_model-{Path(arguments.model).name}.json"
    out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(kept.values()) else 1


def needle_lines(model, tokenizer, texts, policy, length, count):
    samples = needles(tokenizer, texts, length, count)
    slots = max(s.context.shape[1] + s.cue.shape[1] + s.answer.shape[1] for s in samples)

    def run(prefill):
        return passkey_accuracy(model, samples, prefill, forced=False)

    rows = [("full", run(full_cache(model)))]
    rows += measure(model, run, policy, slots, length, presses=TEXT_PRESSES)
    return [line("needle", "agnostic", name, found) for name, found in rows]


def text_lines(model, texts, policy, length):
    reference = full_logits(model, texts, prompt=length)

    def run(prefill):
        return decode_perplexity(model, texts, prefill, prompt=length, reference=reference)

    rows = [("full", run(full_cache(model)))]
    rows += measure(model, run, policy, length + DECODED, length, presses=TEXT_PRESSES)
    return [line("text", "text", name, found) for name, found in rows]


def promises(lines):
    needle = {row["method"]: row for row in lines if row["task"] == "needle"}
    text = {row["method"]: row for row in lines if row["task"] == "text"}
    razor = needle["razor"]
    best = max(needle[name].get("accuracy", 0.0) for name in TEXT_PRESSES)
    return {
        "bytes <= 40 % of the full cache": razor["nbytes"] <= LARGEST_RATIO * razor["full_nbytes"],
        "needles >= full - 3 points": razor["accuracy"] >= needle["full"]["accuracy"] - 0.03,
        "needles >= the best press": razor["accuracy"] >= best,
        "decode perplexity <= full + 2 %": text["razor"]["perplexity"]
        <= 1.02 * text["full"]["perplexity"],
    }


if __name__ == "__main__":
    sys.exit(main())
