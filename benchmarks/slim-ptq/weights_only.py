"""How fast weights-only W8A16 is, against moving the same bytes and against optimum-quanto.

All read the same random bfloat16 Llama and flush what they write to disk; slim-ptq reads it back
too.  Runs take turns in random order, since the speed of a disk changes from second to second, and
memory is slower when a virtual machine touches it for the first time.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import save, write_llama
from optimum.quanto import QuantizedModelForCausalLM, qint8
from transformers import AutoModelForCausalLM

from slim_core.checkpoint import open_checkpoint
from slim_core.scheme import QuantScheme
from slim_ptq import quantize
from slim_ptq.inventory import take_inventory
from slim_ptq.methods import MinMax, relative_error
from slim_ptq.tensors import from_numpy

COMMAND = "nox -s bench-slim-ptq"
ROUNDS = 7
BUFFER = 16 << 20  # bytes


def with_quanto(model: Path, output: Path) -> None:
    """Quantize the linear layers with optimum-quanto and save, as its documentation shows."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    quantized = QuantizedModelForCausalLM.quantize(loaded, weights=qint8, exclude="lm_head")
    quantized.save_pretrained(output)
    flush(output)


def arithmetic(model: Path) -> Callable[[], None]:
    """Return the work of slim-ptq on weights in memory, on all cores as the pipeline does it."""
    checkpoint = open_checkpoint(model)
    linears = take_inventory(checkpoint).linears
    weights = [from_numpy(checkpoint.load(f"{name}.weight")) for name in linears]
    scheme = QuantScheme.parse("w8a16")
    threads = torch.get_num_threads()

    def one(weight: torch.Tensor) -> None:
        layer = MinMax().quantize("", weight, scheme.weight).layer("", scheme, None, "bfloat16")
        relative_error(weight, layer)

    def run() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(one, weights))

    return run


def memory_copy(read: int, written: int) -> Callable[[], None]:
    """Return a copy of so many bytes from memory to memory, in pieces."""
    source, target = np.ones(BUFFER, np.uint8), np.ones(BUFFER, np.uint8)

    def run() -> None:
        for _ in range((read + written) // BUFFER):
            target[:] = source

    return run


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def flush(directory: Path) -> None:
    for file in files_of(directory):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def forget(directory: Path) -> None:
    """Have the next reader of the weights wait for the disk."""
    flush(directory)
    for file in files_of(directory):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def transfer(source: Path, target: Path, nbytes: int) -> None:
    """Read all weights, and write so many bytes of them to disk."""
    buffer = memoryview(bytearray(BUFFER))
    left = nbytes
    with target.open("wb", buffering=0) as out:
        for file in files_of(source):
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    left -= out.write(buffer[: min(count, left)])
        os.fsync(out.fileno())
    target.unlink()


def measured(runs: dict[str, tuple[bool, Callable[[], object]]], model: Path) -> dict[str, Any]:
    """Return the seconds of each run, in turns; of wall time and of the processors.

    Parameters
    ----------
    runs : dict
        Whether the model is to come from disk, and what to run.
    """
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    chance = random.Random(0)
    for number in range(ROUNDS + 1):
        chance.shuffle(order)  # memory that one run frees makes the next one faster
        for name in order:
            cold, run = runs[name]
            os.sync()
            if cold:
                forget(model)
            before, started = os.times(), time.perf_counter()
            run()
            seconds, after = time.perf_counter() - started, os.times()
            if number:  # the first round imports, and touches memory for the first time
                wall[name].append(seconds)
                busy[name].append(after.user + after.system - before.user - before.system)
    return {
        name: {
            "median": round(statistics.median(times), 3),
            "smallest": round(min(times), 3),
            "largest": round(max(times), 3),
            "processor": round(statistics.median(busy[name]), 3),
        }
        for name, times in wall.items()
    }


def main() -> None:
    """Measure and save."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = root / "model"
        nbytes = write_llama(model, layers=8, hidden=2048, inter=5632)

        def fresh(name: str) -> Path:
            shutil.rmtree(root / name, ignore_errors=True)
            return root / name

        def slim() -> None:
            quantize(model, root / "slim", scheme="w8a16", overwrite=True)

        slim()
        written = sum(file.stat().st_size for file in files_of(root / "slim"))

        def moved() -> None:
            transfer(model, root / "bytes", written)

        seconds = measured(
            {
                "transfer, from disk": (True, moved),
                "slim-ptq w8a16, from disk": (True, slim),
                "transfer, from memory": (False, moved),
                "slim-ptq w8a16, from memory": (False, slim),
                "optimum-quanto qint8, from memory": (
                    False,
                    lambda: with_quanto(model, fresh("quanto")),
                ),
                "arithmetic of slim-ptq alone": (False, arithmetic(model)),
                "copy of the bytes in memory": (False, memory_copy(nbytes, written)),
            },
            model,
        )
    slim_disk = seconds["slim-ptq w8a16, from disk"]
    save(
        "weights_only",
        COMMAND,
        {
            "question": f"seconds of W8A16, {ROUNDS} runs each in turns; processor: of all cores",
            "threads": torch.get_num_threads(),
            "model_gigabytes": nbytes / 1e9,
            "written_gigabytes": written / 1e9,
            "seconds": seconds,
            "slim_over_transfer_from_disk": round(
                slim_disk["median"] / seconds["transfer, from disk"]["median"], 3
            ),
            "slim_over_quanto_from_memory": round(
                seconds["slim-ptq w8a16, from memory"]["median"]
                / seconds["optimum-quanto qint8, from memory"]["median"],
                3,
            ),
            "cores_busy": round(
                slim_disk["processor"] / slim_disk["median"] / torch.get_num_threads(), 3
            ),
        },
    )


if __name__ == "__main__":
    main()
