"""Opening and loading checkpoints: what is found, what is read, what is refused."""

import json
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from slim_core.checkpoint import ShardWriter, copy_side_files, open_checkpoint
from slim_core.errors import CheckpointError, FileSecurityError, OutputExistsError

TENSORS = {
    "model.embed.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.layer.weight": np.linspace(-1, 1, 15).reshape(5, 3).astype(ml_dtypes.bfloat16),
    "model.layer.codes": np.arange(-3, 4, dtype=np.int8),
}


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write with the library of the format, which knows nothing of ours."""
    safetensors.numpy.save_file(tensors, path)
    path.chmod(0o600)
    return path


def save_index(directory: Path, weight_map: dict[str, str], stem: str = "model") -> Path:
    index = directory / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    index.chmod(0o600)
    return index


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    path.chmod(0o600)
    return path


def entry(start: int, end: int, dtype: str = "I8", shape: list | None = None) -> dict:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = list(TENSORS)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save(tmp_path / files[0], {names[0]: TENSORS[names[0]]})
    save(tmp_path / files[1], {name: TENSORS[name] for name in names[1:]})
    save_index(tmp_path, {names[0]: files[0], names[1]: files[1], names[2]: files[1]})
    return tmp_path


def assert_same(checkpoint, tensors=TENSORS):
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        info, array = checkpoint.tensors[name], checkpoint.load(name)
        assert (info.shape, info.dtype, info.nbytes) == (
            expected.shape,
            expected.dtype,
            expected.nbytes,
        )
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_single_file_in_a_directory(tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    assert_same(open_checkpoint(tmp_path))
    assert open_checkpoint(tmp_path).config == {}


def test_one_file_by_its_own_path(tmp_path):
    checkpoint = open_checkpoint(str(save(tmp_path / "any.safetensors", TENSORS)))
    assert_same(checkpoint)
    assert checkpoint.side_files() == []


def test_shards_with_index_are_iterated_in_order(sharded):
    checkpoint = open_checkpoint(sharded)
    assert_same(checkpoint)
    shards = list(checkpoint.iter_shards())
    assert [file.name for file, _ in shards] == sorted(
        f.name for f in sharded.glob("*.safetensors")
    )
    assert [name for _, names in shards for name in names] == list(checkpoint.tensors)
    assert checkpoint.nbytes == sum(array.nbytes for array in TENSORS.values())


def test_shards_without_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert_same(open_checkpoint(sharded))


@pytest.mark.parametrize("limit", [None, 40])
def test_reads_what_the_writer_wrote(tmp_path, limit):
    with ShardWriter(tmp_path, "quant_model_weight_w8a8", max_shard_bytes=limit) as writer:
        for name, array in TENSORS.items():
            writer.add(name, array)
    assert_same(open_checkpoint(tmp_path))
    if limit:
        (tmp_path / "quant_model_weight_w8a8.safetensors.index.json").unlink()
        assert_same(open_checkpoint(tmp_path))


def test_files_beyond_the_index_are_not_read(sharded):
    save(sharded / "consolidated.safetensors", TENSORS)
    assert_same(open_checkpoint(sharded))


def test_model_safetensors_goes_before_other_names(tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    save(tmp_path / "adapter_model.safetensors", {"x": np.zeros(1)})
    assert_same(open_checkpoint(tmp_path))


def test_an_ambiguous_directory_is_refused(tmp_path):
    save(tmp_path / "a.safetensors", TENSORS)
    save(tmp_path / "b.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)
    assert_same(open_checkpoint(tmp_path / "a.safetensors"))
    save_index(tmp_path, dict.fromkeys(TENSORS, "a.safetensors"), "a")
    assert_same(open_checkpoint(tmp_path))
    save_index(tmp_path, dict.fromkeys(TENSORS, "b.safetensors"), "b")
    with pytest.raises(CheckpointError, match=r"a\.safetensors\.index\.json, b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_shard_is_named(sharded, with_index, number):
    (sharded / f"model-0000{number}-of-00002.safetensors").unlink()
    if with_index:
        message = f"model-0000{number}-of-00002.safetensors, which is missing"
    else:
        (sharded / "model.safetensors.index.json").unlink()
        message = f"shard {number} of 2 of model is missing"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_shards_of_two_checkpoints_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    save(sharded / "model-00001-of-00003.safetensors", {"x": np.zeros(1)})
    with pytest.raises(CheckpointError, match="mixes shards"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    save(sharded / "model-00001-of-00002.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="is both in model-00001-of-00002"):
        open_checkpoint(sharded)


def test_index_and_headers_must_agree(sharded):
    names = list(TENSORS)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    full = {names[0]: one, names[1]: two, names[2]: two}
    save_index(sharded, {**full, "ghost": one})
    with pytest.raises(CheckpointError, match="ghost is in model-00001"):
        open_checkpoint(sharded)
    save_index(sharded, {**full, names[1]: one})
    with pytest.raises(CheckpointError, match=r"model\.layer\.weight is in model-00001"):
        open_checkpoint(sharded)
    save_index(sharded, {names[0]: one, names[1]: two})
    with pytest.raises(CheckpointError, match=r"holds model\.layer\.codes, which .* not list"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", 7, ""])
def test_an_index_cannot_lead_out_of_the_directory(sharded, target):
    save_index(sharded, {"x": target})
    with pytest.raises(CheckpointError, match="x is in"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(sharded)


def test_nothing_to_open(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="it is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no weights[^\n]*\n.*training_args\.bin"):
        open_checkpoint(tmp_path)


def test_unknown_tensor_gets_a_suggestion(sharded):
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.embed\.weight'"):
        open_checkpoint(sharded).load("model.embed.weigth")


def test_a_file_that_others_can_write_is_refused(sharded):
    (sharded / "model-00002-of-00002.safetensors").chmod(0o622)
    with pytest.raises(FileSecurityError, match="00002-of-00002"):
        open_checkpoint(sharded)


def test_links_of_a_model_cache_are_followed(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_same(open_checkpoint(snapshot))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "damaged safetensors header"),
        (b'{"a": ' * 50_000, b"", "damaged safetensors header"),
        (b"\xff\xfe", b"", "damaged safetensors header"),
        ([], b"", "not a JSON object"),
        ({"__metadata__": 1}, b"", "not a JSON object"),
        ({"t": 1}, b"", "entry of t is damaged"),
        ({"t": {"dtype": "I8", "shape": [1]}}, b"\0", "entry of t is damaged"),
        ({"t": {"dtype": "I8", "shape": [1], "data_offsets": [0]}}, b"\0", "entry of t is damaged"),
        ({"t": entry(0, 1, shape=[-1])}, b"\0", "t has the shape"),
        ({"t": entry(0, 1, shape=[1.0])}, b"\0", "t has the shape"),
        ({"t": entry(0, 1, shape=[True])}, b"\0", "t has the shape"),
        ({"t": entry(0, 1, shape=[1] * 33)}, b"\0", "t has the shape"),
        ({"t": entry(0, 0, shape=[0, 1 << 62])}, b"", "t has the shape"),
        ({"t": entry(0, 1, dtype="Q7")}, b"\0", "t has the dtype 'Q7'"),
        ({"t": entry(0, 1, dtype=["I8"])}, b"\0", "t has the dtype"),
        ({"t": entry(0, 3, "F32", [1])}, b"\0" * 3, r"t has 3 bytes, but F32 \[1\] needs 4"),
        ({"t": entry(2, 1, shape=[1])}, b"\0", "t has -1 bytes"),
        ({"t": entry(1, 2)}, b"\0\0", "t leaves a hole"),
        ({"a": entry(0, 2), "t": entry(1, 3)}, b"\0" * 3, "t overlaps"),
        ({"t": entry(0, 2)}, b"\0", "cut short"),
        ({"t": entry(0, 1)}, b"\0\0", "damaged or cut short"),
        (
            b'{"t":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},'
            b'"t":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
            b"",
            "'t' stands there twice",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, data, message):
    file = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(file)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_is_noticed(tmp_path):
    whole = save(tmp_path / "model.safetensors", TENSORS).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        cut.chmod(0o600)
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            open_checkpoint(cut)


def test_a_file_cut_short_after_opening_is_noticed(tmp_path):
    file = save(tmp_path / "model.safetensors", TENSORS)
    checkpoint = open_checkpoint(file)
    file.write_bytes(file.read_bytes()[:-4])
    last = list(checkpoint.tensors)[-1]
    with pytest.raises(CheckpointError, match="ends in the middle"):
        checkpoint.load(last)


def test_a_huge_claimed_header_is_not_allocated(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    file.chmod(0o600)
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(file)


def test_loading_reads_one_tensor_at_a_time(tmp_path):
    one = 4 << 20
    save(tmp_path / "model.safetensors", {f"t{i}": np.full(one, i, np.int8) for i in range(8)})
    tracemalloc.start()
    checkpoint = open_checkpoint(tmp_path)
    for name in checkpoint.tensors:
        assert checkpoint.load(name)[0] == int(name[1:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * one


def test_config_and_side_files(sharded, tmp_path_factory):
    wanted = ["config.json", "generation_config.json", "merges.txt", "modeling_x.py",
              "chat_template.jinja", "tokenizer.model", "vocab.json"]  # fmt: skip
    own = ["slim_report.json", "slim_report.html", "slim_recipe.yaml", "slim_lowrank_report.json"]
    for name in [*wanted, *own, "training_args.bin", "quant_model_description.json", ".hidden"]:
        (sharded / name).write_text("{}")
        (sharded / name).chmod(0o644)
    config = {
        "model_type": "x",
        "quantization_config": {"bits": 4},
        "text_config": {"quantization_config": {}, "hidden_size": 8},
    }
    (sharded / "config.json").write_text(json.dumps(config))
    (sharded / "onnx").mkdir()
    (sharded / "onnx" / "config.json").write_text("{}")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.config == config
    assert [file.name for file in checkpoint.side_files()] == sorted(wanted)

    target = tmp_path_factory.mktemp("out")
    copied = copy_side_files(checkpoint, target, {"torch_dtype": "bfloat16"})
    assert sorted(file.name for file in target.iterdir()) == sorted(wanted)
    assert sorted(copied) == sorted(target.iterdir())
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in target.iterdir())
    assert json.loads((target / "config.json").read_text()) == {
        "model_type": "x",
        "text_config": {"hidden_size": 8},
        "torch_dtype": "bfloat16",
    }
    assert checkpoint.config == config


def test_a_model_without_config_gets_none(sharded, tmp_path_factory):
    target = tmp_path_factory.mktemp("out")
    assert copy_side_files(open_checkpoint(sharded), target) == []
    assert copy_side_files(open_checkpoint(sharded), target, {"a": 1}) == [target / "config.json"]


def test_side_files_are_not_copied_onto_themselves(sharded):
    with pytest.raises(OutputExistsError, match="itself"):
        copy_side_files(open_checkpoint(sharded), sharded / ".")


def test_a_side_file_that_others_can_write_is_refused(sharded, tmp_path_factory):
    (sharded / "modeling_x.py").write_text("")
    (sharded / "modeling_x.py").chmod(0o666)
    with pytest.raises(FileSecurityError, match=r"modeling_x\.py"):
        copy_side_files(open_checkpoint(sharded), tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_a_damaged_config_is_named(sharded, text):
    (sharded / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(sharded)
