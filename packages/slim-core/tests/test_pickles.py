"""Pickled files: all data comes back without torch, and no program in them ever runs."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError, FileSecurityError, SlimError
from slim_core.pickles import load_npy, load_npy_dict, load_torch_file

GOLDEN = Path(__file__).parent / "golden"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
TENSORS = {
    "embed.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "whole": BASE,
    "transposed": BASE.T,
    "slice": BASE[1:3, ::2],
    "row": BASE[2],
    "half": np.array([1.5, -2.0], np.float16),
    "long": np.array([[1 << 40, -1]]),
    "codes": np.arange(-4, 4, dtype=np.int8),
    "bytes": np.array([0, 255], np.uint8),
    "mask": np.array([True, False, True]),
    "double": np.array(0.1),
    "empty": np.zeros((0, 3), np.float32),
    "fp8": np.array([1.0, -0.5, 448.0]).astype(ml_dtypes.float8_e4m3fn),
    "head.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
}
ARRAYS = {
    "layer.weight": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "layer.scale": np.array([0.5, 0.25, 2.0], np.float32),
    "fortran": np.arange(6, dtype=np.float16).reshape(2, 3),
    "big_endian": np.array([1, 2, 3], ">i4"),
    "scalar": np.float32(1.5),
}


@pytest.fixture
def golden(tmp_path_factory):
    """Return copies, since a clone can have modes that are refused."""
    folder = tmp_path_factory.mktemp("golden")
    for file in GOLDEN.iterdir():
        if file.suffix in (".bin", ".npy"):
            (folder / file.name).write_bytes(file.read_bytes())
            (folder / file.name).chmod(0o600)
    return folder


def assert_same(loaded, expected):
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        got = loaded[name]
        assert got.dtype == array.dtype, name
        assert got.shape == array.shape, name
        np.testing.assert_array_equal(got, array)
        if got.ndim:
            assert got.flags.writeable
            assert got.flags.c_contiguous


def save_npy(path: Path, value: object) -> Path:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)
    path.chmod(0o600)
    return path


def npy_of_pickle(path: Path, data: bytes) -> Path:
    header = io.BytesIO()
    descr = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(header, descr)
    path.write_bytes(header.getvalue() + data)
    path.chmod(0o600)
    return path


def zip_of_pickle(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    path.chmod(0o600)
    return path


# ---------------------------------------------------------------- data comes back


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_golden_torch_files(golden, name):
    assert_same(load_torch_file(golden / name), TENSORS)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_golden_torch_files_as_checkpoints(golden, name):
    checkpoint = open_checkpoint(golden / name)
    assert set(checkpoint.tensors) == set(TENSORS)
    for key, expected in TENSORS.items():
        assert checkpoint.tensors[key].shape == expected.shape
        np.testing.assert_array_equal(checkpoint.load(key), expected)
    assert dict(checkpoint.aliases) == {"head.weight": "embed.weight"}
    total = sum(array.nbytes for array in TENSORS.values())
    assert checkpoint.nbytes == total - TENSORS["head.weight"].nbytes


def test_sharded_bin_checkpoint(tmp_path):
    for number in (1, 2):
        file = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        data = (GOLDEN / "zip.bin").read_bytes()
        file.write_bytes(data)
        file.chmod(0o600)
    with pytest.raises(CheckpointError, match="is both in pytorch_model-00001-of-00002"):
        open_checkpoint(tmp_path)
    file.rename(tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match="shard 2 of 2"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)


@pytest.mark.parametrize("name", ["numpy1_dict.npy", "numpy2_dict.npy"])
def test_golden_numpy_dictionaries(golden, name):
    assert_same(load_npy_dict(golden / name), ARRAYS)


def test_golden_dictionary_of_torch_tensors(golden):
    assert_same(load_npy_dict(golden / "torch_dict.npy"), TENSORS)


def test_reading_needs_no_torch(golden):
    code = f"""
        import sys
        sys.modules["torch"] = None  # importing it now raises ImportError
        from slim_core.pickles import load_npy_dict, load_torch_file
        assert len(load_npy_dict(r"{golden}/torch_dict.npy")) == {len(TENSORS)}
        assert len(load_torch_file(r"{golden}/zip.bin")) == {len(TENSORS)}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | hnp.arrays(hnp.scalar_dtypes().filter(lambda t: t.kind in "biufc"), hnp.array_shapes())
    | hnp.arrays(np.float32, ()).map(lambda array: array[()]),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES), st.sampled_from([2, 3, 4, 5]))
