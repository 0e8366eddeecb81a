"""General-purpose compressors, each behind one pair of functions on bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import blosc2
import lz4.block
import zstandard


@dataclass(frozen=True)
class Peer:
    """A compressor; both functions take and give bytes."""

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]
    repeats: int


def peers() -> list[Peer]:
    """Return the peers, one thread each."""
    blosc2.set_nthreads(1)
    result = []
    for level, repeats in ((1, 5), (3, 5), (19, 1)):
        packer, reader = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        result.append(Peer(f"zstd -{level}", packer.compress, reader.decompress, repeats))
    result.append(Peer("zlib -6", lambda data: zlib.compress(data, 6), zlib.decompress, 1))
    result.append(Peer("lz4", lz4.block.compress, lz4.block.decompress, 5))
    result.append(
        Peer(
            "blosc2 bitshuffle+zstd1",
            lambda data: blosc2.compress(
                data, typesize=1, clevel=1, filter=blosc2.Filter.BITSHUFFLE, codec=blosc2.Codec.ZSTD
            ),
            blosc2.decompress,
            3,
        )
    )
    return result
