"""A second decoder, slow and written from docs/slc1.md alone, against the golden vectors."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from slim_compress import compress, decompress, inspect

GOLDEN = Path(__file__).parent / "golden"
VECTORS = sorted(GOLDEN.glob("*.npz"))


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def number(data, offset, size):
    return int.from_bytes(data[offset : offset + size], "little")


class SlowDecoder:
    """Sections 2 to 5 of the document, in their order and words."""

    def __init__(self, weight, index, info):
        self.weight, self.index = weight.tobytes(), index.tobytes()
        i = self.index
        assert i[:4] == b"SLC1"
        assert i[4] == 1
        tables, flags = i[5], i[6]
        self.tile_n, self.tile_k = i[7] & 15, i[7] >> 4
        self.n, self.k = number(i, 8, 4), number(i, 12, 4)
        self.n1, self.k1 = -(-self.n // 16), -(-self.k // 32)
        self.tn, self.tk = -(-self.n1 // self.tile_n), -(-self.k1 // self.tile_k)
        assert number(i, 16, 8) == len(self.weight)
        assert number(i, 24, 4) == crc32c(i[:24] + bytes(4) + i[28:])
        expected = [self.tile_k, self.tile_n, self.k, self.n, 1, 0x31434C53, 1]
        assert info.tolist() == [*expected, self.n * self.k, len(self.weight), flags]
        self.tables, at = [], 28
        for _ in range(tables):
            table, size = self.read_table(i[at:])
            self.tables.append(table)
            at += size
        self.entries = i[at:]
        assert len(self.entries) == 8 * self.tn * self.tk
        assert self.weight[-8:] == bytes(8)

    @staticmethod
    def read_table(raw):
        first, last = ((raw[at] ^ 128) - 128 for at in (0, 1))
        lengths = [0] * 256 + [raw[3]]
        for i, value in enumerate(range(first, last + 1)):
            lengths[value % 256] = raw[4 + i // 2] >> 4 * (i % 2) & 15
        size = 4 + (last - first + 2) // 2
        assert lengths[first % 256]
        assert lengths[last % 256]
        assert max(lengths) <= 11
        assert sum(2 ** (11 - length) for length in lengths if length) == 2**11
        codes, code, last = {}, -1, 0
        for length, symbol in sorted((length, s) for s, length in enumerate(lengths) if length):
            code = (code + 1) << (length - last)
            codes[length, code], last = symbol, length
        if lengths[256]:
            assert raw[2] == lengths[:256].index(0)
            return (codes, raw[2]), size
        return (codes, None), size

    def shape(self, t):
        row, col = divmod(t, self.tk)
        fn = min(self.tile_n, self.n1 - row * self.tile_n)
        return fn, min(self.tile_k, self.k1 - col * self.tile_k)

    def tile(self, t):
        fn, fk = self.shape(t)
        size = fn * fk * 512
        start = sum(number(self.entries, 8 * before + 4, 2) for before in range(t))
        length = number(self.entries, 8 * t + 4, 2)
        payload = self.weight[start : start + length]
        mode, fill = self.entries[8 * t + 6], self.entries[8 * t + 7]
        if mode == 0:
            data = payload
        elif mode == 1:
            data = bytes([fill]) * size
        elif mode == 2:
            data = self.nib(payload, size)
        else:
            assert mode == 3
            data = self.huf(payload, size)
        assert len(data) == size
        assert crc32c(data) == number(self.entries, 8 * t, 4)
        return data

    @staticmethod
    def nib(payload, size):
        data = bytearray(size)
        for group in range(size // 64):
            for i in range(32):
                byte = payload[32 * group + i]
                for half, nibble in enumerate((byte & 15, byte >> 4)):
                    data[64 * group + 32 * half + i] = ((nibble ^ 8) - 8) & 255
        escapes = list(payload[size // 2 :])
        data = [escapes.pop(0) if value == 0xF8 else value for value in data]
        assert not escapes
        return bytes(data)

    def huf(self, payload, size):
        parts, used = [], []
        at = 16
        for s in range(8):
            field = number(payload, 2 * s, 2)
            assert field < 1 << 15
            codes, placeholder = self.tables[field >> 13]
            stream = payload[at : at + (field & 8191)]
            at += field & 8191
            parts.append(self.read_stream(stream, codes, size // 8))
            used.append(placeholder)
        escapes = list(payload[at:])
        data = bytearray()
        for part, placeholder in zip(parts, used, strict=True):
            for symbol in reversed(part):
                data.append(escapes.pop(0) if symbol == 256 else symbol)
                assert symbol != placeholder
        assert not escapes
        return bytes(data)

    @staticmethod
    def read_stream(stream, codes, count):
        bits = [byte >> b & 1 for byte in stream for b in range(8)]
        symbols, at = [], 0
        for _ in range(count):
            code, length = 0, 0
            while (length, code) not in codes:
                code, length, at = code << 1 | bits[at], length + 1, at + 1
            symbols.append(codes[length, code])
        assert not any(bits[at:])
        assert len(bits) - at < 8
        return symbols

    def matrix(self):
        padded = np.zeros((self.n1 * 16, self.k1 * 32), np.uint8)
        for t in range(self.tn * self.tk):
            row, col = divmod(t, self.tk)
            fn = self.shape(t)[0]
            data = self.tile(t)
            for b, value in enumerate(data):
                c, r, j = b // (fn * 512), b // 32 % (fn * 16), b % 32
                padded[row * self.tile_n * 16 + r, (col * self.tile_k + c) * 32 + j] = value
        assert not padded[self.n :].any()
        assert not padded[:, self.k :].any()
        return padded[: self.n, : self.k].view(np.int8)


def test_there_is_a_vector_for_each_mode_and_for_escapes():
    assert len(VECTORS) == 6
    modes = {mode for vector in VECTORS for mode, count in facts(vector).modes.items() if count}
    assert modes == {"raw", "fill", "nib", "huf"}
    assert any(facts(vector).tables > 1 for vector in VECTORS)


def facts(vector):
    arrays = np.load(vector)
    return inspect(arrays["weight"], arrays["index"], arrays["info"])


@pytest.mark.parametrize("vector", VECTORS, ids=[vector.stem for vector in VECTORS])
def test_golden_vectors(vector, instruction_set):
    arrays = np.load(vector)
    stream = arrays["weight"], arrays["index"], arrays["info"]
    digest = json.loads((GOLDEN / "sha256.json").read_text())[vector.stem]
    decoded = decompress(*stream)
    assert hashlib.sha256(decoded.tobytes()).hexdigest() == digest["matrix"]
    assert (
        hashlib.sha256(b"".join(array.tobytes() for array in stream)).hexdigest()
        == (digest["stream"])
    )
    if instruction_set == "scalar":
        assert np.array_equal(SlowDecoder(*stream).matrix(), decoded)
    # Today's encoder still writes these bytes.
    fast = vector.stem == "nib"
    again = compress(decoded, fast=fast, transposed=bool(stream[2][9]))
    assert [array.tobytes() for array in again] == [array.tobytes() for array in stream]


def test_slow_decoder_agrees_on_fresh_data(sparse):
    matrix = sparse(130, 260, seed=5)
    for fast in (False, True):
        assert np.array_equal(SlowDecoder(*compress(matrix, fast=fast)).matrix(), matrix)


def test_slow_decoder_reads_single_tiles(sparse):
    matrix = sparse(260, 530)
    decoder = SlowDecoder(*compress(matrix))
    for t in (0, 4, 8):
        row, col = divmod(t, 3)
        fn, fk = decoder.shape(t)
        tile = np.frombuffer(decoder.tile(t), np.int8).reshape(fk, fn * 16, 32)
        nd = tile.transpose(1, 0, 2).reshape(fn * 16, fk * 32)
        expected = matrix[128 * row : 128 * (row + 1), 256 * col : 256 * (col + 1)]
        assert np.array_equal(nd[: expected.shape[0], : expected.shape[1]], expected)
