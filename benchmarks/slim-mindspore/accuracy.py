"""What each scheme, and low rank, costs in accuracy and saves on the example Llama in MindSpore.

    python benchmarks/slim-mindspore/accuracy.py

Perplexity in windows of 128 tokens on ``../shared/data/public_domain_test.txt`` (text that the
model has not seen) where that is present, else on ``examples/eval.txt`` (text that the model wrote
itself); calibration on ``examples/calib.jsonl``.  Writes ``results/accuracy.json`` case by case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from slim_core.files import write_json
from slim_core.provenance import provenance
from slim_mindspore import (
    Calibrator,
    Decompose,
    QuantConfig,
    QuantizationConfig,
    load_llama,
    next_token_loss,
    quantize_network,
    save_quantized,
)
from slim_mindspore.evaluate import perplexity, relative_error
from slim_mindspore.interchange import convert_checkpoint
from slim_mindspore.modes import prepare_cpu
from slim_mindspore.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
UNSEEN = ROOT.parent / "shared" / "data" / "public_domain_test.txt"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"
WINDOW = 128
LOW_RANK_SAMPLES = 64

W8A8 = {"weight_dtype": "int8", "activation_dtype": "int8"}
W4 = {"quant_method": "ptq", "weight_dtype": "int4"}
W4G = {**W4, "weight_quant_granularity": "per_group", "group_size": 32}
HEAD = ["lm_head"]
CASES: dict[str, dict[str, Any]] = {
    "A16W8 rtn": {"quant_method": "rtn", "weight_dtype": "int8"},
    "A8W8 static": {"quant_method": "ptq", **W8A8},
    "A8W8 static, w2 float": {
        "quant_method": "ptq",
        **W8A8,
        "modules_to_not_convert": [*HEAD, "w2"],
    },
    "A8W8 smooth_quant, w2 float": {
        "quant_method": "smooth_quant",
        **W8A8,
        "outliers_suppression": "smooth",
        "modules_to_not_convert": [*HEAD, "w2"],
    },
    "A8W8 per token": {"quant_method": "ptq", **W8A8, "act_quant_granularity": "per_token"},
    "A16W4 rtn, per channel": W4,
    "A16W4 rtn, groups of 32": W4G,
    "A16W4 gptq, groups of 32": {**W4G, "precision_recovery": "gptq"},
    "A16W4 awq, groups of 32": {**W4G, "outliers_suppression": "awq"},
    "C8 per channel": {"quant_method": "ptq", "kvcache_dtype": "int8"},
    "C8 per token": {
        "quant_method": "ptq",
        "kvcache_dtype": "int8",
        "kvcache_quant_granularity": "per_token",
    },
}


def low_rank(case: str, calib: list[np.ndarray]) -> Any:
    """Keep 70 % of the weights of the linear cells but the head."""
    datasets = [[ms.Tensor(ids.astype(np.int32))] for ids in calib]
    decompose = Decompose(load_llama(MODEL))
    if case.startswith("budget"):
        loss = next_token_loss if "loss" in case else None
        chosen = decompose.from_budget(0.7, datasets, loss=loss, excludes=HEAD, divisor=16)
        return chosen.decompose_network()
    decompose.from_ratio(0.75, excludes=HEAD, divisor=16)
    return decompose.decompose_network(datasets=datasets if "data" in case else None)


def block_weights(network: Any) -> int:
    """Return how many weights the linear cells of the blocks have."""
    parameters = network.parameters_dict().items()
    return sum(p.size for name, p in parameters if ".attention." in name or ".feed_" in name)


def run(windows: int, samples: int, output: Path) -> None:
    """Measure every case and write the results after each."""
    tokenizer = load_tokenizer(MODEL)
    text = UNSEEN if UNSEEN.is_file() else ROOT / "examples" / "eval.txt"
    ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8")).ids, np.int32)
    ids = ids[: WINDOW * windows]
    lines = (ROOT / "examples" / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: max(samples, LOW_RANK_SAMPLES)]]
    encoded = [np.asarray([tokenizer.encode(item).ids[:WINDOW]]) for item in texts]
    calib = encoded[:samples]
    network = load_llama(MODEL)
    probe = ms.Tensor(ids[: 8 * WINDOW].reshape(8, WINDOW))
    exact = network(probe).asnumpy()
    base = perplexity(network, ids, window=WINDOW, batch=8)

    def measure(network: Any) -> dict[str, float]:
        found = perplexity(network, ids, window=WINDOW, batch=8)
        logits = network(probe).asnumpy()
        return {
            "perplexity": round(found, 3),
            "change_percent": round(100 * (found / base - 1), 3),
            "relative_logit_error": round(relative_error(logits, exact), 5),
            "same_best_token": round(float((logits.argmax(-1) == exact.argmax(-1)).mean()), 4),
        }

    rows: dict[str, Any] = {}
    result = {
        "command": "python benchmarks/slim-mindspore/accuracy.py",
        "text": text.name,
        "tokens": len(ids),
        "window": WINDOW,
        "calibration": {
            "file": "examples/calib.jsonl",
            "samples": samples,
            "samples_low_rank": LOW_RANK_SAMPLES,
        },
        "float": {"perplexity": round(base, 3)},
        "rows": rows,
        "provenance": provenance(["slim-mindspore", "mindspore"]),
    }
    print(f"{'float':40s} {base:8.3f}", flush=True)

    def keep(case: str, row: dict[str, float]) -> None:
        rows[case] = row
        write_json(output, result, mode=0o644)
        print(
            f"{case:40s} {row['perplexity']:8.3f} {row['change_percent']:+7.3f} %"
            f"  logits {row['relative_logit_error']:.4f}  {row.get('bytes', 0):>9,} bytes",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert_checkpoint(MODEL, folder / "bf16.ckpt")
        result["float"]["bytes"] = size(folder / "bf16.ckpt")
        for fraction in (0.01, 0.03, 0.1):
            calibrator = Calibrator(
                QuantConfig(fraction=fraction), network, folder / "bf16.ckpt", [[c] for c in calib]
            )
            calibrator.run()
            calibrator.save(str(folder / "sparse.ckpt"))
            row = measure(calibrator.fake_quantize_model())
            keep(f"sparse, fraction {fraction}", row | {"bytes": size(folder / "sparse.ckpt")})
        for case, options in CASES.items():
            config = QuantizationConfig.build(**({"modules_to_not_convert": HEAD} | options))
            made = quantize_network(load_llama(MODEL), config, calib)
            file = save_quantized(
                made, folder / "case.ckpt", compute_dtype="float16", layout="gs-ptq"
            )
            keep(case, measure(made.network) | {"bytes": size(file)})
        for case in ("ratio, weights only", "ratio, data", "budget, data", "budget, data and loss"):
            small = low_rank(case, encoded[:LOW_RANK_SAMPLES])
            share = round(block_weights(small) / block_weights(network), 4)
            keep(f"low rank, {case}", measure(small) | {"weights_kept": share})


def size(path: Path) -> int:
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare_cpu()
    run(options.windows, options.samples, options.output)


if __name__ == "__main__":
    main()
