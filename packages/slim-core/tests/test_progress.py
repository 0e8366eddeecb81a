import io
import itertools
import json
import sys

import pytest

from slim_core import progress, progress_bar
from slim_core.progress import plain_progress, track, writing_events


def test_silent_when_not_a_terminal(capsys):
    assert list(track(iter([1, 2, 3]), "work")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(range(3), "work")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "work" in captured.err
    assert "3/3" in captured.err


def test_a_stage_within_a_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    seen = [(outer, inner) for outer in track("ab", "outer") for inner in track("cd", "inner")]
    assert seen == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    for _ in track("ab", "outer"):
        for _ in track("cd", "left early"):
            break
        assert len(progress._shown) == 1
    assert progress._shown == []
    captured = capsys.readouterr().err
    assert "outer" in captured
    assert "inner" in captured


@pytest.mark.parametrize("terminal", [False, True])
def test_exceptions_pass_through(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def items():
        yield 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        list(track(items(), "work", total=2))


def test_events_say_how_far_it_is(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with writing_events(tmp_path / "events.jsonl"):
        assert list(track(range(5, 8), "work", total=8, done=5)) == [5, 6, 7]
    list(track([], "nothing"))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "work", "done": 6, "total": 8, "seconds": 2.0, "left": 4.0},
        {"stage": "work", "done": 7, "total": 8, "seconds": 4.0, "left": 2.0},
        {"stage": "work", "done": 8, "total": 8, "seconds": 6.0, "left": 0.0},
    ]


def test_events_of_an_unknown_number_and_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO", logger="slim.progress")
    with writing_events(tmp_path / "events.jsonl"):
        assert list(track(iter("ab"), "work")) == ["a", "b"]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["done"], last["total"], last["left"]) == (2, None, None)
    assert caplog.messages == ["work: 1, 0 s", "work: 2, 0 s"]


def test_the_time_left_is_that_of_the_last_step_counted_down(monkeypatch):
    """However long a step takes: the estimate of rich ends after half a minute."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    bars = progress_bar.new_bars()
    task = bars.add_task("work", total=9, left=None, at=0.0)

    def shown():
        return str(bars.columns[-1].render(bars.tasks[0]))

    assert shown() == "eta -:--:--"
    progress_bar.advance(bars, task, 7290.0)
    now[0] += 90.0
    assert shown() == "eta 2:00:00"
    now[0] += 9000.0
    assert shown() == "eta 0:00:00"
    progress_bar.advance(bars, task, 61.5)
    assert shown() == "eta 0:01:01"
    assert bars.tasks[0].completed == 2


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with plain_progress():
        assert list(track(range(8), "work")) == list(range(8))
        assert list(track(range(2), "short")) == [0, 1]
    list(track(range(8), "nobody asked"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "work: 3 of 8, 12 s, 20 s left",
        "work: 6 of 8, 24 s, 8 s left",
        "work: 8 of 8, 32 s, 0 s left",
    ]


def test_the_first_process_speaks_for_all(monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    caplog.set_level("INFO", logger="slim.progress")
    with plain_progress(), writing_events(tmp_path / "events.jsonl"):
        assert list(track("ab", "work")) == ["a", "b"]
    assert (tmp_path / "events.jsonl").read_text() == ""
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == []


def test_events_go_to_a_stream():
    stream = io.StringIO()
    with writing_events(stream):
        list(track("ab", "work"))
    assert [json.loads(line)["done"] for line in stream.getvalue().splitlines()] == [1, 2]
    assert not stream.closed