def test_any_data_comes_back_in_every_protocol(tmp_path_factory, value, protocol):
    array = np.empty((), object)
    array[()] = OrderedDict(value)
    path = tmp_path_factory.mktemp("npy") / "x.npy"
    loaded = load_npy_dict(npy_of_pickle(path, pickle.dumps(array, protocol)))
    assert_equal(loaded, value)


def assert_equal(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    else:
        np.testing.assert_array_equal(got, expected)


def test_plain_arrays(tmp_path):
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.save(tmp_path / "x.npy", np.asfortranarray(array))
    (tmp_path / "x.npy").chmod(0o600)
    np.testing.assert_array_equal(load_npy(tmp_path / "x.npy"), array)
    with pytest.raises(CheckpointError, match=r"not a dictionary[^\n]*\n.*load_npy"):
        load_npy_dict(tmp_path / "x.npy")
    with pytest.raises(CheckpointError, match=r"objects[^\n]*\n.*load_npy_dict"):
        load_npy(save_npy(tmp_path / "d.npy", {}))
    whole = (tmp_path / "x.npy").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.npy"):
            load_npy(tmp_path / "x.npy")


def test_everything_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
    names += ["uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"]
    names += ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
    state = {name: torch.ones(3, 2, dtype=getattr(torch, name)) for name in names}
    state["big"] = torch.randn(300, 7)[:, 2:5]
    for number, new in enumerate((True, False)):
        file = tmp_path / f"{number}.bin"
        torch.save(state, file, _use_new_zipfile_serialization=new)
        file.chmod(0o600)
        loaded = load_torch_file(file)
        for name in names:
            assert loaded[name].dtype.name == name
            assert loaded[name].astype(np.complex128).tolist() == np.ones((3, 2)).tolist()
        np.testing.assert_array_equal(loaded["big"], state["big"].numpy())


# ---------------------------------------------------------------- programs do not run


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


SENTINEL = "slim-sentinel"
ATTACKS = {
    "posix.system": Call(os.system, f"touch {SENTINEL}"),
    "builtins.eval": Call(eval, f"open('{SENTINEL}', 'w')"),
    "builtins.exec": Call(exec, f"open('{SENTINEL}', 'w')"),
    "builtins.getattr": Call(getattr, {}, "clear"),
    "Popen": Call(subprocess.Popen, ["touch", SENTINEL]),
    "numpy.load": Call(np.load, SENTINEL),
    "builtins.set": Call(builtins.set, [1]),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("protocol", [2, 4])
def test_attacks_are_refused_by_name(tmp_path, monkeypatch, name, depth, protocol):
    monkeypatch.chdir(tmp_path)
    attack = ATTACKS[name]
    value = [attack, {"w": attack}, {"w": [{"x": (1, attack)}]}][depth]
    pattern = name.replace("builtins", "(builtins|__builtin__)")
    array = np.empty((), object)
    array[()] = value
    npy = npy_of_pickle(tmp_path / "x.npy", pickle.dumps(array, protocol))
    with pytest.raises(FileSecurityError, match=pattern):
        load_npy_dict(npy)
    for bare in (pickle.dumps(value, protocol), pickle.dumps(array, protocol)):
        file = zip_of_pickle(tmp_path / "pytorch_model.bin", bare)
        with pytest.raises(FileSecurityError):
            load_torch_file(file)
        with pytest.raises(CheckpointError):
            open_checkpoint(file)
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(zip_of_pickle(tmp_path / "y.bin", pickle.dumps(value, protocol)))
    assert not Path(SENTINEL).exists()


def test_an_attack_within_a_pickled_storage_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = b"".join(
        pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    inner = head + pickle.dumps(ATTACKS["posix.system"], 2) + pickle.dumps([], 2)
    program = b"ctorch.storage\n_load_from_bytes\n(" + pickle.dumps(inner, 4)[2:-1] + b"tR."
    body = pickle_of_object_array(b"}X\x01\x00\x00\x00w" + program[:-1] + b"s")
    with pytest.raises(FileSecurityError, match=r"posix\.system"):
        load_npy_dict(npy_of_pickle(tmp_path / "x.npy", body))
    legacy = tmp_path / "x.bin"
    legacy.write_bytes(inner)
    legacy.chmod(0o600)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_checkpoint(legacy)
    assert not Path(SENTINEL).exists()


def pickle_of_object_array(item: bytes) -> bytes:
    """Return the pickle of a 0-d object array around the opcodes of its item."""
    return (
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01)cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR"
        b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](" + item + b"etb."
    )


def test_the_hand_made_frame_is_sound(tmp_path):
    body = pickle_of_object_array(b"}X\x01\x00\x00\x00wK\x07s")
    assert load_npy_dict(npy_of_pickle(tmp_path / "x.npy", body)) == {"w": 7}


NAMES = ["numpy\nndarray", "numpy\ndtype", "collections\nOrderedDict", "torch\nFloatStorage",
         "torch._utils\n_rebuild_tensor_v2", "numpy.core.multiarray\nscalar"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "state",
    [
        b"}X\x05\x00\x00\x00valueK\x01s",
        b"N}X\x08\x00\x00\x00functionK\x01s\x86",
        b"(K\x01tK\x01\x86",
    ],
)
def test_the_stand_ins_cannot_be_changed(tmp_path, golden, name, state):
    program = b"\x80\x04c" + name.encode() + b"\n" + state + b"b."
    with pytest.raises(CheckpointError, match="damaged pickle"):
        load_npy_dict(npy_of_pickle(tmp_path / "x.npy", program))
    assert_same(load_npy_dict(golden / "torch_dict.npy"), TENSORS)


@pytest.mark.parametrize("ending", [b"", b"K\x00)\x29\x89}tR"])
def test_storages_and_tensors_cannot_be_changed(tmp_path, ending):
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x00\x00\x00\x00K\x01tQ"
    )
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" if ending else b""
    program = b"\x80\x02" + start + storage + ending + b"}b."
    with pytest.raises(CheckpointError, match=r"the state of a (storage|tensor) cannot be set"):
        load_torch_file(zip_of_pickle(tmp_path / "x.bin", program, {"data/0": b"\0" * 4}))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04cnumpy\ndtype\n(X\x05\x00\x00\x00f4,f4K\x00K\x01tR.",
        b"\x80\x04cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR(K\x03X\x01\x00\x00\x00Xtb.",
        b"\x80\x04cnumpy\ndtype\n(X\x01\x00\x00\x00MtR.",
        b"\x80\x04ctorch.storage\n_load_from_bytes\n(K\x01tR.",
        b"\x80\x04cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x01\x00\x00\x00OtRC\x00tR.",
        b"\x80\x04cnumpy\ndtype\n(NtR.",
        b"\x80\x04cnumpy.core.multiarray\nscalar\n(K\x01K\x01tR.",
        b"\x80\x04cnumpy\nndarray\n(K\x01tR.",
        b"\x80\x04c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        b"\x80\x04X\x01\x00\x00\x00aQ.",  # a persistent id
        b"\x80\x04}.",  # no array around it
        b"\x80\x04",
        b"",
        b"\x80\x04\x8f.",  # a set
        b"\x80\x04](h\x00e.",
    ],
)
def test_odd_pickles_get_typed_errors(tmp_path, program):
    with pytest.raises(CheckpointError, match=r"x\.npy"):
        load_npy_dict(npy_of_pickle(tmp_path / "x.npy", program))


