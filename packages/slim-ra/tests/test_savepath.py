from __future__ import annotations

import os
import stat

import pytest

from slim_ra.savepath import check_save_path


def test_good_path(tmp_path):
    assert check_save_path(str(tmp_path / "win.pt")) == tmp_path / "win.pt"


@pytest.mark.parametrize("wrong", [None, 3, b"win.pt"])
def test_only_str(wrong):
    with pytest.raises(TypeError, match="save_path"):
        check_save_path(wrong)


@pytest.mark.parametrize(
    "wrong",
    ["", "a b.pt", "win.pth", ".pt", "x;y.pt", "ä.pt", "a" * 300 + ".pt", "a/" * 2100 + "w.pt"],
)
def test_malformed(wrong):
    with pytest.raises(ValueError, match="save_path"):
        check_save_path(wrong)


def test_directory_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_save_path(str(tmp_path / "nowhere" / "win.pt"))


def test_link_and_directory_are_refused(tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "target.pt")
    (tmp_path / "dir.pt").mkdir()
    for name in ("link.pt", "dir.pt"):
        with pytest.raises(ValueError, match=name):
            check_save_path(str(tmp_path / name))


@pytest.mark.parametrize(
    ("mode", "good"), [(0o400, True), (0o640, True), (0o644, False), (0o660, False), (0o601, False)]
)
def test_existing_target(tmp_path, mode, good):
    target = tmp_path / "win.pt"
    target.write_bytes(b"old")
    target.chmod(mode)
    if good:
        assert check_save_path(str(target)) == target
    else:
        with pytest.raises(ValueError, match=f"{mode:04o}"):
            check_save_path(str(target))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_foreign_target(tmp_path):
    target = tmp_path / "win.pt"
    target.touch(mode=0o600)
    os.chown(target, 12345, 12345)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="12345"):
        check_save_path(str(target))
