import sys

import pytest

from slim_core.progress import track


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


@pytest.mark.parametrize("terminal", [False, True])
def test_exceptions_pass_through(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def items():
        yield 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        list(track(items(), "work", total=2))