def test_small_files_cannot_ask_for_much(tmp_path):
    doubling = b"\x80\x04}X\x01\x00\x00\x00a]q\x00" + b"h\x00\x86q\x00" * 60 + b"s."
    assert len(load_torch_file(zip_of_pickle(tmp_path / "x.bin", doubling))["a"]) == 2
    tracemalloc.start()
    for program in (
        b"}r\xff\xff\xff\x7f.",  # a memo index
        b"\x80\x05}X\x01\x00\x00\x00a\x96" + b"\xff" * 4 + b"\x03\0\0\0s.",  # a bytearray
        b"\x80\x05}X\x01\x00\x00\x00a\x8e" + b"\xff" * 4 + b"\x03\0\0\0s.",  # bytes
        b"\x80\x05\x95" + b"\xff" * 4 + b"\x03\0\0\0}.",  # a frame
    ):
        npy = npy_of_pickle(tmp_path / "x.npy", program)
        with pytest.raises(CheckpointError):
            load_npy_dict(npy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_other_contents_are_refused(tmp_path):
    for value, message in [
        ([1], "holds a list, not a dictionary"),
        ({1: 2}, "the key 1 is not text"),
        ({"a": np.array([None])}, "nested array of Python objects"),
        ({"a": {1, 2}}, "set"),
    ]:
        array = np.empty((), object)
        array[()] = value
        with pytest.raises(SlimError, match=message):
            load_npy_dict(npy_of_pickle(tmp_path / "x.npy", pickle.dumps(array, 4)))
    loop: dict = {}
    loop["self"] = loop
    array[()] = loop
    with pytest.raises(CheckpointError, match="containing itself"):
        load_npy_dict(npy_of_pickle(tmp_path / "x.npy", pickle.dumps(array, 4)))
    with pytest.raises(CheckpointError, match="objects in place of one"):
        load_npy_dict(npy_of_pickle(tmp_path / "x.npy", pickle.dumps(np.array([None, None]), 4)))


def test_files_that_others_can_write_are_refused(tmp_path):
    file = save_npy(tmp_path / "x.npy", {})
    file.chmod(0o666)
    for load in (load_npy, load_npy_dict, load_torch_file):
        with pytest.raises(FileSecurityError, match="written by others"):
            load(file)
    file.chmod(0o600)
    with pytest.raises(FileSecurityError, match="more than 10"):
        load_npy_dict(file, max_bytes=10)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "torch_dict.npy", "numpy2_dict.npy"])
