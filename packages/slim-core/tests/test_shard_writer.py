"""Writing safetensors: the same bytes back, bounded memory, complete or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from slim_core.checkpoint import ShardWriter, open_checkpoint, part
from slim_core.errors import FormatError, InvalidTypeError, InvalidValueError

DTYPES = [
    np.int8,
    np.uint8,
    np.float16,
    ml_dtypes.bfloat16,
    np.float32,
    np.int32,
    np.int64,
    np.bool_,
]
MIB = 1 << 20
FAILING = {"copyfileobj": "shutil.copyfileobj", "fsync": "os.fsync"}


def write(
    directory: Path, tensors: dict[str, np.ndarray], prefix: str = "m", **options
) -> list[str]:
    with ShardWriter(directory, prefix, **options) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    return sorted(file.name for file in directory.iterdir())


def arrays(sizes: list[int]) -> dict[str, np.ndarray]:
    return {f"t{i}": np.full(size, i, np.int8) for i, size in enumerate(sizes)}


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1
    ),
    st.sampled_from([None, 1, 16, 100]),
    st.sampled_from([0, 64, part.BUFFER_BYTES]),
)
def test_round_trip_through_the_library_and_our_reader(tmp_path_factory, specs, limit, buffer):
    directory = tmp_path_factory.mktemp("w")
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": rng.integers(0, 2, shape).astype(dtype) for i, (dtype, shape) in enumerate(specs)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "BUFFER_BYTES", buffer)
        patch.setattr(part, "HEADER_ROOM", 400)  # both too small and large enough
        write(directory, tensors, max_shard_bytes=limit)
    loaded = {}
    for file in directory.glob("*.safetensors"):
        loaded |= safetensors.numpy.load_file(file)
        assert_aligned(file)
    checkpoint = open_checkpoint(directory)
    assert set(loaded) == set(tensors) == set(checkpoint.tensors)
    for name, array in tensors.items():
        for got in (loaded[name], checkpoint.load(name)):
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(got, array)


def assert_aligned(file: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, info in open_checkpoint(file).tensors.items():
        assert header[name]["data_offsets"][0] % info.dtype.itemsize == 0


def test_views_and_byte_orders_are_converted(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "big": base.astype(">f4"),
        "scalar": np.array(3, np.int64),
        "fp8": base.astype(ml_dtypes.float8_e4m3fn),
    }
    write(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.load(name), array)
    assert checkpoint.tensors["big"].dtype == np.float32
    assert checkpoint.tensors["scalar"].shape == ()


def test_golden_bytes(tmp_path):
    write(tmp_path, {"a": np.array([1, -1], np.int8), "b": np.array([[1.0, 2.0]], np.float32)})
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"I8","shape":[2],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    data = np.array([1, 2], "<f4").tobytes() + b"\x01\xff"
    expected = len(header).to_bytes(8, "little") + header + data
    assert (tmp_path / "m.safetensors").read_bytes() == expected


def test_one_file_has_no_index_and_mode_0400(tmp_path):
    assert write(tmp_path, arrays([3, 5])) == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o400


def test_mode_is_a_parameter(tmp_path):
    write(tmp_path, arrays([3]), mode=0o640)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([40, 40, 40], 100, [["t0", "t1"], ["t2"]]),
        ([50, 50], 100, [["t0"], ["t1"]]),  # reaching the limit ends the shard
        ([49, 50], 100, [["t0", "t1"]]),
        ([10, 500, 10], 100, [["t0"], ["t1"], ["t2"]]),  # a large tensor goes alone
        ([500], 100, [["t0"]]),
        ([0, 500, 0], 100, [["t0", "t1"], ["t2"]]),
    ],
)
def test_shards(tmp_path, sizes, limit, shards):
    names = write(tmp_path, arrays(sizes), max_shard_bytes=limit)
    count = len(shards)
    files = [f"m-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    assert names == [*files, "m.safetensors.index.json"]
    for file, expected in zip(files, shards, strict=True):
        assert list(open_checkpoint(tmp_path / file).tensors) == expected
    index_file = tmp_path / "m.safetensors.index.json"
    assert index_file.stat().st_mode & 0o777 == 0o600
    assert json.loads(index_file.read_text()) == {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        },
    }


def test_many_shards_lose_the_padding(tmp_path, monkeypatch):
    monkeypatch.setattr("slim_core.checkpoint.writer._PADDED_SHARDS", 2)
    names = write(tmp_path, arrays([5, 5, 5]), max_shard_bytes=1)
    assert names[:3] == [f"m-{k}-of-3.safetensors" for k in (1, 2, 3)]
    assert len(open_checkpoint(tmp_path).tensors) == 3


def test_a_tensor_above_the_limit_is_warned_of(tmp_path, caplog):
    write(tmp_path, arrays([10, 500]), max_shard_bytes=100)
    assert [record.args for record in caplog.records] == [("t1", 500, 100)]


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, arrays([9, 100, 8]), max_shard_bytes=50)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_earlier_output_is_replaced_as_a_whole(tmp_path):
    write(tmp_path, arrays([60, 60, 60]), max_shard_bytes=100)
    (tmp_path / "other.safetensors").write_bytes(b"kept")
    names = write(tmp_path, arrays([60, 60]), max_shard_bytes=100)
    assert names == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors",
                     "m.safetensors.index.json", "other.safetensors"]  # fmt: skip
    assert write(tmp_path, arrays([60])) == ["m.safetensors", "other.safetensors"]


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        ShardWriter(tmp_path / "absent", "m")
    for prefix in ("", "a/b", ".hidden"):
        with pytest.raises(InvalidValueError, match="prefix"):
            ShardWriter(tmp_path, prefix)
    with pytest.raises(InvalidTypeError, match="prefix"):
        ShardWriter(tmp_path, 3)
    with pytest.raises(InvalidValueError, match="max_shard_bytes must be at least 1, not 0"):
        ShardWriter(tmp_path, "m", max_shard_bytes=0)
    with pytest.raises(InvalidTypeError, match="max_shard_bytes"):
        ShardWriter(tmp_path, "m", max_shard_bytes=1.5)


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("t", [1, 2], InvalidTypeError, "t must be a numpy array, not list"),
        (3, np.zeros(2), InvalidTypeError, "name must be str"),
        ("t", np.array([None]), FormatError, "t: .*object"),
        ("t", np.zeros(2, ml_dtypes.int4), FormatError, "t: .*int4"),
        ("first", np.zeros(2), InvalidValueError, "'first' is taken"),
        ("__metadata__", np.zeros(2), InvalidValueError, "is taken"),
    ],
)
def test_bad_tensors_leave_nothing_behind(tmp_path, name, array, error, message):
    writer = ShardWriter(tmp_path, "m", max_shard_bytes=1)
    writer.add("first", np.zeros(2))
    writer.add("second", np.zeros(2))
    with pytest.raises(error, match=message), writer:
        writer.add(name, array)
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_name_before_close(tmp_path):
    writer = ShardWriter(tmp_path, "m", max_shard_bytes=8)
    for name, array in arrays([8, 8, 8]).items():
        writer.add(name, array)
    assert list(tmp_path.glob("*.safetensors*")) == []
    files = writer.close()
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert writer.close() == files
    with pytest.raises(InvalidValueError, match="closed"):
        writer.add("late", np.zeros(1))


def test_an_empty_output_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="no tensor"), ShardWriter(tmp_path, "m"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_earlier_output(tmp_path):
    write(tmp_path, arrays([5]))
    before = (tmp_path / "m.safetensors").read_bytes()
    writer = ShardWriter(tmp_path, "m")
    writer.add("x", np.zeros(part.BUFFER_BYTES // 8 + 1))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RuntimeError, match="stop"), writer:
        raise RuntimeError("stop")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == before


@pytest.mark.parametrize("size", [MIB, 1000])
@pytest.mark.parametrize("limit", [None, 4 * MIB])
def test_a_full_disk_leaves_nothing_behind(tmp_path, limit, size):
    """The kernel refuses to let files grow beyond 2 MiB, as a full disk does."""
    code = f"""
        import resource, signal, sys
        import numpy as np
        from slim_core.checkpoint import ShardWriter, part
        part.BUFFER_BYTES = 0
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * MIB}, {2 * MIB}))
        try:
            with ShardWriter(sys.argv[1], "m", max_shard_bytes={limit}) as writer:
                for i in range({20 * MIB // size}):
                    writer.add(str(i), np.zeros({size}, np.int8))
        except OSError as error:
            print(error.errno, error.filename)
    """
    out = run_python(code, str(tmp_path))
    assert out.split() == [str(errno.EFBIG), str(tmp_path / "m.safetensors")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("failing", ["copyfileobj", "fsync"])
def test_a_failure_at_the_end_leaves_nothing_behind(tmp_path, monkeypatch, failing, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(part, "BUFFER_BYTES", 0)
    monkeypatch.setattr(part, "HEADER_ROOM", 8)  # the data must be copied behind the header
    writer = ShardWriter(tmp_path, "m")
    writer.add("x", np.zeros(100))
    monkeypatch.setattr(f"slim_core.checkpoint.part.{FAILING[failing]}", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["replace", "write_json"])
def test_a_failed_rename_leaves_nothing_under_a_final_name(tmp_path, monkeypatch, failing):
    def fail(*_args):
        raise OSError(errno.EIO, "Input/output error")

    if failing == "replace":
        original = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda self, to: fail() if "00002" in str(to) else original(self, to)
        )
    else:
        monkeypatch.setattr("slim_core.checkpoint.writer.write_json", fail)
    with pytest.raises(OSError, match=r"m\.safetensors"):
        write(tmp_path, arrays([8, 8, 8]), max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_final_name(tmp_path):
    code = """
        import sys
        import numpy as np
        from slim_core.checkpoint import ShardWriter
        with ShardWriter(sys.argv[1], "m", max_shard_bytes=1 << 20) as writer:
            for i in range(1_000_000):
                writer.add(str(i), np.zeros(1 << 18, np.int8))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = [file.name for file in tmp_path.iterdir()]
    assert len(left) >= 3
    assert all(name.startswith(".m.") and name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("limit", [None, 8 * MIB])
@pytest.mark.parametrize("itemsize", [8, 1])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, limit, itemsize):
    monkeypatch.setattr(part, "BUFFER_BYTES", 8 * MIB)
    one = np.zeros(2 * MIB + (1 if itemsize == 1 else 0), np.int8)
    tracemalloc.start()
    with ShardWriter(tmp_path, "m", max_shard_bytes=limit) as writer:
        for index in range(40):
            writer.add(str(index), one)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert open_checkpoint(tmp_path).nbytes == 40 * one.nbytes
    # A growing buffer is held twice while it moves; copies go in chunks of 16 MiB.
    assert peak < 36 * MIB


def run_python(code: str, *args: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
