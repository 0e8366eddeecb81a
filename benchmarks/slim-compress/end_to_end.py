"""A checkpoint of the size of a 7B model: time and memory to compress, load and hand it off.

32 layers of seven matrices each, 4096 and 11008 wide, lowbit codes of Gaussian weights: 6.5 GB, and
16 GB of disk at most with what is made of them.  ``--layers 2`` takes a sixteenth of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
from support.datasets import gauss, lowbit
from support.measure import save

from slim_compress import open_compressed
from slim_core.checkpoint import ShardWriter, open_checkpoint

LAYERS = 32
SHAPES = {
    **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"), (4096, 4096)),
    **dict.fromkeys(("mlp.gate", "mlp.up"), (11008, 4096)),
    "mlp.down": (4096, 11008),
}
# What a caller of CANN's executor pays besides the compression itself: it only copies files.
STUB = """\
    #!{python}
    import struct, sys
    k1, n1 = int(sys.argv[1]), int(sys.argv[2])
    data = open(sys.argv[8], "rb").read()
    open(sys.argv[9], "wb").write(data)
    open(sys.argv[10], "wb").write(bytes(8 * -(-k1 // 8) * -(-n1 // 8)))
    open(sys.argv[11], "wb").write(struct.pack("<3I", 8, 8, len(data)))
"""


def write_model(target: Path, layers: int) -> None:
    """Write the checkpoint."""
    rng = np.random.default_rng(7)
    target.mkdir()
    block = lowbit(gauss(rng, (4096, 4096)))
    types: dict[str, object] = {"model_quant_type": "W8A8S", "version": "1.0.0"}
    with ShardWriter(target, "quant_model_weight_w8a8s") as writer:
        for layer in range(layers):
            for name, (n, k) in SHAPES.items():
                matrix = np.roll(np.tile(block, (3, 3))[:n, :k], layer + len(name), axis=1)
                stem = f"model.layers.{layer}.{name}_proj"
                writer.add(f"{stem}.weight", matrix)
                writer.add(f"{stem}.deq_scale", np.ones(n, np.int64))
                types |= {f"{stem}.weight": "W8A8S", f"{stem}.deq_scale": "W8A8S"}
    (target / "quant_model_description.json").write_text(json.dumps(types))
    (target / "quant_model_description.json").chmod(0o600)


def child(code: str) -> dict[str, float]:
    """Run code in a process of its own; return its seconds and peak memory over the imports."""
    head = """
        import json, time
        from pathlib import Path
        from slim_compress.checkpoint import *
        from slim_compress import CompressConfig

        def peak():
            rows = Path("/proc/self/status").read_text().splitlines()
            return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM")) / 1024

        before, start = peak(), time.perf_counter()
    """
    tail = (
        'print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak() - before}))'
    )
    script = textwrap.dedent(head) + code + "\n" + tail
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {key: round(value, 2) for key, value in row.items()}


def forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load_raw(directory: Path) -> int:
    """Read all tensors and return their bytes."""
    checkpoint = open_checkpoint(directory)
    return sum(checkpoint.load(name).nbytes for name in checkpoint.tensors)


def load_compressed(directory: Path) -> int:
    """Read and decode all tensors and return their bytes."""
    loader = open_compressed(directory)
    return sum(array.nbytes for _, array in loader.tensors(jobs=os.cpu_count() or 1))


def load_times(raw: Path, small: Path) -> dict[str, float]:
    """Return seconds to read all tensors, from the disk and from the page cache."""
    row = {}
    for what, directory, load in (("raw", raw, load_raw), ("slc1", small, load_compressed)):
        for state in ("cold", "warm"):
            if state == "cold":
                forget(directory)
            start = time.perf_counter()
            row["bytes"] = float(load(directory))
            row[f"{what} {state}"] = round(time.perf_counter() - start, 3)
    return row


def measure(raw: Path, scratch: Path, layers: int) -> dict[str, object]:
    jobs = os.cpu_count() or 1
    sizes = [n * k for n, k in SHAPES.values()]
    result: dict[str, object] = {
        "layers": layers,
        "weight_bytes": layers * sum(sizes),
        "largest_mib": max(sizes) / 2**20,
        "jobs": jobs,
    }
    stub = scratch / "stub"
    stub.write_text(textwrap.dedent(STUB).format(python=sys.executable))
    stub.chmod(0o700)

    def note(what: str, row: dict[str, float]) -> None:
        result[what] = row
        print(what, row, flush=True)

    def compress(what: str, target: Path, settings: str) -> None:
        config = f"CompressConfig(multiprocess_num={jobs}{settings})"
        note(what, child(f"compress_checkpoint({str(raw)!r}, {str(target)!r}, {config})"))

    small, back = scratch / "slc1", scratch / "back"
    load_raw(raw)  # into the page cache, for the first measurement as for those after it
    compress("compress", small, "")
    note("verify", child(f"verify_checkpoint({str(small)!r}, {str(raw)!r}, jobs={jobs})"))
    note("load all tensors, seconds", load_times(raw, small))
    code = f"decompress_checkpoint({str(small)!r}, {str(back)!r}, jobs={jobs})"
    note("decompress", child(code))
    # A later measurement needs no room for the output of an earlier one.
    shutil.rmtree(back)
    shutil.rmtree(small)
    compress("compress fast", small, ", fast=True")
    note("load all tensors of fast, seconds", load_times(raw, small))
    shutil.rmtree(small)
    compress("hand-off to a stub that copies", small, f", codec='device', executor={str(stub)!r}")
    shutil.rmtree(small)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--model", type=Path, help="the checkpoint, written if it is not there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = options.model or Path(folder) / "w8a8s"
        if not raw.exists():
            write_model(raw, options.layers)
        save("end_to_end", measure(raw, Path(folder), options.layers))


if __name__ == "__main__":
    main()