def test_every_truncation_is_a_typed_error(tmp_path, name):
    whole = (GOLDEN / name).read_bytes()
    file = tmp_path / name
    load = load_npy_dict if name.endswith("npy") else load_torch_file
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        file.chmod(0o600)
        with pytest.raises((CheckpointError, FileSecurityError)):
            load(file)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "torch_dict.npy", "numpy2_dict.npy"])
@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # numpy, of headers with an L
def test_damage_never_gets_past_as_another_error(tmp_path, name):
    whole = (GOLDEN / name).read_bytes()
    rng = np.random.default_rng(0)
    file = tmp_path / name
    file.touch(0o600)
    load = load_npy_dict if name.endswith("npy") else load_torch_file
    for _ in range(500):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        file.write_bytes(data)
        try:
            loaded = load(file)
        except SlimError:
            continue
        assert isinstance(loaded, dict)


# ---------------------------------------------------------------- torch files made by hand


def storage_program(count: int, offset: int, shape: bytes, strides: bytes) -> bytes:
    """Return the opcodes of {"w": tensor} over storage 0 of float32."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + b"J" + struct.pack("<i", count) + b"tQ" + b"J" + struct.pack("<i", offset)
        + shape + strides + b"\x89}tRs."
    )  # fmt: skip


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_a_hand_made_archive_loads(tmp_path):
    program = storage_program(4, 1, b"K\x03\x85", b"K\x01\x85")
    file = zip_of_pickle(tmp_path / "x.bin", program, {"data/0": FOUR})
    np.testing.assert_array_equal(load_torch_file(file)["w"], np.arange(1, 4, dtype=np.float32))


@pytest.mark.parametrize(
    ("program", "records", "message"),
    [
        (storage_program(4, 2, b"K\x03\x85", b"K\x01\x85"), {"data/0": FOUR}, "beyond its storage"),
        (storage_program(4, -1, b"K\x03\x85", b"K\x01\x85"), {"data/0": FOUR}, "strides"),
        (storage_program(4, 0, b"K\x03\x85", b"K\x01K\x01\x86"), {"data/0": FOUR}, "strides"),
        (storage_program(4, 0, b"K\x09\x85", b"K\x00\x85"), {"data/0": FOUR}, "repeats elements"),
        (storage_program(4, 0, b"K\x04\x85", b"K\x01\x85"), {}, "no record data/0"),
        (storage_program(8, 0, b"K\x04\x85", b"K\x01\x85"), {"data/0": FOUR}, "16 bytes, not 32"),
        (
            storage_program(4, 0, b"K\x04\x85", b"K\x01\x85"),
            {"data/0": FOUR, "byteorder": b"big"},
            "big-endian",
        ),
        (
            storage_program(4, 0, b"K\x04\x85", b"K\x01\x85")[:-2]
            + storage_program(2, 0, b"K\x02\x85", b"K\x01\x85")[3:-1].replace(b"w", b"v")
            + b"u.",
            {"data/0": FOUR},
            "two sizes",
        ),
        (
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89}tRs.",
            {},
            "form that is not supported",
        ),
        (
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v3\n(K\x01K\x00))\x89}K\x01tRs.",
            {},
            "form that is not supported",
        ),
        (b"\x80\x02}.", {"extra/data.pkl": b""}, None),
        (b"\x80\x02]X\x01\x00\x00\x00aa.", {}, "holds a list"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", {}, "'w' is not a tensor but a int"),
        (b"\x80\x02}K\x01K\x01s.", {}, "1 is not a tensor"),
    ],
)
def test_odd_archives(tmp_path, program, records, message):
    file = zip_of_pickle(tmp_path / "x.bin", program, records)
    if message is None:
        assert not open_checkpoint(file).tensors
        return
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file)


def test_other_files_are_named(tmp_path):
    file = tmp_path / "x.bin"
    for content in (b"", b"text", b"PK\x03\x04", pickle.dumps(5), pickle.dumps({"a": 1})):
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            open_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "x")
    file.chmod(0o600)
    with pytest.raises(CheckpointError, match=r"not one of torch\.save"):
        open_checkpoint(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b" " * 1000)
    file.chmod(0o600)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(file)
