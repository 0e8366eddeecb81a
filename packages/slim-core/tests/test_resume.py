"""Directories that an interrupted run leaves, and who may go on with them."""

import multiprocessing
import os
import signal
import time

import pytest

from slim_core.errors import NumericalError, OutputExistsError, ResumeError
from slim_core.resume import partial_path, resumable_dir

PRINTS = {"recipe": "a", "model": "b"}


def run(output, steps, error, **options):
    with resumable_dir(output, PRINTS, **options) as work:
        for step in range(steps):
            (work.path / f"{step}").write_text("x")
            work.save({"step": step})
        raise error("stop")


def interrupted(output, *, steps=2, error=KeyboardInterrupt, **options):
    with pytest.raises(error):
        run(output, steps, error, **options)


def test_a_finished_run_leaves_the_output_alone(tmp_path):
    with resumable_dir(tmp_path / "out", PRINTS) as work:
        assert work.state is None
        (work.path / "file").write_text("x")
        work.save({"step": 0})
        assert not (tmp_path / "out").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["file"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_going_on(tmp_path):
    interrupted(tmp_path / "out")
    with resumable_dir(tmp_path / "out", PRINTS, resume=True) as work:
        assert work.state == {"step": 1}
        assert (work.path / "0").exists()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_what_a_killed_write_left_is_not_in_the_output(tmp_path):
    interrupted(tmp_path / "out")
    (partial_path(tmp_path / "out") / "..journal.json.0123abcd.tmp").write_text("{")
    with resumable_dir(tmp_path / "out", PRINTS, resume=True):
        pass
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_an_interrupted_run_is_not_thrown_away_by_accident(tmp_path):
    interrupted(tmp_path / "out")
    with (
        pytest.raises(OutputExistsError, match="interrupted run"),
        resumable_dir(tmp_path / "out", PRINTS),
    ):
        pytest.fail("entered")
    assert partial_path(tmp_path / "out").is_dir()
    with resumable_dir(tmp_path / "out", PRINTS, overwrite=True) as work:
        assert work.state is None
        assert {f.name for f in work.path.iterdir()} == {".lock"}


def test_another_recipe_is_refused_by_name(tmp_path):
    interrupted(tmp_path / "out")
    for changed, named in (
        ({"recipe": "c", "model": "b"}, "another recipe"),
        ({"recipe": "c", "model": "d"}, "another model and another recipe"),
        ({"recipe": "a"}, "another model"),
    ):
        with (
            pytest.raises(ResumeError, match=named),
            resumable_dir(tmp_path / "out", changed, resume=True),
        ):
            pytest.fail("entered")
    with resumable_dir(tmp_path / "out", PRINTS, resume=True) as work:
        assert work.state == {"step": 1}


def test_a_deterministic_failure_leaves_nothing(tmp_path):
    interrupted(tmp_path / "out", error=NumericalError)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_the_first_state_leaves_nothing(tmp_path):
    interrupted(tmp_path / "out", steps=0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_can_be_resumed(tmp_path):
    interrupted(tmp_path / "out", error=OSError)
    assert partial_path(tmp_path / "out").is_dir()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprints": 1, "state": {}}'])
def test_a_damaged_journal(tmp_path, text):
    interrupted(tmp_path / "out")
    (partial_path(tmp_path / "out") / ".journal.json").write_text(text)
    with (
        pytest.raises(ResumeError, match="damaged"),
        resumable_dir(tmp_path / "out", PRINTS, resume=True),
    ):
        pytest.fail("entered")


def test_the_earlier_output_stays_until_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    interrupted(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "old").exists()
    with resumable_dir(tmp_path / "out", PRINTS, resume=True, overwrite=True) as work:
        assert work.state == {"step": 1}
    assert not (tmp_path / "out" / "old").exists()


def test_a_link_is_no_interrupted_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    partial_path(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OutputExistsError, match="symbolic link"),
        resumable_dir(tmp_path / "out", PRINTS),
    ):
        pytest.fail("entered")


def _hold(output, ready):
    with resumable_dir(output, PRINTS) as work:
        work.save({"step": 7})
        ready.set()
        time.sleep(60)


def test_one_process_at_a_time_and_the_lock_dies_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(30)
    for resume in (False, True):
        with (
            pytest.raises(OutputExistsError, match="another process"),
            resumable_dir(tmp_path / "out", PRINTS, resume=resume, overwrite=True),
        ):
            pytest.fail("entered")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with resumable_dir(tmp_path / "out", PRINTS, resume=True) as work:
        assert work.state == {"step": 7}
