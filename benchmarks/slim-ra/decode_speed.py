"""Decode attention of one layer with one of eight KV heads kept, against the full cache.

    python benchmarks/slim-ra/decode_speed.py

32 query and 8 KV heads of size 128, fp32, on the CPU.  "packed" is torch's fused attention with the
query heads of a group packed into rows, the fastest way to read a full cache here; "expanded" is
the same with repeated keys, as ``enable_gqa`` does it.  Methods take turns, each with cold caches
as between the layers of a model; the best time counts.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from slim_ra import RazorPolicy, RetrievalHeads
from slim_ra.geometry import HeadGeometry
from slim_ra.layer import RazorLayer
from slim_ra.memory import predict

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (8192, 32768)
TURNS = 30
COLD = torch.ones(96 << 20)  # read before every turn: larger than the processor's caches


def filled_layer(policy, key, value):
    layer = RazorLayer(0, policy, frozen=False, check=lambda index: None)
    layer._start(key, value, None)
    return layer


def best_times(methods):
    times = {name: float("inf") for name in methods}
    for _ in range(TURNS):
        for name, method in methods.items():
            COLD.sum()
            begin = time.perf_counter()
            method()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


@torch.inference_mode()
def measure(length):
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, KV_HEADS, length, DIM, generator=generator)
    query = torch.randn(1, HEADS, 1, DIM, generator=generator)
    geometry = HeadGeometry(1, HEADS, KV_HEADS, DIM, HEADS * DIM)
    policy = RazorPolicy(RetrievalHeads({0: [3]}), geometry)
    layer = filled_layer(policy, key, value)
    held = sum(store.allocated() for store in layer.stores)
    predicted = predict(policy, length, itemsize=4)
    if held != predicted.razor:
        raise SystemExit(f"{held} bytes are held, {predicted.razor} were predicted")

    def razor_step():
        layer.update(*torch.randn(2, 1, KV_HEADS, 1, DIM, generator=generator))
        return layer.attend(query, scale=DIM**-0.5)

    packed = query.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
    methods = {
        "packed": lambda: scaled_dot_product_attention(packed, key, value),
        "expanded": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "razor": razor_step,
    }
    razor_step()  # makes room for the coming tokens
    times = best_times(methods)
    row = {"tokens": length, "bytes": held, "full_bytes": predicted.full}
    row |= {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
    row["speedup"] = times["packed"] / times["razor"]
    print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return row


def main():
    content = {
        "command": "python benchmarks/slim-ra/decode_speed.py",
        "setting": f"{HEADS} query, {KV_HEADS} KV heads of {DIM}, fp32, 1 KV head kept, sink 4, "
        "window max(4000, T // 5), mean compensation",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [],
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        content["rows"] += [{"threads": threads} | measure(length) for length in LENGTHS]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode_speed.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
