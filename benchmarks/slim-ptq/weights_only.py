"""How fast weights-only W8A16 is, against a plain file copy and against optimum-quanto.

All three read the same random bfloat16 Llama and leave a complete directory on the same disk.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from _common import best_of, save, write_llama
from optimum.quanto import QuantizedModelForCausalLM, qint8
from transformers import AutoModelForCausalLM

from slim_core.checkpoint import open_checkpoint
from slim_core.scheme import QuantScheme
from slim_ptq import quantize
from slim_ptq.inventory import take_inventory
from slim_ptq.methods import MinMax, relative_error
from slim_ptq.tensors import from_numpy

COMMAND = "nox -s bench-slim-ptq"


def with_quanto(model: Path, output: Path) -> None:
    """Quantize the linear layers with optimum-quanto and save, as its documentation shows."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    quantized = QuantizedModelForCausalLM.quantize(loaded, weights=qint8, exclude="lm_head")
    quantized.save_pretrained(output)


def kernel_only(model: Path) -> float:
    """Return the seconds that the arithmetic alone takes, on weights in memory."""
    checkpoint = open_checkpoint(model)
    linears = take_inventory(checkpoint).linears
    scheme = QuantScheme.parse("w8a16")

    def quantize_and_measure(weight: torch.Tensor) -> None:
        layer = MinMax().quantize("", weight, scheme.weight).layer("", scheme, None, "bfloat16")
        relative_error(weight, layer)

    total = 0.0
    for name in linears:
        weight = from_numpy(checkpoint.load(f"{name}.weight"))
        total += best_of(lambda w=weight: quantize_and_measure(w))
    return total


def main() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        nbytes = write_llama(root / "model", layers=8, hidden=2048, inter=5632)

        def fresh(name: str) -> Path:
            shutil.rmtree(root / name, ignore_errors=True)
            return root / name

        seconds = {
            "file copy": best_of(lambda: shutil.copytree(root / "model", fresh("copy"))),
            "slim-ptq w8a16": best_of(
                lambda: quantize(root / "model", fresh("slim"), scheme="w8a16")
            ),
            "optimum-quanto qint8": best_of(lambda: with_quanto(root / "model", fresh("quanto"))),
            "slim-ptq arithmetic alone": kernel_only(root / "model"),
        }
    rates = {name: nbytes / value / 1e9 for name, value in seconds.items()}
    save(
        "weights_only",
        COMMAND,
        {
            "question": "gigabytes of bfloat16 weights a second, one core, best of 3",
            "model_gigabytes": nbytes / 1e9,
            "gigabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
            "slim_over_copy": round(rates["slim-ptq w8a16"] / rates["file copy"], 3),
            "slim_over_arithmetic": round(
                rates["slim-ptq w8a16"] / rates["slim-ptq arithmetic alone"], 3
            ),
            "slim_over_quanto": round(rates["slim-ptq w8a16"] / rates["optimum-quanto qint8"], 2),
        },
    )


if __name__ == "__main__":
    main()
