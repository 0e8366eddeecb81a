"""Files: what may be read, and writing that is complete or did not happen."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slim_core import files
from slim_core.errors import CheckpointError, FileSecurityError, InvalidTypeError, OutputExistsError
from slim_core.files import (
    as_path,
    atomic_write,
    check_input_file,
    check_output_dir,
    make_dir,
    read_into,
    staged_dir,
    write_bytes,
    write_json,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("value", [3, None, b"bytes", object()])
def test_only_paths_are_paths(value):
    with pytest.raises(InvalidTypeError, match=r"path must be str or os\.PathLike, not"):
        as_path("path", value)


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_impossible_paths(value):
    with pytest.raises(FileSecurityError, match="where must be a non-empty path"):
        as_path("where", value)


# ------------------------------------------------------------------------------- reading


def test_input_files(tmp_path):
    file = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_input_file(file)
    file.write_bytes(b"12345")
    file.chmod(0o644)
    assert check_input_file(str(file), max_bytes=5) == file
    with pytest.raises(FileSecurityError, match="has 5 bytes, more than 4"):
        check_input_file(file, max_bytes=4)
    with pytest.raises(FileSecurityError, match="not a regular file"):
        check_input_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileSecurityError, match="not a regular file"):
        check_input_file(tmp_path / "pipe")


def test_links_are_followed_and_their_target_checked(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(FileSecurityError, match="leads nowhere"):
        check_input_file(link)
    (tmp_path / "target").touch(0o600)
    assert check_input_file(link) == link
    (tmp_path / "target").chmod(0o602)
    with pytest.raises(FileSecurityError, match="written by others"):
        check_input_file(link)


@pytest.mark.parametrize("bits", [0o602, 0o606, 0o666, 0o622])
def test_a_file_that_others_can_write(tmp_path, bits):
    file = tmp_path / "x"
    file.touch()
    file.chmod(bits)
    with pytest.raises(FileSecurityError, match=rf"mode {bits:04o}\)\nHint: chmod go-w {file}"):
        check_input_file(file)


@pytest.mark.parametrize(
    ("uid", "gid", "members", "writable_by_others"),
    [
        (1000, 1000, [], False),
        (1000, 1000, ["owner"], False),
        (1000, 1000, None, False),  # no entry in the list of groups
        (1000, 1000, ["owner", "guest"], True),
        (1000, 100, [], True),
        (0, 0, [], True),
    ],
)
def test_a_group_of_the_owner_alone_is_not_others(
    monkeypatch, tmp_path, uid, gid, members, writable_by_others
):
    def group(number):
        if members is None:
            raise KeyError(number)
        return SimpleNamespace(gr_mem=members)

    monkeypatch.setattr(files.grp, "getgrgid", group)
    monkeypatch.setattr(files.pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="owner"))
    status = SimpleNamespace(st_mode=stat.S_IFREG | 0o664, st_uid=uid, st_gid=gid, st_size=0)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "stat", lambda _: status)
    if writable_by_others:
        with pytest.raises(FileSecurityError, match="written by others"):
            check_input_file(tmp_path / "x")
    else:
        check_input_file(tmp_path / "x")
    status.st_mode |= stat.S_IWOTH
    with pytest.raises(FileSecurityError, match="written by others"):
        check_input_file(tmp_path / "x")


def test_read_into(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    target = bytearray(4)
    read_into(tmp_path / "x", 3, memoryview(target))
    assert target == b"3456"
    read_into(tmp_path / "x", 99, memoryview(b""))
    with pytest.raises(CheckpointError, match="ends in the middle"):
        read_into(tmp_path / "x", 8, memoryview(target))


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("bits", [0o400, 0o600, 0o640])
def test_a_written_file_has_its_mode_whatever_the_umask(tmp_path, umask, bits):
    for content in (b"one", b"two"):  # the second replaces a file that cannot be written
        write_bytes(tmp_path / "x", content, bits)
        assert (tmp_path / "x").read_bytes() == content
        assert mode(tmp_path / "x") == bits
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_the_file_is_private_and_hidden_until_it_is_complete(tmp_path, umask):
    write_bytes(tmp_path / "x", b"old", 0o644)
    with atomic_write(tmp_path / "x", 0o644) as stream:
        stream.write(b"new")
        stream.flush()
        (temporary,) = (file for file in tmp_path.iterdir() if file.name != "x")
        assert mode(temporary) == 0o600
        assert temporary.name.startswith(".x.")
        assert (tmp_path / "x").read_bytes() == b"old"
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputExistsError])
def test_a_failed_block_keeps_what_was_there(tmp_path, error):
    write_bytes(tmp_path / "x", b"old")

    def write_and_fail():
        with atomic_write(tmp_path / "x") as stream:
            stream.write(b"new")
            raise error("stop")

    with pytest.raises(error, match=r"^stop$"):
        write_and_fail()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_errors_of_the_system_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_bytes(tmp_path / "absent" / "x", b"")
    assert caught.value.filename == str(tmp_path / "absent" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_bytes(tmp_path / "folder", b"")
    assert caught.value.filename == str(tmp_path / "folder")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "x"):
        raise full
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("n" * 255, "é" * 127, "字" * 85):
        write_bytes(tmp_path / name, b"x")
    assert len(list(tmp_path.iterdir())) == 3


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"b": "é", "a": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    assert mode(tmp_path / "x.json") == 0o600
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"b": "é", "a": [1]}


# ------------------------------------------------------------------------------- directories


def test_make_dir(tmp_path):
    made = make_dir(tmp_path / "a" / "b")
    assert made.is_dir()
    assert mode(made) == 0o750
    made.chmod(0o700)
    assert mode(make_dir(made)) == 0o700


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_staged_directory_appears_whole(tmp_path, umask):
    target = tmp_path / "a" / "out"
    with staged_dir(target) as stage:
        (stage / "x").write_text("new")
        assert not target.exists()
    assert content(target) == {"x": "new"}
    assert mode(target) == 0o750
    assert [file.name for file in target.parent.iterdir()] == ["out"]


def test_an_empty_directory_can_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_dir(tmp_path / "out") as stage:
        (stage / "x").write_text("new")
    assert content(tmp_path / "out") == {"x": "new"}


@pytest.mark.parametrize("name", [".", "./", "../here"])
def test_the_working_directory_can_be_the_target(tmp_path, monkeypatch, name):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with staged_dir(name) as stage:
        (stage / "x").write_text("new")
    assert content(here) == {"x": "new"}


def test_overwriting_replaces_the_directory_as_a_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with (
        pytest.raises(OutputExistsError, match=r"not empty\nHint: .*overwrite=True"),
        staged_dir(target),
    ):
        pytest.fail("the block must not run")
    with staged_dir(target, overwrite=True) as stage:
        (stage / "x").write_text("new")
        assert content(target) == {"old": "old"}
    assert content(target) == {"x": "new"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_stage_keeps_what_was_there(tmp_path, error):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def fill_and_fail():
        with staged_dir(target, overwrite=True) as stage:
            (stage / "x").write_text("new")
            raise error

    with pytest.raises(error):
        fill_and_fail()
    assert content(target) == {"old": "old"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def without_exchange(*_names):
    return False


def test_a_directory_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("slim_core.files._exchange", without_exchange)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with staged_dir(target, overwrite=True) as stage:
        (stage / "x").write_text("new")
    assert content(target) == {"x": "new"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path, monkeypatch):
    monkeypatch.setattr("slim_core.files._exchange", without_exchange)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fail(self, to):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), staged_dir(target, overwrite=True) as stage:
        (stage / "x").write_text("new")
    assert content(target) == {"old": "old"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_killed_stage_is_removed_by_the_next_run_and_a_living_one_is_not(tmp_path):
    code = (
        "import sys, time\nfrom slim_core.files import staged_dir\n"
        "with staged_dir(sys.argv[1]) as stage:\n"
        "    (stage / 'x').write_text('half')\n"
        "    (stage / 'x').chmod(0o400)\n"
        "    print(stage, flush=True)\n"
        "    time.sleep(60)\n"
    )
    stages = []
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / name], stdout=subprocess.PIPE, text=True
        )
        for name in ("out", "out", "other")
    ]
    try:
        stages = [Path(run.stdout.readline().strip()) for run in runs]
        assert all(stage.is_dir() for stage in stages)
        for number in (0, 2):
            runs[number].kill()
            runs[number].wait()
        with staged_dir(tmp_path / "out") as stage:
            (stage / "x").write_text("new")
        assert content(tmp_path / "out") == {"x": "new"}
        # The dead one of this output is gone; a living one, and one of another output, are not.
        assert [stage.is_dir() for stage in stages] == [False, True, True]
    finally:
        for run in runs:
            run.kill()
            run.wait()
            run.stdout.close()


def test_a_stage_that_vanishes_before_its_lock_is_made_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def vanish(descriptor, operation):
        flock(descriptor, operation)
        calls.append(operation)
        if len(calls) == 1:
            (stage,) = tmp_path.iterdir()
            stage.rmdir()

    monkeypatch.setattr("slim_core.files.fcntl.flock", vanish)
    with staged_dir(tmp_path / "out") as stage:
        (stage / "x").write_text("new")
    assert len(calls) == 2
    assert content(tmp_path / "out") == {"x": "new"}


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(_descriptor, _operation):
        raise OSError(errno.ENOLCK, "No locks available")

    abandoned = tmp_path / ".out.0123abcd.tmp"
    abandoned.mkdir()
    monkeypatch.setattr("slim_core.files.fcntl.flock", refuse)
    with staged_dir(tmp_path / "out") as stage:
        (stage / "x").write_text("new")
    assert content(tmp_path / "out") == {"x": "new"}
    assert abandoned.is_dir()  # nobody can know that it is abandoned


def test_output_directories_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputExistsError, match="is not a directory"):
            check_output_dir(tmp_path / name, overwrite=True)
    with pytest.raises(FileSecurityError, match="cannot be created"):
        check_output_dir(tmp_path / "file" / "out")
    assert check_output_dir(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileSecurityError, match="is not writable"):
        check_output_dir(tmp_path / "out")
