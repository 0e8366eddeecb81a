import zlib

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import CheckpointError, FileSecurityError, FormatError
from slim_mindspore import ckpt
from slim_mindspore.ckpt import CkptFile, read_ckpt, write_ckpt

NUMPY_TYPES = [t for t in ckpt.DTYPES.items() if t[0] not in ("Int4", "BFloat16")]


@pytest.fixture
def every_dtype():
    random = np.random.default_rng(0)
    tensors = {
        name: random.integers(0, 2 if name == "Bool" else 100, (3, 5)).astype(dtype)
        for name, dtype in NUMPY_TYPES
    }
    tensors["bf16"] = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    tensors["scalar"] = np.float32(2.5).reshape(())
    return tensors


def test_mindspore_reads_what_we_write(tmp_path, every_dtype):
    path = tmp_path / "a.ckpt"
    write_ckpt(path, every_dtype)
    loaded = ms.load_checkpoint(str(path))
    assert list(loaded) == list(every_dtype)
    for name, array in every_dtype.items():
        found = (
            loaded[name].astype(ms.float32).asnumpy()
            if name == "bf16"
            else (loaded[name].asnumpy())
        )
        assert found.shape == array.shape
        np.testing.assert_array_equal(found, array.astype(found.dtype))


def test_we_read_what_mindspore_writes(tmp_path, every_dtype):
    path = tmp_path / "b.ckpt"
    items = [
        {"name": name, "data": ms.Tensor(array.astype(np.float32), ms.bfloat16)}
        if name == "bf16"
        else {"name": name, "data": ms.Tensor(array)}
        for name, array in every_dtype.items()
    ]
    items.append({"name": "q", "data": ms.Tensor(np.ones((2, 2), np.int8), ms.qint4x2)})
    ms.save_checkpoint(items, str(path), crc_check=True)
    file = CkptFile(path)
    assert file.int4 == {"q"}
    for name, array in every_dtype.items():
        found = file.load(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_bytes_equal_those_of_mindspore(tmp_path, every_dtype):
    del every_dtype["bf16"]
    write_ckpt(tmp_path / "ours.ckpt", every_dtype)
    items = [{"name": name, "data": ms.Tensor(array)} for name, array in every_dtype.items()]
    ms.save_checkpoint(items, str(tmp_path / "theirs.ckpt"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_int4_is_marked(tmp_path):
    write_ckpt(tmp_path / "c.ckpt", {"q": np.ones((2, 3), np.int8)}, int4=frozenset(["q"]))
    assert str(ms.load_checkpoint(str(tmp_path / "c.ckpt"))["q"].dtype) == "Int4"
    with pytest.raises(FormatError, match="q: packed int4"):
        write_ckpt(tmp_path / "d.ckpt", {"q": np.ones(2, np.int16)}, int4=frozenset(["q"]))


def test_tensors_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "CHUNK_BYTES", 64)
    array = np.arange(100, dtype=np.float32).reshape(4, 25)
    path = tmp_path / "e.ckpt"
    write_ckpt(path, {"a": array, "b": array[:1]})
    np.testing.assert_array_equal(read_ckpt(path)["a"], array)
    np.testing.assert_array_equal(ms.load_checkpoint(str(path))["a"].asnumpy(), array)


def test_mode_and_replacement(tmp_path):
    path = tmp_path / "f.ckpt"
    write_ckpt(path, {"a": np.zeros(1, np.float32)})
    write_ckpt(path, {"a": np.ones(1, np.float32)})
    assert path.stat().st_mode & 0o777 == 0o400
    assert read_ckpt(path)["a"][0] == 1


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "g.ckpt"
    write_ckpt(path, {"a": np.zeros(1, np.float32)})
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"b: a \.ckpt file cannot hold complex64"):
        write_ckpt(path, {"a": np.ones(1, np.float32), "b": np.ones(1, np.complex64)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0.0, 0.999))
def test_a_truncated_file_is_an_error(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    tensors = {"one": np.arange(7.0), "two": np.ones((2, 3), np.int8)}
    write_ckpt(folder / "whole.ckpt", tensors)
    write_ckpt(folder / "first.ckpt", {"one": tensors["one"]})
    data = (folder / "whole.ckpt").read_bytes()
    size = int(len(data) * cut)
    path = folder / "cut.ckpt"
    path.write_bytes(data[:size])
    if size == (folder / "first.ckpt").stat().st_size:  # cut between values: a whole, shorter file
        assert list(read_ckpt(path)) == ["one"]
        return
    with pytest.raises(CheckpointError):
        read_ckpt(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=64))
def test_garbage_is_an_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bad") / "i.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_ckpt(path)


def test_damage_is_found_by_the_crc(tmp_path):
    path = tmp_path / "j.ckpt"
    write_ckpt(path, {"a": np.zeros(8, np.float32)})
    data = bytearray(path.read_bytes())
    trailer = b"crc_num" + zlib.crc32(data).to_bytes(10, "big")
    path.chmod(0o600)
    path.write_bytes(bytes(data) + trailer)
    np.testing.assert_array_equal(read_ckpt(path)["a"], np.zeros(8))
    data[-1] ^= 1
    path.write_bytes(bytes(data) + trailer)
    with pytest.raises(CheckpointError, match="CRC"):
        read_ckpt(path)


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_ckpt(tmp_path / "nothing.ckpt")
    path = tmp_path / "open.ckpt"
    write_ckpt(path, {"a": np.zeros(1, np.float32)}, mode=0o666)
    with pytest.raises(FileSecurityError, match="written by others"):
        read_ckpt(path)
    write_ckpt(path, {"alpha": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="alpha"):
        CkptFile(path).load("alhpa")
