"""Whether peak memory depends on the number of layers.

Each run is a process of its own; what it had before the work began (imports) is taken off.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import peak_memory_of, save, write_llama

COMMAND = "nox -s bench-slim-ptq"
HIDDEN, INTER = 1024, 2816

RUN = """
import torch
from slim_ptq.api import quantize
from slim_ptq.calibration.text import TokenWindows, windows
import transformers.models.llama.modeling_llama
torch.set_num_threads(1)
ids = list(range(2, 1026))
data = TokenWindows(windows(ids, 2, 512, 1), "ids") if sys.argv[3] == "w8a8" else None
start()
quantize(sys.argv[1], sys.argv[2], scheme=sys.argv[3], calibration=data)
"""


def main() -> None:
    """Measure and save."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for layers in (4, 8, 16):
            model = root / f"model-{layers}"
            nbytes = write_llama(model, layers=layers, hidden=HIDDEN, inter=INTER)
            row: dict[str, float] = {"layers": layers, "model_mb": round(nbytes / 1e6, 1)}
            for scheme in ("w8a16", "w8a8"):
                base, peak = peak_memory_of(RUN, str(model), f"{model}-{scheme}", scheme)
                row[f"{scheme}_mb"] = round((peak - base) / 1e6, 1)
            rows.append(row)
    block = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTER) * 4 / 1e6
    save(
        "memory",
        COMMAND,
        {
            "question": "peak resident memory of the work itself, one process a run",
            "float32_block_mb": round(block, 1),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
