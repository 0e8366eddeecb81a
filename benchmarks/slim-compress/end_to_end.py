"""Layers of the size of a 7B model: time and memory to compress, load and hand them off.

Two layers of 32: seven matrices each, 4096 and 11008 wide, lowbit codes of Gaussian weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
from support.datasets import gauss, lowbit
from support.measure import ROOT, save
from support.sparse_model import METHODS, write_sparse_model

from slim_compress import open_compressed
from slim_core.checkpoint import ShardWriter, open_checkpoint

LAYERS = 2
SHAPES = {
    **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"), (4096, 4096)),
    **dict.fromkeys(("mlp.gate", "mlp.up"), (11008, 4096)),
    "mlp.down": (4096, 11008),
}
MODEL = ROOT / ".." / "shared" / "models" / "tiny-llama"
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


def write_model(target: Path) -> int:
    """Write the checkpoint and return the bytes of its weights."""
    rng = np.random.default_rng(7)
    target.mkdir()
    block = lowbit(gauss(rng, (4096, 4096)))
    types: dict[str, object] = {"model_quant_type": "W8A8S", "version": "1.0.0"}
    total = 0
    with ShardWriter(target, "quant_model_weight_w8a8s") as writer:
        for layer in range(LAYERS):
            for name, (n, k) in SHAPES.items():
                matrix = np.roll(np.tile(block, (3, 3))[:n, :k], layer + len(name), axis=1)
                stem = f"model.layers.{layer}.{name}_proj"
                writer.add(f"{stem}.weight", matrix)
                writer.add(f"{stem}.deq_scale", np.ones(n, np.int64))
                types |= {f"{stem}.weight": "W8A8S", f"{stem}.deq_scale": "W8A8S"}
                total += matrix.size
    (target / "quant_model_description.json").write_text(json.dumps(types))
    (target / "quant_model_description.json").chmod(0o600)
    return total


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


def load_times(raw: Path, small: Path) -> dict[str, float]:
    """Return seconds to read all tensors, from the disk and from the page cache."""
    row = {}
    jobs = os.cpu_count() or 1
    for what, directory in (("raw", raw), ("slc1", small)):
        for state in ("cold", "warm"):
            if state == "cold":
                forget(directory)
            start = time.perf_counter()
            if what == "raw":
                checkpoint = open_checkpoint(directory)
                count = sum(checkpoint.load(name).nbytes for name in checkpoint.tensors)
            else:
                loader = open_compressed(directory)
                count = sum(array.nbytes for _, array in loader.tensors(jobs=jobs))
            row[f"{what} {state}"] = round(time.perf_counter() - start, 3)
    row["bytes"] = float(count)
    return row


def layers(scratch: Path) -> dict[str, object]:
    raw, small, fast, device = (scratch / name for name in ("raw", "slc1", "fast", "device"))
    weights = write_model(raw)
    stub = scratch / "stub"
    stub.write_text(textwrap.dedent(STUB).format(python=sys.executable))
    stub.chmod(0o700)
    jobs = os.cpu_count() or 1
    largest = max(n * k for n, k in SHAPES.values()) / 2**20
    result: dict[str, object] = {"weight_bytes": weights, "largest_mib": largest, "jobs": jobs}
    for name, target, settings in (
        ("compress", small, f"multiprocess_num={jobs}"),
        ("compress fast", fast, f"multiprocess_num={jobs}, fast=True"),
        (
            "hand-off to a stub that copies",
            device,
            f"multiprocess_num={jobs}, codec='device', executor={str(stub)!r}",
        ),
    ):
        code = f"compress_checkpoint({str(raw)!r}, {str(target)!r}, CompressConfig({settings}))"
        result[name] = child(code)
        print(name, result[name], flush=True)
    result["verify"] = child(f"verify_checkpoint({str(small)!r}, {str(raw)!r}, jobs={jobs})")
    result["decompress"] = child(
        f"decompress_checkpoint({str(small)!r}, {str(scratch / 'back')!r}, jobs={jobs})"
    )
    result["load all tensors, seconds"] = load_times(raw, small)
    result["load all tensors of fast, seconds"] = load_times(raw, fast)
    for name in (
        "verify",
        "decompress",
        "load all tensors, seconds",
        "load all tensors of fast, seconds",
    ):
        print(name, result[name], flush=True)
    return result


def real_model(scratch: Path) -> dict[str, object]:
    """Compress, verify and restore tiny-llama, by the command line."""
    result: dict[str, object] = {}
    for method in METHODS:
        raw, small, back = (scratch / f"{method}_{name}" for name in ("raw", "slc1", "back"))
        write_sparse_model(MODEL, raw, method)
        outputs = [
            subprocess.run(
                [sys.executable, "-m", "slim_compress.cli", *map(str, command)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for command in (
                ("compress", raw, small, "--verify"),
                ("verify", small, "--original", raw),
                ("decompress", small, back),
            )
        ]
        first, second = open_checkpoint(raw), open_checkpoint(back)
        same = set(first.tensors) == set(second.tensors) and all(
            np.array_equal(first.load(name), second.load(name)) for name in first.tensors
        )
        result[method] = {"lines": outputs[0].splitlines()[1:], "every tensor equal": same}
        print(method, result[method], flush=True)
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, object] = {"layers": layers(Path(folder))}
        if MODEL.exists():
            results["tiny-llama"] = real_model(Path(folder))
        else:
            print(f"no {MODEL.name} beside the repository: the real model is left out")
    save("end_to_end", results)
