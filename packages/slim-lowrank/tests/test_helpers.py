import os
import pickle
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import slim_lowrank
from slim_core.errors import FileSecurityError, MissingDependencyError
from slim_lowrank import count_parameters, safe_torch_load, safe_torch_save


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_count_parameters():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.BatchNorm1d(4), shared)
    net[1].weight.requires_grad_(False)
    assert count_parameters(net) == 20 + 8
    assert count_parameters(nn.ReLU()) == 0
    with pytest.raises(TypeError, match="network"):
        count_parameters([1])


def test_save_and_load(tmp_path):
    path = tmp_path / "state.pt"
    umask = os.umask(0o077)
    try:
        safe_torch_save(nn.Linear(2, 3).state_dict(), path)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert safe_torch_load(path, map_location="cpu")["weight"].shape == (3, 2)


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    safe_torch_save({"a": torch.ones(1)}, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        safe_torch_save({"a": lambda: None}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert safe_torch_load(path)["a"] == 1


def test_code_in_files_is_refused_without_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("prompted"))
    torch.save(Evil(), "state.pt")
    with pytest.raises(FileSecurityError, match=r"state\.pt"):
        safe_torch_load("state.pt")
    with pytest.raises(FileSecurityError, match="weights_only"):
        safe_torch_load("state.pt", weights_only=False)
    assert not (tmp_path / "evil-was-here").exists()


def test_unsafe_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        safe_torch_load(tmp_path / "absent.pt")
    path = tmp_path / "state.pt"
    torch.save({}, path)
    path.chmod(0o666)
    with pytest.raises(FileSecurityError, match="written by others"):
        safe_torch_load(path)


def test_import_and_numerics_do_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import slim_lowrank, slim_lowrank.ranks, slim_lowrank.factorize, slim_lowrank.vbmf\n"
        "import slim_lowrank.tucker, slim_lowrank.compat_base, slim_lowrank.rank_requests\n"
        "import slim_lowrank.whitening, slim_lowrank.conv_forms, slim_lowrank.pivot\n"
        "import slim_lowrank.table\n"
        "from slim_core.errors import MissingDependencyError\n"
        "try:\n    slim_lowrank.Decompose\n"
        "except MissingDependencyError as error:\n    assert 'slim-lowrank[torch]' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="Nothing"):
        _ = slim_lowrank.Nothing
    assert issubclass(MissingDependencyError, ImportError)
