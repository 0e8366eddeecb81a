"""Runs that were interrupted anywhere end in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import NumericalError, OutputExistsError, ResumeError
from slim_core.export import CheckpointExport
from slim_core.recipe import Recipe
from slim_core.resume import partial_path
from slim_ptq import quantize
from slim_ptq.pipeline import weights_only

Factory = Callable[..., Any]

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "everything": {
        "scheme": "w8a8",
        "fallback": 2,
        "rotate": {},
        "smooth": {"method": "smoothquant"},
        "kv_cache": {},
        "observer": "histogram",
        "rules": [{"match": "*down_proj", "scheme": "w8a16"}],
    },
    "attention": {"scheme": "w8a16", "attention": {"fallback": 1}},
    "gptq": {"scheme": "w8a16", "method": "gptq"},
    "flatquant": {
        "scheme": "w4a4_flatquant_dynamic",
        "method": {"name": "flatquant", "epochs": 1},
    },
    "signround": {"scheme": "w4a16", "method": {"name": "signround", "iterations": 4}},
    "weights": {"scheme": "w8a16"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: Factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    tiny_model("llama", num_hidden_layers=4).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, tiny_ids: Factory) -> Path:
    rows = [tiny_ids(16, seed=seed)[0].tolist() for seed in range(6)]
    path = tmp_path_factory.mktemp("data") / "calib.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def run(source: Path, out: Path, calibration: Path | None, recipe: str, **options: Any) -> None:
    values = RECIPES[recipe]
    quantize(
        source,
        out,
        recipe=Recipe.build(**values),
        calibration=None if recipe == "weights" else calibration,
        length=16,
        batch=2,
        **options,
    )


def content(directory: Path) -> dict[str, bytes]:
    """Return every file but the reports, which tell times."""
    assert not [f.name for f in directory.iterdir() if f.name.startswith(".")]
    assert not list(directory.glob("hidden*"))
    return {
        file.name: file.read_bytes()
        for file in sorted(directory.iterdir())
        if not file.name.startswith("slim_report")
    }


@pytest.mark.parametrize(
    ("recipe", "limit"),  # GiB of hidden states in memory
    [
        *(("w8a8", 0), ("w8a8", 4), ("everything", 0), ("attention", 4), ("gptq", 0)),
        *(("signround", 0), ("signround", 4), ("weights", 4)),
    ],
)
def test_interrupts_anywhere(
    source: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    limit: int,
) -> None:
    """Each attempt dies at its n-th tensor; states that were saved before count."""
    monkeypatch.setattr(weights_only, "SAVE_SECONDS", 0.0)
    run(source, tmp_path / "whole", calibration, recipe)
    add, left = CheckpointExport._add, [0]

    def dying(self: CheckpointExport, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(CheckpointExport, "_add", dying)
    attempts = 0
    while not (tmp_path / "out").exists():
        left[0] = (17, 29, 61, 97)[min(attempts, 3)]
        try:
            run(source, tmp_path / "out", calibration, recipe, resume=True, activation_gib=limit)
        except KeyboardInterrupt:
            attempts += 1
        assert attempts < 50
    assert attempts >= 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["w8a8", "weights"])
def test_interrupted_when_all_is_written(
    source: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """Verifying and evaluating can take hours: what was written before is not written again."""

    def interrupting(*_args: Any) -> None:
        raise KeyboardInterrupt

    run(source, tmp_path / "whole", calibration, recipe)
    with monkeypatch.context() as patch:
        patch.setattr("slim_ptq.api.read_back", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", calibration, recipe, activation_gib=0)
    monkeypatch.setattr(CheckpointExport, "_add", interrupting)
    run(source, tmp_path / "out", calibration, recipe, activation_gib=0, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


_KILLED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background jobs
from slim_ptq.pipeline.blocks import BlockRunner
loaded = BlockRunner.loaded
def slow(self, index):
    time.sleep(0.15)
    if str(index) == os.environ.get("INTERRUPTED_BEFORE_BLOCK"):
        os.kill(os.getpid(), signal.SIGINT)
    return loaded(self, index)
BlockRunner.loaded = slow
from slim_ptq.cli import main
sys.argv = ["slim-ptq", *sys.argv[1:]]
main()
"""


