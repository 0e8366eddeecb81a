"""How fast: each instruction set, peers beside it, and threads.

Speeds are bytes of the uncompressed matrix per second of CPU time of one thread, best of several
runs; for threads, of wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from support.datasets import gauss, heavy, lowbit
from support.measure import best_seconds, save
from support.peers import peers

from slim_compress import _native, compress, decompress, decompress_tile, inspect

SHAPE = (4096, 4096)  # 16 MiB
REPEATS = 20
THREADS = (1, 2, 4, 8, 16)


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20260102)
    return {"A": lowbit(gauss(rng, SHAPE)), "C": lowbit(heavy(rng, SHAPE))}


def rate(matrix: np.ndarray, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return GB/s of one thread."""
    return round(matrix.nbytes / 1e9 / best_seconds(work, repeats), 3)


def instruction_sets(sets: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    rows = {}
    chosen = _native.instruction_set()
    for name in _native.instruction_sets():
        _native.use_instruction_set(name)
        row: dict[str, float] = {}
        for letter, matrix in sets.items():
            for label, fast in (("", False), (" fast", True)):
                weight, index = _native.encode(matrix, fast=fast)
                out = decompress(*compress(matrix, fast=fast))
                row[f"{letter} encode{label}"] = rate(
                    matrix, lambda m=matrix, f=fast: _native.encode(m, fast=f)
                )
                row[f"{letter} decode{label}"] = rate(
                    matrix, lambda w=weight, i=index, o=out: _native.decode_into(w, i, o)
                )
                row[f"{letter} decode tiles{label}"] = rate(
                    matrix, lambda w=weight, i=index: _native.check(w, i)
                )
                assert np.array_equal(out, matrix)
        first = next(iter(sets.values()))
        row["nd to nz"] = rate(first, lambda m=first: _native.nd_to_nz(m))
        row["crc32c"] = rate(first, lambda m=first: _native.crc32c(m.ravel()))
        rows[name] = row
        print(name, row, flush=True)
    _native.use_instruction_set(chosen)
    return rows


def peer_speeds(sets: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the speed of peers on tiles of 32 KiB."""
    rows = {}
    for peer in peers():
        if peer.name == "zstd -19":
            continue
        row = {}
        for letter, matrix in sets.items():
            piece = matrix[:1024]
            tiles = [piece.ravel()[at : at + 32768].tobytes() for at in range(0, piece.size, 32768)]
            packed = [peer.compress(tile) for tile in tiles]
            row[f"{letter} encode"] = rate(
                piece, lambda t=tiles, p=peer: [p.compress(x) for x in t], peer.repeats
            )
            row[f"{letter} decode"] = rate(
                piece, lambda t=packed, p=peer: [p.decompress(x) for x in t], 5 * peer.repeats
            )
        rows[peer.name] = row
        print(peer.name, row, flush=True)
    return rows


def threads(matrix: np.ndarray) -> dict[str, dict[str, float]]:
    rows = {}
    weight, index = _native.encode(matrix)
    out = decompress(*compress(matrix))
    for count in THREADS:
        times = [
            best_seconds(work, 10, clock=time.perf_counter)
            for work in (
                lambda t=count: _native.encode(matrix, threads=t),
                lambda t=count: _native.decode_into(weight, index, out, threads=t),
            )
        ]
        again = _native.encode(matrix, threads=count)
        same = bool(np.array_equal(again[0], weight) and np.array_equal(again[1], index))
        rates = [round(matrix.nbytes / 1e9 / seconds, 3) for seconds in times]
        rows[str(count)] = {"encode": rates[0], "decode": rates[1], "same bytes": same}
        print(count, "threads", rows[str(count)], flush=True)
    return rows


def one_tile() -> dict[str, float]:
    """Return the time for one tile of a large matrix, all checks of the index included."""
    rng = np.random.default_rng(1)
    matrix = np.tile(lowbit(gauss(rng, (1024, 4096))), (8, 7))
    stream = compress(matrix, jobs=2)
    seconds = best_seconds(lambda: decompress_tile(*stream, 37, 55), 50)
    row = {"tiles": float(sum(inspect(*stream).modes.values())), "microseconds": seconds * 1e6}
    print("one tile of 8192 x 28672:", row, flush=True)
    return row


if __name__ == "__main__":
    data = matrices()
    copy = np.empty_like(data["A"])
    results = {
        "unit": "GB/s of uncompressed bytes",
        "memory copy": rate(copy, lambda: np.copyto(copy, data["A"])),
        "instruction sets": instruction_sets(data),
        "peers on 32 KiB tiles": peer_speeds(data),
        "threads, wall time, set A": threads(data["A"]),
        "one tile": one_tile(),
    }
    save("speed", results)
