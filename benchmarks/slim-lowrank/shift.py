"""Perplexity on text unlike the calibration: how much to trust what the calibration shows.

    python benchmarks/slim-lowrank/shift.py

Plain SVD, whitening that trusts the calibration, and whitening whose shrinkage is chosen layer by
layer on a part of the calibration held out (the default); the same share of the weights of every
Linear layer of the decoder blocks.
Needs the held-out texts in a folder ``shared`` beside the repository.
"""

from __future__ import annotations

from typing import Any

import torch
from language_model import BATCHES, RESULTS, ROOT, SHARED, split_windows, tokens
from transformers import AutoTokenizer

from slim_core.files import write_json
from slim_lowrank import Decomposer, load_pretrained
from slim_lowrank.measure import perplexity
from slim_lowrank.text import token_windows

SHARES = (0.8, 0.6)
BOOKS = SHARED / "data" / "public_domain_test.txt"
ARTICLES = SHARED / "data" / "wikitext2_test.txt"
WAYS: dict[str, dict[str, Any]] = {
    "whitening": {"shrinkage": 1e-4},
    "whitening, shrinkage auto": {},
}


def splits(tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    """Return calibration and evaluation batches: like each other, and less and less so."""
    books = token_windows(tokenizer, BOOKS, length=512, samples=None)
    articles = token_windows(tokenizer, ARTICLES, length=512, samples=None)
    step = len(articles) // BATCHES
    same = split_windows(tokenizer, BOOKS, BOOKS)
    return {
        "same books": same,
        "other books": (books[:BATCHES], books[-BATCHES:]),
        "books, then articles": (same[1], articles[::step][:BATCHES]),
    }


def run_model(name: str) -> list[dict[str, Any]]:
    folder = ROOT / "examples" / name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_pretrained(folder).float()
    block = "model.layers.*" if hasattr(model, "model") else "transformer.h.*"

    def decomposer() -> Decomposer:
        return Decomposer(model, include=[block], divisor=1)

    plain = {share: decomposer().ratio(share).apply()[0] for share in SHARES}
    rows = []
    for split, (train, test) in splits(tokenizer).items():
        figures = {"plain SVD": [perplexity(plain[share], test) for share in SHARES]}
        chosen: list[float] = []
        for title, options in WAYS.items():
            ready = decomposer().calibrate(train, **options)
            smalls = [ready.ratio(share).apply()[0] for share in SHARES]
            figures[title] = [perplexity(small, test) for small in smalls]
            chosen = sorted(entry.shrinkage for entry in ready.statistics.values())
        dense = perplexity(model, test)
        rows.append(
            {"model": name, "split": split, "calibration_tokens": tokens(train),
             "evaluation_tokens": tokens(test), "dense": dense, "shares": SHARES,
             "perplexity": figures, "shrinkages_chosen": chosen}
        )  # fmt: skip
        print(f"{name}, {split}: dense {dense:.2f}", flush=True)
        for title, values in figures.items():
            print(f"  {title:28}", *(f"{value:8.2f}" for value in values), flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    if not BOOKS.exists() or not ARTICLES.exists():
        print("skipped: needs the texts in ../shared/data")
        return
    rows = [row for name in ("tiny-llama", "tiny-bloom") for row in run_model(name)]
    RESULTS.mkdir(exist_ok=True)
    content = {"command": "python benchmarks/slim-lowrank/shift.py", "rows": rows}
    write_json(RESULTS / "shift.json", content, 0o644)


if __name__ == "__main__":
    main()
