"""Memory stays within bounds, and sizes beyond 32 bits work."""

import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from slim_compress import _native, compress, decompress, decompress_tile
from slim_compress.codec import MAGIC

MIB = 1 << 20


def run(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="needs RLIMIT_AS")
def test_compressing_fits_twice_the_weight_and_the_output():
    code = """
        import resource
        from pathlib import Path
        import numpy as np
        from slim_compress import compress, decompress
        rng = np.random.default_rng(0)
        matrix = np.rint(rng.normal(0, 2.7, (4096, 8192))).astype(np.int8)
        compress(matrix[:128, :256])  # what the first call loads
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        allowed = used + 2 * matrix.nbytes + matrix.nbytes // 2 + (1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        stream = compress(matrix)
        print(stream.weight.size / matrix.size)
        assert np.array_equal(decompress(*stream), matrix)
    """
    assert float(run(code)) < 0.45


def test_what_threads_add_is_bounded():
    """Resident memory over the input: twice the weight, the output and little for each thread."""
    code = """
        import sys
        from pathlib import Path
        import numpy as np
        from slim_compress import compress, decompress
        rng = np.random.default_rng(0)
        matrix = np.tile(np.rint(rng.normal(0, 2.7, (512, 4096))).astype(np.int8), (8, 1))
        compress(matrix[:256], jobs=2)  # what the first call loads
        def resident(what):
            rows = Path("/proc/self/status").read_text().splitlines()
            return next(int(row.split()[1]) for row in rows if row.startswith(what)) * 1024
        before = resident("VmRSS")
        stream = compress(matrix, jobs=int(sys.argv[1]))
        out = np.empty_like(matrix)
        decompress(*stream, jobs=int(sys.argv[1]), out=out)
        print(resident("VmHWM") - before, matrix.nbytes, stream.weight.nbytes)
    """
    peaks = {}
    for threads in (1, 32):
        peak, raw, stored = map(int, run(code, str(threads)).split())
        peaks[threads] = peak
        assert peak <= 2 * raw + stored + threads * 65536  # with the matrix that was decoded
    assert peaks[32] - peaks[1] <= 32 * 4 * 65536


def test_the_instruction_set_can_be_chosen_from_outside():
    code = """
        import os
        os.environ["SLIM_COMPRESS_ISA"] = {name!r}
        from slim_compress import _native
        try:
            print(_native.instruction_set())
        except ValueError as error:
            print(error)
    """
    assert run(code.format(name="scalar")) == "scalar\n"
    assert "no instruction set of this machine: mmx" in run(code.format(name="mmx"))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="needs RLIMIT_AS")
def test_running_out_of_memory_is_an_error_not_a_crash():
    code = """
        import resource
        from pathlib import Path
        import numpy as np
        from slim_compress import compress
        matrix = np.zeros((16384, 16384), np.int8)
        matrix[::3] = 7
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)
        try:
            compress(matrix)
        except MemoryError:
            print("refused")
    """
    assert run(code) == "refused\n"


def test_a_stream_beyond_4_gib(tmp_path):
    """The payload of the last tile lies past 2^32; the file before it is a hole."""
    n, k = 70_000, 65_536
    tiles_n, tiles_k = -(-n // 128), k // 256
    sizes = np.full((tiles_n, tiles_k), 32768, np.int64)
    sizes[-1] = -(-(n - 128 * (tiles_n - 1)) // 16) * 16 * 256
    end = int(sizes.sum())
    last = np.random.default_rng(0).integers(0, 256, int(sizes[-1, -1])).astype(np.uint8)
    path = tmp_path / "weight"
    with path.open("wb") as stream:
        stream.seek(end - last.size)
        stream.write(last.tobytes() + bytes(8))
    assert end > 1 << 32
    entries = np.zeros((sizes.size, 8), np.uint8)
    entries[:, 4:6] = sizes.ravel().astype(np.uint16).view(np.uint8).reshape(-1, 2)
    crc = np.array([_native.crc32c(last)], np.uint32)
    entries[-1, :4] = crc.view(np.uint8)
    header = np.zeros(28, np.uint8)
    header[:8] = np.frombuffer(b"SLC1\x01\x00\x00\x88", np.uint8)
    header[8:16] = np.array([n, k], np.uint32).view(np.uint8)
    header[16:24] = np.array([end + 8], np.uint64).view(np.uint8)
    index = np.concatenate([header, entries.ravel()])
    index[24:28] = np.array([_native.crc32c(index)], np.uint32).view(np.uint8)
    info = np.array([8, 8, k, n, 1, MAGIC, 1, n * k, end + 8, 0])
    weight = np.memmap(path, np.int8, "r")
    tile = decompress_tile(weight, index, info, tiles_n - 1, tiles_k - 1)
    rows = n - 128 * (tiles_n - 1)
    expected = last.view(np.int8).reshape(8, -1, 32).transpose(1, 0, 2).reshape(-1, 256)[:rows]
    assert np.array_equal(tile, expected)


def test_a_matrix_of_one_value_takes_next_to_nothing():
    row = np.full((1, 4096), 3, np.int8)
    matrix = np.broadcast_to(row, (4096, 4096))
    stream = compress(matrix)
    assert stream.weight.size == 8
    assert stream.index.size == 28 + 8 * 512
    assert np.array_equal(decompress(*stream), matrix)
