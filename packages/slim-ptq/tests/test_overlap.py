"""Reading, computing, writing and saving at the same time: order, bounds, errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.resume import ResumableDir
from slim_ptq.pipeline.ahead import work_ahead
from slim_ptq.pipeline.saving import StateSaver


@given(costs=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(0, 20))
def test_results_come_in_order_within_the_limit(costs: list[int], limit: int) -> None:
    lock = threading.Lock()
    begun: list[int] = []

    def work(index: int) -> int:
        with lock:
            begun.append(index)
        return index * index

    found = []
    results = work_ahead(work, range(len(costs)), lambda index: costs[index], limit)
    for taken, value in enumerate(results):
        found.append(value)
        with lock:
            held = sum(costs[index] for index in begun if index >= taken)
            count = sum(index >= taken for index in begun)
        assert held <= limit or count == 1
    assert found == [index * index for index in range(len(costs))]


def test_cores_are_shared_out_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = list(work_ahead(lambda _: torch.get_num_threads(), range(3), lambda _: 1, 9))
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_in_the_place_of_its_result() -> None:
    def work(index: int) -> int:
        if index == 2:
            raise ValueError("third")
        return index

    results = work_ahead(work, range(99), lambda _: 1, 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="third"):
        next(results)


class Journal(ResumableDir):
    """Waits until it is let go, and notes what it was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        self.go = threading.Event()
        self.states: list[Any] = []
        self.fails = False

    def save(self, state: Any) -> None:
        assert self.go.wait(10)
        if self.fails:
            raise OSError(28, "No space left on device")
        self.states.append(state)


def test_one_state_is_on_its_way(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with (tmp_path / "file").open("w") as stream, StateSaver(journal) as saver:
        saver.sync(stream.fileno())
        saver.save({"step": 1})
        stream.close()  # the saver has the file open itself
        assert journal.states == []
        journal.go.set()
        saver.save({"step": 2})
        assert journal.states[0] == {"step": 1}
    assert journal.states == [{"step": 1}, {"step": 2}]


def test_a_full_disk_is_said_by_the_next_state_or_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.fails = True
    journal.go.set()
    with pytest.raises(OSError, match="No space"), StateSaver(journal) as saver:
        saver.save({"step": 1})


def test_an_interrupt_waits_for_the_state_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.go.set()

    def interrupted() -> None:
        with StateSaver(journal) as saver:
            saver.save({"step": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert journal.states == [{"step": 1}]
