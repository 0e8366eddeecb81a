"""The trained models of examples/, what they are calibrated on, and what measures them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from slim_ptq.calibration.text import TokenWindows, read_calibration
from slim_ptq.evaluate import encode_text, perplexity

EXAMPLES = Path(__file__).parents[2] / "examples"
GENERATED = EXAMPLES / "eval.txt"  # which the language model wrote itself
HELD_OUT = EXAMPLES.parents[1] / "shared" / "data" / "public_domain_test.txt"
WINDOW = 512  # tokens

Score = Callable[[Any], float]


@dataclass(frozen=True)
class Case:
    """A model directory, its calibration windows, and the perplexity of a loaded model."""

    name: str
    directory: Path
    calibration: TokenWindows
    score: Score


def text_case(
    name: str, *, samples: int, length: int, text: Path = GENERATED, windows: int | None = None
) -> Case:
    """Return a language model, measured on all of a text or its first windows."""
    directory = EXAMPLES / name
    data = read_calibration(EXAMPLES / "calib.jsonl", directory, samples=samples, length=length)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = encode_text(tokenizer, text.read_text(encoding="utf-8"))
    ids = ids if windows is None else ids[: windows * WINDOW]
    return Case(name, directory, data, lambda model: perplexity(model, ids, window=WINDOW).value)


def copy_case(*, samples: int, length: int) -> Case:
    """Return the model that was trained to continue repeated sequences of random tokens.

    It has no tokenizer and no text; what is measured are the second halves.
    """
    data = _repeated(samples, length, seed=0)
    return Case("copy-llama", EXAMPLES / "copy-llama", data, _copy_score)


def _repeated(rows: int, length: int, seed: int) -> TokenWindows:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1, 512, (rows, length // 2), generator=generator)
    return TokenWindows(tuple(torch.cat([half, half], 1).split(4)), "repeated sequences")


def _copy_score(model: Any) -> float:
    losses = []
    for ids in _repeated(8, WINDOW, seed=1).batches:
        with torch.no_grad():
            logits = model(ids).logits.float()[:, WINDOW // 2 : -1]
        wanted = ids[:, WINDOW // 2 + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted))
    return math.exp(float(torch.stack(losses).mean()))
