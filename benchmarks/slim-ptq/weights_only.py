"""How fast weights-only W8A16 is, against moving the same bytes and against optimum-quanto.

All read the same random bfloat16 Llama.  slim-ptq flushes what it writes to disk before it gives it
its name, and so does the plain transfer of as many bytes; a file copy and optimum-quanto do not.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import REPEATS, best_of, save, write_llama
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


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def forget(directory: Path) -> None:
    """Have the next reader of the weights wait for the disk."""
    for file in files_of(directory):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def transfer(source: Path, target: Path, nbytes: int) -> None:
    """Read all weights, and write so many bytes of them to disk."""
    buffer = memoryview(bytearray(16 << 20))
    left = nbytes
    with target.open("wb", buffering=0) as out:
        for file in files_of(source):
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    left -= out.write(buffer[: min(count, left)])
        os.fsync(out.fileno())
    target.unlink()


def main() -> None:
    """Measure and save."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = root / "model"
        nbytes = write_llama(model, layers=8, hidden=2048, inter=5632)

        def fresh(name: str) -> Path:
            shutil.rmtree(root / name, ignore_errors=True)
            return root / name

        def from_disk(run: Callable[[], object]) -> float:
            times = []
            for _ in range(REPEATS):
                forget(model)
                times.append(best_of(run, 1))
            return min(times)

        def slim() -> None:
            quantize(model, fresh("slim"), scheme="w8a16")

        slim()
        written = sum(file.stat().st_size for file in files_of(root / "slim"))
        seconds = {
            "the same bytes read from disk and written to it": from_disk(
                lambda: transfer(model, root / "bytes", written)
            ),
            "slim-ptq w8a16, from disk": from_disk(slim),
            "file copy, from memory, not flushed": best_of(
                lambda: shutil.copytree(model, fresh("copy"))
            ),
            "slim-ptq w8a16, from memory": best_of(slim),
            "optimum-quanto qint8, from memory, not flushed": best_of(
                lambda: with_quanto(model, fresh("quanto"))
            ),
            "arithmetic of slim-ptq alone": kernel_only(model),
        }
    transferred, slim_seconds, *_ = seconds.values()
    save(
        "weights_only",
        COMMAND,
        {
            "question": f"gigabytes of bfloat16 weights a second, best of {REPEATS}",
            "threads": torch.get_num_threads(),
            "model_gigabytes": nbytes / 1e9,
            "written_gigabytes": written / 1e9,
            "gigabytes_per_second": {
                name: round(nbytes / value / 1e9, 3) for name, value in seconds.items()
            },
            "slim_over_transfer_seconds": round(slim_seconds / transferred, 3),
        },
    )


if __name__ == "__main__":
    main()
