"""What the benchmarks share: random models on disk, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slim_core.checkpoint import ShardWriter
from slim_core.files import write_json

RESULTS = Path(__file__).parent / "results"
REPEATS = 3


def write_llama(directory: Path, *, layers: int, hidden: int, inter: int, vocab: int = 2048) -> int:
    """Write a random-weight bfloat16 Llama and return the bytes of its weights."""
    directory.mkdir(parents=True)
    heads = hidden // 64
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": hidden,
            "intermediate_size": inter,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": vocab,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    )
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        values = generator.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1])
        return values.astype(ml_dtypes.bfloat16)

    total = 0
    with ShardWriter(directory, "model", max_shard_bytes=1 << 29, mode=0o600) as writer:
        for name, shape in _shapes(layers, hidden, inter, vocab):
            array = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else random(*shape)
            writer.add(name, array)
            total += array.nbytes
    return total


def _shapes(layers: int, hidden: int, inter: int, vocab: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for index in range(layers):
        block = f"model.layers.{index}"
        shapes += [(f"{block}.self_attn.{p}_proj.weight", (hidden, hidden)) for p in "qkvo"]
        shapes += [(f"{block}.mlp.{p}_proj.weight", (inter, hidden)) for p in ("gate", "up")]
        shapes += [
            (f"{block}.mlp.down_proj.weight", (hidden, inter)),
            (f"{block}.input_layernorm.weight", (hidden,)),
            (f"{block}.post_attention_layernorm.weight", (hidden,)),
        ]
    return [*shapes, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def best_of(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the smallest wall time of several runs in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def save(question: str, command: str, result: dict[str, Any]) -> None:
    """Write a result with the command and the machine it was measured on, and print it."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command, "machine": machine(), **result}
    write_json(RESULTS / f"{question}.json", record, mode=0o644)
    print(json.dumps(record, indent=2))


def machine() -> dict[str, Any]:
    """Return processor, cores and versions."""
    import torch

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "torch": torch.__version__}
