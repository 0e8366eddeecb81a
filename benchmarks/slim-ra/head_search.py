"""Time and memory of the head search against the published scoring done plainly.

    python benchmarks/slim-ra/head_search.py

"plain" runs the model with ``output_attentions=True`` and sums the entries of every attention
matrix in Python loops, as the method is described; "plain, indexed" does the same sums with one
tensor index an offset.  All score the same random-weight Llama on the same tokens; each runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = Path(__file__).parent / "results"
LAYERS, HEADS = 2, 8
CASES = [
    (64, ("search", "plain, indexed", "plain")),
    (250, ("search", "plain, indexed", "plain")),
    (1000, ("search", "plain, indexed")),
    (2500, ("search",)),
]


def build():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=4, max_position_embeddings=1 << 15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain(model, sequences, *, loops):
    """Apply the definition to whole attention matrices."""
    import torch

    with torch.inference_mode():
        model.set_attn_implementation("eager")
        attentions = model(sequences.ids, output_attentions=True, use_cache=False).attentions
        unit = sequences.unit_length
        total = unit * sequences.repeats
        scores = torch.zeros(2, LAYERS, HEADS)
        for layer, weights in enumerate(attentions):
            for head in range(HEADS):
                matrix = weights[0, head, sequences.lead :, sequences.lead :]
                for kind, shift in ((0, 1), (1, 0)):
                    scores[kind, layer, head] = (by_loops if loops else by_index)(
                        matrix, unit, total, shift
                    )
    grouped = scores.reshape(2, LAYERS, 4, -1).amax(-1)
    return grouped[0], grouped[1]


def by_loops(matrix, unit, total, shift):
    found = 0.0
    for row in range(unit, total):
        for column in range(row - unit, -1, -unit):
            found += float(matrix[row, column + shift])
    return found / (total - unit)


def by_index(matrix, unit, total, shift):
    import torch

    found = 0.0
    for back in range(unit, total, unit):
        rows = torch.arange(back, total)
        found += float(matrix[rows, rows - back + shift].double().sum())
    return found / (total - unit)


def one(method, unit):
    """Run one method and print its figures."""
    from slim_ra import search_heads
    from slim_ra.sequences import repeated_ids

    model = build()
    search_heads(model, unit_length=8)  # warm up
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    if method == "search":
        scores = search_heads(model, unit_length=unit)
        induction, echo = scores.induction, scores.echo
    else:
        sequences = repeated_ids(model.config, unit_length=unit)
        induction, echo = plain(model, sequences, loops=method == "plain")
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    print(json.dumps({"seconds": seconds, "extra_bytes": peak, "induction": induction.tolist(),
                      "echo": echo.tolist()}))  # fmt: skip


def main():
    import torch
    import transformers

    rows = []
    for unit, methods in CASES:
        reference = None
        for method in methods:
            command = [sys.executable, __file__, method, str(unit)]
            runs = [
                json.loads(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )
                for _ in range(1 if method == "plain" else 2)
            ]
            best = min(runs, key=lambda run: run["seconds"])
            tensors = torch.tensor([best.pop("induction"), best.pop("echo")])
            reference = tensors if reference is None else reference
            difference = float((tensors - reference).abs().max())
            tokens = 4 * unit + 1
            rows.append({"tokens": tokens, "method": method, **best, "difference": difference})
            mib = best["extra_bytes"] / 2**20
            print(
                f"{tokens:6} tokens  {method:15} {best['seconds']:9.3f} s {mib:9.1f} MiB  "
                f"differs by {difference:.1e}"
            )
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": "python benchmarks/slim-ra/head_search.py",
        "model": f"random Llama, {LAYERS} layers of {HEADS} query and 4 KV heads of size 32, fp32",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }  # fmt: skip
    (RESULTS / "head_search.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one(sys.argv[1], int(sys.argv[2]))
    else:
        main()
