"""CPU time and excess error of ways to decompose a weight matrix.

    python benchmarks/slim-lowrank/svd_backends.py

CPU seconds of one thread, best of two (one for 4096x4096).  Excess is the Frobenius error over the
optimal one of that rank, minus 1.  ``llm`` has a flat tail below 32 spikes, the hard case;
``decay`` has singular values 1/k.
"""

# ruff: noqa: E402 - the number of threads is read when BLAS is loaded

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slim_core.files import write_json
from slim_lowrank.factorize import choose_backend, truncated_svd
from slim_lowrank.vbmf import vbmf_rank

RESULTS = Path(__file__).parent / "results"
CASES = [
    ((1024, 1024), (64, 256)),
    ((4096, 1024), (64, 256)),
    ((2048, 2048), (64, 512)),
]
LARGE = ((4096, 4096), (1024,))


def spectrum_matrix(shape: tuple[int, int], spectrum: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape)
    if spectrum == "llm":
        left, right = rng.standard_normal((shape[0], 32)), rng.standard_normal((32, shape[1]))
        return (noise + left @ right).astype(np.float32)
    left, _ = np.linalg.qr(noise)
    right, _ = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))
    return ((left / np.arange(1, shape[1] + 1)) @ right.T).astype(np.float32)


def numpy_svd(a: np.ndarray, rank: int) -> Any:
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def torch_svd(a: np.ndarray, rank: int) -> Any:
    u, s, vt = torch.linalg.svd(torch.from_numpy(a), full_matrices=False)
    return u[:, :rank].numpy(), s[:rank].numpy(), vt[:rank].numpy()


def torch_lowrank(a: np.ndarray, rank: int) -> Any:
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(torch.from_numpy(a), q=rank + 8, niter=2)
    return u[:, :rank].numpy(), s[:rank].numpy(), v[:, :rank].T.numpy()


def ours(backend: Any) -> Callable[[np.ndarray, int], Any]:
    return lambda a, rank: truncated_svd(a, rank, backend=backend)


METHODS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "numpy.linalg.svd": numpy_svd,
    "torch.linalg.svd": torch_svd,
    "torch.svd_lowrank (niter 2)": torch_lowrank,
    "slim eigh": ours("eigh"),
    "slim arpack": ours("arpack"),
    "slim randomized": ours("randomized"),
    "slim auto": ours("auto"),
}


def measure(a: np.ndarray, rank: int, best: float, method: Any, repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        u, s, vt = method(a, rank)
        seconds.append(time.process_time() - start)
    product = (u.astype(np.float64) * s) @ vt
    error = float(np.linalg.norm(a.astype(np.float64) - product))
    return {"cpu_seconds": min(seconds), "excess": error / best - 1}


def run_case(
    shape: tuple[int, int], ranks: tuple[int, ...], methods: Any, repeats: int
) -> list[Any]:
    rows = []
    for spectrum in ("llm", "decay") if repeats > 1 else ("llm",):
        a = spectrum_matrix(shape, spectrum)
        gram = a.T.astype(np.float64) @ a
        energies = np.maximum(np.linalg.eigvalsh(gram), 0.0)
        for rank in ranks:
            best = float(np.sqrt(energies[: shape[1] - rank].sum()))
            for name in methods:
                row = {"shape": shape, "rank": rank, "spectrum": spectrum, "method": name}
                row |= measure(a, rank, best, METHODS[name], repeats)
                if name == "slim auto":
                    row["backend"] = choose_backend(shape, rank)
                rows.append(row)
                print(f"{shape} r={rank} {spectrum:6} {name:28}", end=" ")
                print(f"{row['cpu_seconds']:8.3f} s  {row['excess']:+.2e}", flush=True)
    return rows


def time_vbmf() -> float:
    matrix = np.random.default_rng(0).standard_normal((512, 2048))
    start = time.process_time()
    vbmf_rank(matrix)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-large", action="store_true", help="leave out 4096x4096")
    arguments = parser.parse_args()
    rows = [row for shape, ranks in CASES for row in run_case(shape, ranks, METHODS, 2)]
    if not arguments.no_large:
        rows += run_case(*LARGE, ["numpy.linalg.svd", "torch.linalg.svd", "slim auto"], 1)
        times = {row["method"]: row["cpu_seconds"] for row in rows[-3:]}
        share = times["slim auto"] / times["numpy.linalg.svd"]
        print(f"4096x4096, rank 1024: {share:.2f} of the CPU time of numpy.linalg.svd")
    result = {
        "command": "python benchmarks/slim-lowrank/svd_backends.py",
        "numpy": np.__version__,
        "torch": torch.__version__,
        "vbmf_512x2048_cpu_seconds": time_vbmf(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "svd_backends.json", result, 0o644)


if __name__ == "__main__":
    main()
