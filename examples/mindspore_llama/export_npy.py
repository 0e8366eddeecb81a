"""Sparse quantization of the example Llama with MindSpore, step 2: weights for the compressor.

    python examples/mindspore_llama/export_npy.py

Reads ``quant_weight.ckpt`` and writes ``quant_weight.npy``, a pickled dictionary, as scripts for
the compressor expect it.  ``slim-mindspore prepare`` does the same, and writes files without pickle
as well.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import mindspore as ms
import numpy as np

from slim_mindspore.security import SafeWriteUmask

LINEAR_WEIGHT = (
    r"^(?=.{1,100}$)model\.layers\.\d+\.(attention[^_]|feed_forward|augs_attn\d+).*\.weight$"
)
DISABLE_NAMES: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("sparse-output"))
    folder = parser.parse_args().output

    search = re.compile(LINEAR_WEIGHT).search
    weights = {
        name: parameter.numpy()
        for name, parameter in ms.load_checkpoint(str(folder / "quant_weight.ckpt")).items()
        if search(name) and name.removesuffix(".weight") not in DISABLE_NAMES
    }
    with SafeWriteUmask():
        np.save(folder / "quant_weight.npy", weights)
    print(f"{len(weights)} weights in {folder / 'quant_weight.npy'}")


if __name__ == "__main__":
    main()
