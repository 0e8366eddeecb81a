"""Writes the golden vectors; run it only when the format gets a new version."""

import hashlib
import json
from pathlib import Path

import numpy as np

from slim_compress import compress

HERE = Path(__file__).parent


def matrices():
    rng = np.random.default_rng(1)
    narrow = np.rint(rng.normal(0, 2.7, (130, 260))).clip(-128, 127).astype(np.int8)
    spread = rng.integers(-128, 128, narrow.shape).astype(np.int8)
    outliers = np.where(rng.random(narrow.shape) < 0.01, spread, narrow)
    yield "huf", narrow, False, False
    yield "huf_escapes", outliers, False, False
    wide = np.rint(rng.normal(0, 25, (128, 256))).clip(-128, 127).astype(np.int8)
    yield "huf_tables", np.where(np.arange(256) < 96, narrow[:128, :256], wide), False, False
    yield "nib", outliers, True, False
    yield "raw", spread[:64, :32].T, False, True
    yield "fill", np.full((16, 64), -5, np.int8), False, False


digests = {}
for name, matrix, fast, transposed in matrices():
    stream = compress(matrix, fast=fast, transposed=transposed)
    np.savez_compressed(
        HERE / f"{name}.npz", weight=stream.weight, index=stream.index, info=stream.info
    )
    digests[name] = {
        "matrix": hashlib.sha256(matrix.tobytes()).hexdigest(),
        "stream": hashlib.sha256(b"".join(array.tobytes() for array in stream)).hexdigest(),
    }
(HERE / "sha256.json").write_text(json.dumps(digests, indent=2) + "\n")
