"""Sparse quantization of the example Llama with MindSpore, step 3: compress and merge.

    python examples/mindspore_llama/compress.py

Needs slim-compress, and no MindSpore.  Asks whether ``quant_weight.npy`` can be trusted, since the
file is pickled; writes ``compress/{weight,index,info}`` and ``compressed.ckpt`` with all three in
the place of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from slim_compress import CompressConfig, Compressor
from slim_mindspore.compression import merge_compressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("sparse-output"))
    folder = parser.parse_args().output

    save_path = folder / "compress"
    for name in ("index", "weight", "info"):
        (save_path / name).mkdir(mode=0o750, parents=True, exist_ok=True)
    compress_config = CompressConfig(
        do_pseudo_sparse=False,
        sparse_ratio=1,
        is_debug=True,
        record_detail_root=str(save_path),
        multiprocess_num=2,
    )
    compressor = Compressor(compress_config, str(folder / "quant_weight.npy"))
    weight, index, info = compressor.run()
    compressor.export(weight, str(save_path / "weight"))
    compressor.export(index, str(save_path / "index"))
    compressor.export(info, str(save_path / "info"), dtype=np.int64)

    target = merge_compressed(
        folder / "quant_weight.ckpt", folder / "compressed.ckpt", weight, index, info
    )
    before = (folder / "quant_weight.ckpt").stat().st_size
    print(f"{before} bytes -> {target.stat().st_size} bytes: {target}")


if __name__ == "__main__":
    main()
