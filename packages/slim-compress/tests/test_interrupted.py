"""Runs that are killed, and runs beside one another: outputs are whole, old or new."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import slim_core.files
from slim_compress import CompressConfig, Compressor
from slim_compress.checkpoint import compress_checkpoint, verify_checkpoint
from slim_core.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def killed_at(count, work):
    """Do the work in a child that kills itself when, for the count-th time, it is about to flush a
    file, give a name or remove a directory. Return False if it was done before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            dies = itertools.count(1)

            def dying(function):
                def step(*args, **kwargs):
                    if next(dies) == count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return step

            for place, name in (
                (os, "fsync"),
                (os, "rename"),
                (Path, "replace"),
                (slim_core.files, "_exchange"),
                (shutil, "rmtree"),
            ):
                setattr(place, name, dying(getattr(place, name)))
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_kill_leaves_the_old_output_or_the_new_one(checkpoint, tmp_path):
    target = tmp_path / "out"
    compress_checkpoint(checkpoint, target, CompressConfig(fast=True))
    old = content(target)
    compress_checkpoint(checkpoint, tmp_path / "new")
    new = content(tmp_path / "new")
    assert old != new
    kills = 0
    while killed_at(kills + 1, lambda: compress_checkpoint(checkpoint, target, overwrite=True)):
        kills += 1
        assert content(target) in (old, new)
    assert kills >= 8
    # What the killed runs left beside the output went with the runs after them.
    assert content(target) == new
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "out", "w8a8s"]


def test_a_kill_in_an_export_leaves_the_old_file_or_the_new_one(checkpoint, tmp_path):
    source = open_checkpoint(checkpoint)
    weights = {name: source.load(name) for name in source.tensors}
    description = json.loads((checkpoint / "quant_model_description.json").read_text())
    small, fast = (
        Compressor(CompressConfig(fast=fast), None, weights, description) for fast in (False, True)
    )
    small.run()
    fast.run()
    fast.export_safetensors(target := tmp_path / "out")
    old = content(target)
    small.export_safetensors(tmp_path / "new")
    new = content(tmp_path / "new")
    kills = 0
    while killed_at(kills + 1, lambda: small.export_safetensors(target)):
        kills += 1
        found = content(target)
        for name in old:
            assert found[name] in (old[name], new[name])
    assert kills >= 4
    assert {name: content(target)[name] for name in new} == new


def test_four_processes_write_into_one_directory(checkpoint, tmp_path):
    """As the ranks of a tensor-parallel model do: a file each, one description for all."""
    code = """
        import json, sys
        from pathlib import Path
        from slim_compress import CompressConfig, Compressor
        from slim_core.checkpoint import open_checkpoint
        source, target, rank = sys.argv[1:]
        checkpoint = open_checkpoint(source)
        weights = {name: checkpoint.load(name) for name in checkpoint.tensors}
        description = json.loads(Path(source, "quant_model_description.json").read_text())
        compressor = Compressor(CompressConfig(), None, weights, description)
        compressor.run()
        sys.stdin.readline()
        for _ in range(25):
            compressor.export_safetensors(target, f"model-rank-{rank}-part-0.safetensors")
            json.loads(Path(target, "quant_model_description.json").read_text())
    """
    target = tmp_path / "out"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), checkpoint, target, str(rank)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for process in ranks:  # all of them start to write at once
        process.stdin.write("go\n")
        process.stdin.flush()
    torn = 0
    description = target / "quant_model_description.json"
    while any(process.poll() is None for process in ranks):
        if description.exists():
            torn += json.loads(description.read_text())["model_quant_type"] != "W8A8SC_SLC1"
    for process in ranks:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert torn == 0
    names = {f"model-rank-{rank}-part-0.safetensors" for rank in range(4)}
    assert {file.name for file in target.iterdir()} == {*names, description.name}
    files = [(target / name).read_bytes() for name in sorted(names)]
    assert len(set(files)) == 1
    for name in sorted(names)[1:]:
        (target / name).unlink()
    assert verify_checkpoint(target, checkpoint) == 3


def test_two_processes_write_the_same_bytes(checkpoint, tmp_path):
    code = """
        import sys
        from slim_compress import CompressConfig
        from slim_compress.checkpoint import compress_checkpoint
        compress_checkpoint(*sys.argv[1:3], CompressConfig(multiprocess_num=int(sys.argv[3])))
    """
    for number, (jobs, hash_seed) in enumerate([(1, "0"), (2, "1")]):
        command = [sys.executable, "-c", textwrap.dedent(code), checkpoint]
        command += [tmp_path / str(number), str(jobs)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert content(tmp_path / "0") == content(tmp_path / "1")
    compress_checkpoint(checkpoint, tmp_path / "here")
    assert content(tmp_path / "here") == content(tmp_path / "0")
