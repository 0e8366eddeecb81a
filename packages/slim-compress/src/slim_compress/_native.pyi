from typing import TypedDict

import numpy as np

class StreamError(ValueError):
    """Arguments: number of the tile or -1, reason."""

class _Facts(TypedDict):
    n: int
    k: int
    tile_n: int
    tile_k: int
    tiles: int
    tables: int
    transposed: bool
    modes: list[int]

def encode(
    matrix: np.ndarray,
    *,
    threads: int = 1,
    fast: bool = False,
    tile_n: int = 8,
    tile_k: int = 8,
    max_tables: int = 4,
    escapes: bool = True,
    transposed: bool = False,
) -> tuple[np.ndarray, np.ndarray]: ...
def decode_into(
    weight: np.ndarray, index: np.ndarray, out: np.ndarray, *, threads: int = 1
) -> None: ...
def check(weight: np.ndarray, index: np.ndarray, *, threads: int = 1) -> None: ...
def decode_tile(weight: np.ndarray, index: np.ndarray, tile: int) -> bytes: ...
def inspect(weight: np.ndarray, index: np.ndarray) -> _Facts: ...
def nd_to_nz(matrix: np.ndarray) -> np.ndarray: ...
def histogram(matrix: np.ndarray) -> np.ndarray: ...
def crc32c(data: np.ndarray) -> int: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
