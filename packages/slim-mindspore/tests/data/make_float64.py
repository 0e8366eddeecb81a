"""Write ``slim_ptq_float64.npz`` from what ``benchmarks/slim-mindspore/agreement/write.py`` wrote.

::

    python packages/slim-mindspore/tests/data/make_float64.py FOLDER
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from slim_core.checkpoint import open_checkpoint

COLUMNS = (0, 700, 1400, 2047)


def main(folder):
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2048, 2))
    arrays = {"columns": np.array(COLUMNS), "signs": signs.astype("i1")}
    for file in sorted(folder.glob("*.npz")):
        name = file.stem
        with np.load(file) as stored:
            logits = stored["float64"]
            arrays |= {key: stored[key].astype(np.int16) for key in ("ids", "calib")}
        checkpoint = open_checkpoint(folder / name)
        tensors = {tensor: checkpoint.load(tensor) for tensor in checkpoint.tensors}
        arrays[f"{name}|logits"] = np.concatenate([logits[..., COLUMNS], logits @ signs], axis=-1)
        arrays[f"{name}|names"] = np.array(list(tensors))
        arrays[f"{name}|sha256"] = np.array([digest(tensor) for tensor in tensors.values()])
        for tensor, scale in tensors.items():
            if tensor.endswith("kv_cache_scale"):
                arrays[f"{name}|{tensor}"] = scale
    np.savez_compressed(Path(__file__).with_name("slim_ptq_float64.npz"), **arrays)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
