"""Sparse quantization of the example Llama with MindSpore, step 1: quantize.

    python examples/mindspore_llama/sparse_quant.py

Writes ``model.ckpt`` (the float weights) and ``quant_weight.ckpt`` into the directory given by
``--output`` (default ``sparse-output``), and prints the perplexity before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from slim_mindspore import Calibrator, QuantConfig, load_llama
from slim_mindspore.evaluate import perplexity
from slim_mindspore.interchange import convert_checkpoint
from slim_mindspore.modes import prepare_cpu
from slim_mindspore.text import load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1]
MODEL = EXAMPLES / "tiny-llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("sparse-output"))
    parser.add_argument("--fraction", type=float, default=0.03)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()

    prepare_cpu()
    model_ckpt = options.output / "model.ckpt"
    convert_checkpoint(MODEL, model_ckpt)
    model, tokenizer = load_llama(model_ckpt), load_tokenizer(MODEL)
    lines = (EXAMPLES / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: options.samples]]
    dataset_calib = [[np.array([tokenizer.encode(text).ids])] for text in texts]

    quant_config = QuantConfig(disable_names=[], fraction=options.fraction)
    calibrator = Calibrator(
        cfg=quant_config, model=model, model_ckpt=str(model_ckpt), calib_data=dataset_calib
    )
    calibrator.run()
    calibrator.save(str(options.output / "quant_weight.ckpt"))
    print("Save quant weight success!")

    held_out = (EXAMPLES / "eval.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(held_out).ids
    before = perplexity(model, ids)
    after = perplexity(calibrator.fake_quantize_model(), ids)
    print(f"perplexity on eval.txt: {before:.3f} -> {after:.3f} ({after / before - 1:+.2%})")


if __name__ == "__main__":
    main()
