"""The flow of MindSpore Golden Stick on the example Llama: apply, convert, save, load, generate.

    python examples/mindspore_llama/golden_stick.py

Writes ``ptq.ckpt`` into the directory given by ``--output`` (default ``golden-stick-output``), and
prints the perplexity before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import dtype as msdtype

from slim_mindspore import load_llama
from slim_mindspore.evaluate import perplexity
from slim_mindspore.modes import prepare_cpu
from slim_mindspore.ptq import PTQ, OutliersSuppressionType, PTQConfig, PTQMode
from slim_mindspore.text import load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1]
MODEL = EXAMPLES / "tiny-llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("golden-stick-output"))
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    options.output.mkdir(mode=0o750, parents=True, exist_ok=True)

    prepare_cpu()
    tokenizer = load_tokenizer(MODEL)
    lines = (EXAMPLES / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: options.samples]]
    datasets = [{"input_ids": np.array([tokenizer.encode(text).ids[:128]])} for text in texts]
    ids = tokenizer.encode((EXAMPLES / "eval.txt").read_text(encoding="utf-8")).ids[:4096]

    network = load_llama(MODEL)
    before = perplexity(network, ids, window=128, batch=8)
    config = PTQConfig(
        weight_quant_dtype=msdtype.int8,
        act_quant_dtype=msdtype.int8,
        outliers_suppression=OutliersSuppressionType.SMOOTH,
        opname_blacklist=["lm_head", "w2"],
    )
    algorithm = PTQ(config)
    network = algorithm.convert(algorithm.apply(network, datasets=datasets))
    after = perplexity(network, ids, window=128, batch=8)
    print(f"perplexity on eval.txt: {before:.3f} -> {after:.3f} ({after / before - 1:+.2%})")
    checkpoint = str(options.output / "ptq.ckpt")
    ms.save_checkpoint(network, checkpoint)

    config.mode = PTQMode.DEPLOY
    deployed = PTQ(config).apply(load_llama(MODEL))
    ms.load_param_into_net(deployed, ms.load_checkpoint(checkpoint))
    prompt = tokenizer.encode("My fellow citizens, we").ids
    print(tokenizer.decode(deployed.generate([prompt], max_new_tokens=16)[0].tolist()))


if __name__ == "__main__":
    main()
