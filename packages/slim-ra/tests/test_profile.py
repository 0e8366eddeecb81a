from __future__ import annotations

import json
import pickle
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_ra import AlibiWindows, RetrievalHeads, read_profile, write_profile
from slim_ra.dialects import heads_json, parse_heads_json, parse_pattern, pattern_text
from slim_ra.profile import check_fits

HEADS = RetrievalHeads({2: [3, 0], 5: [1]}, {2: [0], 4: []})
maps = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 7), min_size=1, unique=True))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_retrieval_heads_file(tmp_path):
    path = tmp_path / "win.pt"
    write_profile(path, HEADS)
    assert torch.load(path, weights_only=True) == {
        "prefix_matching": {2: [0, 3], 5: [1]},
        "copying": {2: [0]},
    }
    assert mode(path) == 0o640
    assert read_profile(path) == HEADS
    assert HEADS.union() == {2: [0, 3], 5: [1]}
    assert HEADS.count() == 3


def test_windows_file(tmp_path):
    windows = AlibiWindows(torch.tensor([[1, 9], [5, 2]]), {"mode": "bound"})
    write_profile(tmp_path / "win.pt", windows)
    content = torch.load(tmp_path / "win.pt", weights_only=True)
    assert content.dtype == torch.int64
    assert content.tolist() == [5, 9]
    assert mode(tmp_path / "win.pt") == 0o400
    write_profile(tmp_path / "win.layers.pt", windows)
    rich = read_profile(tmp_path / "win.layers.pt")
    assert torch.equal(rich.windows, windows.windows)
    assert rich.settings == {"mode": "bound"}
    write_profile(tmp_path / "win.pt", AlibiWindows(torch.tensor([7])))  # replaces a 0400 file
    assert read_profile(tmp_path / "win.pt").windows.tolist() == [7]


@given(maps)
def test_json_round_trip(heads):
    clean = RetrievalHeads(heads).union()
    assert RetrievalHeads(parse_heads_json(heads_json(clean))).union() == clean


@given(maps)
def test_pattern_round_trip(heads):
    clean = RetrievalHeads(heads).union()
    assert parse_pattern(pattern_text(clean, 10, 8)) == clean


def test_dialect_files(tmp_path):
    write_profile(tmp_path / "heads.json", HEADS)
    assert json.loads((tmp_path / "heads.json").read_text()) == {"2": [0, 3], "5": [1]}
    assert read_profile(tmp_path / "heads.json").union() == HEADS.union()
    (tmp_path / "duo.tsv").write_text("0.1\t0.9\n0.5\t0.0\n")
    assert read_profile(tmp_path / "duo.tsv").induction == {0: [1], 1: [0]}
    with pytest.raises(ValueError, match="AlibiWindows"):
        write_profile(tmp_path / "w.json", AlibiWindows(torch.tensor([1])))


@pytest.mark.parametrize("text", ["", "1 0\n1\n", "1 x\n", "1 2\n", "nan 1\n"])
def test_bad_patterns(text):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": [1]}'])
def test_bad_json(text):
    with pytest.raises(ValueError, match="head list"):
        parse_heads_json(text)


@pytest.mark.parametrize("heads", [{0: [-1]}, {-1: [0]}, {0: 3}, {"0": [1]}, {0: [True]}, [1]])
def test_bad_heads(heads):
    with pytest.raises(ValueError, match="induction"):
        RetrievalHeads(heads)


def test_bad_windows():
    for wrong in (
        torch.zeros(2),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="windows"):
            AlibiWindows(wrong)


def test_foreign_files(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no torch file")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(pytest.raises, protocol=2))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "c.pt")
    for name in "abc":
        (tmp_path / f"{name}.pt").chmod(0o600)
        with pytest.raises(ValueError, match=f"{name}.pt"):
            read_profile(tmp_path / f"{name}.pt")


def test_heads_must_exist():
    check_fits({1: [3]}, 2, 4)
    for heads in ({2: [0]}, {1: [4]}):
        with pytest.raises(ValueError, match="2 layers of 4 KV heads"):
            check_fits(heads, 2, 4)
