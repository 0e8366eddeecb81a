"""Perplexity of decomposed language models, step by step from plain SVD to the full method.

    python benchmarks/slim-lowrank/language_model.py

Decomposes the Linear layers of the decoder blocks of ``examples/tiny-llama`` and, where a folder
``shared`` with held-out text lies beside the repository, of ``examples/tiny-bloom`` and on that
text.  Every step keeps the same share of the weights of these layers.  Calibration and evaluation
text do not overlap.
"""

# ruff: noqa: E402 - the number of threads is read when BLAS is loaded

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from slim_core.files import write_json
from slim_lowrank import Decompose, Decomposer, load_pretrained, output_loss
from slim_lowrank.layers import Layer
from slim_lowrank.measure import perplexity
from slim_lowrank.plan import Plan
from slim_lowrank.plot import plot_curves
from slim_lowrank.solve import flat_weight, pair_factors
from slim_lowrank.surgery import apply_table
from slim_lowrank.table import LayerRanks
from slim_lowrank.text import token_windows
from slim_lowrank.whitening import MatrixProblem

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.8, 0.6, 0.4)
BATCHES = 4  # of 8 windows of 512 tokens


def covariance_weighted(model: Any, plan: Plan) -> Any:
    """Weight by C instead of its root, as the data-aware mode of msModelSlim does."""
    statistics = plan.decomposer.statistics

    def solve(layer: Layer, ranks: LayerRanks) -> Any:
        c = statistics[layer.name].input_second
        problem = MatrixProblem(flat_weight(layer), second=c @ c, name=layer.name)
        return pair_factors(layer, ranks, *problem.factors(ranks.ranks[0]), None)

    return apply_table(copy.deepcopy(model), plan.table, solve)


def compatible(model: Any, share: float, include: list[str], train: Any) -> Any:
    """Use the compatible face as a script for msModelSlim does."""
    pattern = "|".join(each.replace(".", r"\.").replace("*", "") for each in include)
    decompose = Decompose(model).from_dict({pattern: share}, divisor=1)
    return decompose.decompose_network(datasets=train)


def steps(model: Any, train: Any, include: list[str]) -> dict[str, Callable[[float], Any]]:
    def make(**options: Any) -> Decomposer:
        return Decomposer(model, include=include, divisor=1, **options)

    plain = make()
    output = make().calibrate(train, loss=output_loss, method="output")
    loss = make().calibrate(train, loss=output_loss)
    pivot = make(storage="pivot").calibrate(train, loss=output_loss)
    return {
        "weighting by C (msModelSlim)": lambda share: covariance_weighted(
            model, output.ratio(share)
        ),
        "plain SVD": lambda share: plain.ratio(share).apply()[0],
        "Decompose with data": lambda share: compatible(model, share, include, train),
        "whitening": lambda share: output.ratio(share).apply()[0],
        "+ allocation": lambda share: output.budget(share).apply()[0],
        "+ loss weighting": lambda share: loss.budget(share).apply()[0],
        "+ sequential": lambda share: loss.budget(share).apply(sequential=True)[0],
        "+ pivot storage": lambda share: pivot.budget(share).apply(sequential=True)[0],
    }


def run_model(name: str, folder: Path, texts: tuple[Path, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_pretrained(folder).float()
    train, test = split_windows(tokenizer, *texts)
    block = "model.layers.*" if hasattr(model, "model") else "transformer.h.*"
    result: dict[str, Any] = {
        "model": name,
        "calibration": f"{texts[0].name}, {tokens(train)} tokens",
        "evaluation": f"{texts[1].name}, {tokens(test)} tokens",
        "dense_perplexity": perplexity(model, test),
        "curves": {},
    }
    print(f"{name:25} {'dense':26} {result['dense_perplexity']:10.3f}", flush=True)
    for title, step in steps(model, train, [block]).items():
        points = []
        for share in SHARES:
            small = step(share)
            weights = sum(parameter.numel() for parameter in small.parameters())
            point = {"kept_of_layers": share, "parameters": weights}
            points.append(point | {"perplexity": perplexity(small, test)})
        result["curves"][title] = points
        figures = " ".join(f"{point['perplexity']:10.3f}" for point in points)
        print(f"{name:25} {title:26} {figures}", flush=True)
    return result


def split_windows(tokenizer: Any, first: Path, second: Path) -> tuple[Any, Any]:
    """Return calibration and evaluation batches; of one text, in turns from all its parts."""
    if first != second:
        train = token_windows(tokenizer, first, length=256, samples=None)
        return train, token_windows(tokenizer, second, length=256, samples=64)
    windows = token_windows(tokenizer, first, length=512, samples=None)
    step = len(windows) // BATCHES
    return windows[step // 2 :: step][:BATCHES], windows[::step][:BATCHES]


def tokens(batches: Any) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at the same time")
    arguments = parser.parse_args()
    examples = ROOT / "examples"
    llama = examples / "tiny-llama"
    own = examples / "calib.jsonl", examples / "eval.txt"
    jobs: list[tuple[Any, ...]] = [("tiny-llama, own text", llama, own)]
    held_out = SHARED / "data" / "public_domain_test.txt"
    if held_out.exists():
        for model, folder in (("tiny-llama", llama), ("tiny-bloom", examples / "tiny-bloom")):
            jobs.append((model, folder, (held_out, held_out)))
    else:
        print("no ../shared: the held-out text, and with it tiny-bloom, is left out")
    RESULTS.mkdir(exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
        for result in pool.map(run_model, *zip(*jobs, strict=True)):
            write_result(result)


def write_result(result: dict[str, Any]) -> None:
    slug = result["model"].replace(", ", "-").replace(" ", "-")
    result = {"command": "python benchmarks/slim-lowrank/language_model.py", **result}
    write_json(RESULTS / f"language_model-{slug}.json", result, 0o644)
    path = RESULTS / f"language_model-{slug}.svg"
    plot_curves(result, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
