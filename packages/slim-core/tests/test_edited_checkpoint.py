"""Edits are applied as tensors are read, in every way of reading them."""

import ml_dtypes
import numpy as np
import pytest

from slim_core.checkpoint import EditedCheckpoint, ShardWriter, open_checkpoint
from slim_core.errors import CheckpointError


@pytest.fixture
def base(tmp_path):
    with ShardWriter(tmp_path, "model", max_shard_bytes=64) as writer:
        for number in range(4):
            writer.add(f"t{number}", np.full((4, 4), number, ml_dtypes.bfloat16))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "a": 1}')
    return open_checkpoint(tmp_path)


def test_edits_and_copies(base):
    edited = EditedCheckpoint(
        base,
        {"t1": lambda x: x.astype(np.float32) + 0.001, "head": lambda x: -x},
        {"head": "t2"},
        {"tie_word_embeddings": False},
    )
    assert np.array_equal(edited.load("t0"), base.load("t0"))
    assert edited.load("t1")[0, 0] == np.float32(1.001)
    assert edited.tensors["t1"].dtype == ml_dtypes.bfloat16
    assert edited.load("t2")[0, 0] == 2
    assert edited.load("head")[0, 0] == -2
    assert edited.tensors["head"].shape == (4, 4)
    assert edited.config == {"tie_word_embeddings": False, "a": 1}
    assert base.config["tie_word_embeddings"]
    names = [name for _, shard in edited.iter_shards() for name in shard]
    assert sorted(names) == ["head", "t0", "t1", "t2", "t3"]
    assert edited.nbytes == base.nbytes + 32
    assert edited.side_files() == base.side_files()


def test_unknown_names(base):
    edited = EditedCheckpoint(base, {}, {})
    with pytest.raises(CheckpointError, match="no tensor 't9'"):
        edited.load("t9")