def test_a_killed_process(source: Path, calibration: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; the output of before stays until the new one is there."""
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--length", "16"]
    command = [sys.executable, str(script), *arguments, "--calib", str(calibration)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    moments = random.Random(0)
    kills = 0
    while (tmp_path / "out" / "old").exists():
        process = subprocess.Popen([*command, "--resume", "--overwrite"])
        journal = partial_path(tmp_path / "out") / ".journal.json"
        before = journal.read_text() if journal.exists() else ""
        # At least one more block is finished before the process is killed.
        while process.poll() is None and (not journal.exists() or journal.read_text() == before):
            time.sleep(0.01)
        if kills < 2:
            time.sleep(moments.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills > 0
    # The last kill can come when the output is complete and in its place.
    assert process.returncode in (0, -signal.SIGKILL)
    run(source, tmp_path / "whole", calibration, "w8a8")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def stopped(source: Path, out: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that was interrupted in its second block."""
    add, left = CheckpointExport._add, [70]

    def dying(self: CheckpointExport, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointExport, "_add", dying)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, calibration, "w8a8")
    assert partial_path(out).is_dir()


def test_another_job_is_refused(
    source: Path,
    calibration: Path,
    tiny_model: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stopped(source, out, calibration, monkeypatch)
    with pytest.raises(OutputExistsError, match="interrupted run"):
        run(source, out, calibration, "w8a8")
    with pytest.raises(ResumeError, match=r"with another recipe\n"):
        run(source, out, calibration, "everything", resume=True)
    with pytest.raises(ResumeError, match=r"with another size of weight files\n"):
        run(source, out, calibration, "w8a8", resume=True, max_shard_gib=1)
    other = tmp_path / "other.jsonl"
    other.write_text(calibration.read_text().replace("[", "[5, ", 1))
    with pytest.raises(ResumeError, match=r"another calibration data\n"):
        run(source, out, other, "w8a8", resume=True)
    changed = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=4, seed=1).save_pretrained(changed)
    with pytest.raises(ResumeError, match="another model"):
        run(changed, out, calibration, "w8a8", resume=True)
    run(source, out, calibration, "w8a8", resume=True)
    run(source, tmp_path / "whole", calibration, "w8a8")
    assert content(out) == content(tmp_path / "whole")


def test_a_failure_that_would_come_again_leaves_nothing(
    tiny_model: Factory, calibration: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(NumericalError, match=r"layers\.2\.mlp\.up_proj"):
        run(tmp_path / "in", tmp_path / "out", calibration, "w8a8")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_the_command_says_how_to_go_on(source: Path, calibration: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    out, events = tmp_path / "out", tmp_path / "events.jsonl"
    command = [sys.executable, str(script), "--log-file", str(tmp_path / "log")]
    command += ["quantize", str(source), str(out), "--calib", str(calibration), "--length", "16"]
    command += ["--events", str(events)]
    stopped = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "INTERRUPTED_BEFORE_BLOCK": "2"},
    )
    assert stopped.returncode == 130
    said, how = stopped.stderr.splitlines()[-2:]
    assert said == "finished steps are kept; go on with:"
    assert shlex.split(how) == ["slim-ptq", *command[2:], "--resume"]
    done = subprocess.run(
        [*command[:2], *shlex.split(how)[1:]], check=True, capture_output=True, text=True
    )
    assert "written to" in done.stdout
    steps = [json.loads(line) for line in events.read_text().splitlines()]
    blocks = [step["done"] for step in steps if step["stage"] == "Quantizing blocks"]
    assert blocks[-3:] == [2, 3, 4]
    assert blocks.count(4) == 1
    assert "Quantizing blocks: 4 of 4" in (tmp_path / "log").read_text()
