"""How small: against entropy and peers, on synthetic sets (real_models.py has real ones).

Also what each choice of the format is worth: tile size, several tables, escapes.

Peers get the tiles that slc1 has, 32 KiB in NZ order, so that all allow access to single tiles.
"""

from __future__ import annotations

import numpy as np
from support.datasets import datasets
from support.measure import save
from support.peers import peers

from slim_compress import _native, compress, decompress, entropy_ratio, inspect

LIMITS = {"A": 0.442, "B": 0.509, "C": 0.383, "G": 0.90, "H": 1.002, "I": 0.002}
TILE = 32768


def tiles_of(matrix: np.ndarray) -> list[bytes]:
    """Return the bytes of all whole tiles in NZ order."""
    n, k = (side // unit * unit for side, unit in zip(matrix.shape, (128, 256), strict=True))
    cut = matrix[:n, :k].reshape(n // 128, 128, k // 256, 8, 32)
    order = cut.transpose(0, 2, 3, 1, 4)
    return [tile.tobytes() for tile in order.reshape(-1, TILE)]


def size(matrix: np.ndarray, **options: object) -> float:
    weight, index = _native.encode(matrix, **options)
    return (weight.size + index.size + 80) / matrix.size


def synthetic() -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for letter, what, matrix in datasets():
        stream = compress(matrix)
        assert np.array_equal(decompress(*stream), matrix)
        row: dict[str, object] = {
            "what": what,
            "entropy": entropy_ratio(matrix),
            "slc1": inspect(*stream).ratio,
            "slc1 fast": inspect(*compress(matrix, fast=True)).ratio,
            "tables": inspect(*stream).tables,
        }
        if letter in LIMITS:
            row["limit"] = LIMITS[letter]
        tiles = tiles_of(matrix)
        for peer in peers():
            row[peer.name] = sum(len(peer.compress(tile)) for tile in tiles) / matrix.size
        rows[letter] = row
        numbers = " ".join(f"{v:8.4f}" for v in row.values() if isinstance(v, float))
        print(f"{letter} {what:<36} {numbers}", flush=True)
    return rows


def choices() -> dict[str, dict[str, float]]:
    """Return the ratio for tile sizes, one table or several, with and without escapes."""
    rows = {}
    for letter, _, matrix in datasets():
        if letter not in "ABCEG":
            continue
        row = {
            f"{n * k // 2} KiB tiles": size(matrix, tile_n=n, tile_k=k)
            for n, k in ((2, 4), (4, 4), (4, 8), (8, 8))
        }
        row["one table"] = size(matrix, max_tables=1)
        row["no escape"] = size(matrix, escapes=False)
        rows[letter] = row
        print(letter, {name: round(value, 4) for name, value in row.items()}, flush=True)
    return rows


if __name__ == "__main__":
    save("ratio", {"sets": synthetic(), "choices": choices()})
