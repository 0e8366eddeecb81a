"""What W8A8 calibration costs beyond the bare float forward passes on the same data.

The bare passes run the same blocks on the same batches, without observers, quantization or files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _common import best_of, save, write_llama
from transformers import AutoModelForCausalLM

from slim_core.checkpoint import open_checkpoint
from slim_core.recipe import Recipe
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows, windows
from slim_ptq.inventory import take_inventory
from slim_ptq.pipeline.blocks import BlockRunner

COMMAND = "nox -s bench-slim-ptq"
SAMPLES, LENGTH = 32, 512  # the defaults of the command
REPEATS = 2


def main() -> None:
    """Measure and save."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 2000, (SAMPLES * LENGTH,), generator=generator).tolist()
    data = TokenWindows(windows(ids, SAMPLES, LENGTH, 4), "random ids")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        nbytes = write_llama(root / "model", layers=2, hidden=2048, inter=5632)

        def whole_model(dtype: torch.dtype) -> float:
            model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=dtype).eval()

            def run() -> None:
                with torch.no_grad():
                    for batch in data.batches:
                        model.model(batch, use_cache=False)

            return best_of(run, REPEATS)

        def blockwise() -> None:
            checkpoint = open_checkpoint(root / "model")
            runner = BlockRunner(checkpoint, take_inventory(checkpoint), data, torch.device("cpu"))
            for index in range(len(runner)):
                with runner.loaded(index) as block:
                    runner.advance(block, index, {})

        def quantized(observer: str = "mean_minmax", dtype: str = "auto") -> None:
            recipe = Recipe.build(scheme="w8a8", observer=observer)
            target = root / "out"
            quantize(
                root / "model",
                target,
                recipe=recipe,
                calibration=data,
                dtype=dtype,
                overwrite=True,
            )

        seconds = {
            "bare forward passes": whole_model(torch.float32),
            "bare forward passes in bfloat16": whole_model(torch.bfloat16),
            "forward passes block by block, read from disk": best_of(blockwise, REPEATS),
            "quantize w8a8, mean_minmax, all included": best_of(quantized, REPEATS),
            "quantize w8a8, histogram, all included": best_of(
                lambda: quantized("histogram"), REPEATS
            ),
            "quantize w8a8 in bfloat16, mean_minmax, all included": best_of(
                lambda: quantized(dtype="bfloat16"), REPEATS
            ),
        }
    bare = seconds["bare forward passes"]
    save(
        "calibration",
        COMMAND,
        {
            "question": f"time against bare forwards, {SAMPLES} x {LENGTH} tokens, of {REPEATS}",
            "threads": torch.get_num_threads(),
            "model_gigabytes": nbytes / 1e9,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "ratio_to_bare": {name: round(value / bare, 3) for name, value in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
