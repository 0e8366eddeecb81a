"""Going on with a half-written checkpoint gives the bytes of one that was written at once."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.checkpoint import ShardWriter, part
from slim_core.errors import CheckpointError

DTYPES = [np.int8, np.float16, np.float32, np.int64]


def tensors(specs):
    rng = np.random.default_rng(0)
    return {
        f"t{i}": rng.integers(0, 100, shape).astype(dtype) for i, (dtype, shape) in enumerate(specs)
    }


def content(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    stops=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=3),
    limit=st.sampled_from([None, 1, 100]),
    buffer=st.sampled_from([0, 64, part.BUFFER_BYTES]),
    room=st.sampled_from([16, part.HEADER_ROOM]),
)
def test_the_same_bytes_after_any_number_of_stops(
    tmp_path_factory, specs, stops, limit, buffer, room
):
    """Each stop saves a state, goes on for some tensors, dies, and starts again at the state."""
    given_tensors = list(tensors(specs).items())
    whole = tmp_path_factory.mktemp("whole")
    pieces = tmp_path_factory.mktemp("pieces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "BUFFER_BYTES", buffer)
        patch.setattr(part, "HEADER_ROOM", room)
        with ShardWriter(whole, "m", max_shard_bytes=limit) as writer:
            for name, array in given_tensors:
                writer.add(name, array)
        writer = ShardWriter(pieces, "m", max_shard_bytes=limit)
        done = 0
        for stop, more in sorted(stops):
            for name, array in given_tensors[done:stop]:
                writer.add(name, array)
            done = max(done, min(stop, len(given_tensors)))
            state = json.loads(json.dumps(writer.save_state()))
            for name, array in given_tensors[done : done + more]:
                writer.add(name, array)  # what a killed process had written beyond the state
            if more == 3 and done + more >= len(given_tensors) > 0 and writer._parts:
                writer._parts[-1].finish(0o600)  # even the end, but for the final names
            writer.release()
            writer = ShardWriter.from_state(pieces, state)
        for name, array in given_tensors[done:]:
            writer.add(name, array)
        writer.close()
    assert content(pieces) == content(whole)


def test_a_state_survives_the_start_of_the_next_one(tmp_path):
    """A kill while a state is being saved leaves the state before it usable."""
    writer = ShardWriter(tmp_path, "m")
    writer.add("a", np.arange(3, dtype=np.int8))
    first = writer.save_state()
    writer.add("b", np.arange(5, dtype=np.int8))
    writer.save_state()
    writer.release()
    with ShardWriter.from_state(tmp_path, first) as again:
        again.add("b", np.full(5, 7, np.int8))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes().endswith(bytes([0, 1, 2, 7, 7, 7, 7, 7]))


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_finished_state_survives_the_renaming(tmp_path, renamed):
    """Killed while files get their names: some have them, and what is on disk else is the same."""
    values = {name: np.arange(40, dtype=np.int8) for name in "ab"}
    writer = ShardWriter(tmp_path, "m", max_shard_bytes=50)
    for name, array in values.items():
        writer.add(name, array)
    writer.save_state()
    writer.finish()
    state = json.loads(json.dumps(writer.save_state()))
    hidden = [path.path for path in writer._parts]
    final = writer.close()
    whole = content(tmp_path)
    for path, file in list(zip(hidden, final, strict=False))[renamed:]:
        file.rename(path)
    again = ShardWriter.from_state(tmp_path, state)
    again.finish()
    assert again.close() == final
    assert content(tmp_path) == whole


def test_a_failed_renaming_leaves_what_can_be_taken_up(tmp_path):
    writer = ShardWriter(tmp_path, "m", max_shard_bytes=50)
    for name in "ab":
        writer.add(name, np.arange(40, dtype=np.int8))
    writer.finish()
    state = writer.save_state()
    (tmp_path / "m-00002-of-00002.safetensors").mkdir()
    with pytest.raises(OSError, match="directory"):
        writer.close()
    (tmp_path / "m-00002-of-00002.safetensors").rmdir()
    files = ShardWriter.from_state(tmp_path, state).close()
    assert sorted(file.name for file in files) == sorted(file.name for file in tmp_path.iterdir())


def test_a_truncated_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "BUFFER_BYTES", 0)
    writer = ShardWriter(tmp_path, "m")
    writer.add("a", np.arange(4, dtype=np.int64))
    writer.add("b", np.arange(3, dtype=np.int8))
    state = writer.save_state()
    writer.release()
    sidecar = tmp_path / state["parts"][0]["sidecar"]
    sidecar.chmod(0o600)
    sidecar.write_bytes(b"\0")
    with pytest.raises(CheckpointError, match="ends in the middle"):
        ShardWriter.from_state(tmp_path, state)
    sidecar.write_bytes(bytes([0, 1, 2]))
    (tmp_path / state["parts"][0]["file"]).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="shorter"):
        ShardWriter.from_state(tmp_path, state)


def test_aborting_removes_the_state(tmp_path):
    writer = ShardWriter(tmp_path, "m")
    writer.add("a", np.arange(3, dtype=np.int8))
    writer.save_state()
    writer.abort()
    assert not list(tmp_path.iterdir())
