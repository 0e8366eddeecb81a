"""Several processes give what one gives."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CalibrationError
from slim_core.method import MethodSpec
from slim_core.plan import LayerPlan
from slim_core.recipe import ObserverKind, Recipe
from slim_core.scheme import QuantScheme
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.methods import gptq, make_method
from slim_ptq.methods.feedback import factorize
from slim_ptq.observers import make_observer
from slim_ptq.parallel import Team, own_device
from slim_ptq.pipeline.block_layers import BlockLayers
from slim_ptq.pipeline.statistics import InputStatistics

Factory = Callable[..., Any]

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8", "kv_cache": {}, "smooth": {"method": "smoothquant"}},
    "gptq": {"scheme": "w8a16", "method": "gptq", "attention": {}, "fallback": 2},
    "weights": {"scheme": "w8a16"},
}


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Factory, tiny_ids: Factory
) -> tuple[Path, Path]:
    """Return a model and its calibration data."""
    folder = tmp_path_factory.mktemp("job")
    tiny_model("llama").save_pretrained(folder / "model")
    rows = [tiny_ids(16, seed=seed)[0].tolist() for seed in range(8)]
    data = folder / "calib.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder / "model", data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_TEAM = """
import contextlib, os, sys, traceback
from pathlib import Path

import slim_ptq.api  # once for all processes, which are forked before any thread is started
from slim_ptq.cli import main

size, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.argv = ["slim-ptq", *sys.argv[4:]]
children = []
for rank in range(size):
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        OMP_NUM_THREADS="1",
    )
    code = 1
    try:
        with (
            (folder / f"{rank}.out").open("w") as out,
            (folder / f"{rank}.err").open("w") as error,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
        ):
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(*codes)
"""


def run_team(size: int, arguments: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Run the command in several processes with the environment of torchrun.

    Returns
    -------
    list
        Exit code, output and errors of each process.
    """
    folder.mkdir()
    script = folder / "team.py"
    script.write_text(_TEAM)
    command = [sys.executable, str(script), str(size), str(free_port()), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    codes = [int(code) for code in done.stdout.split()[-size:]]
    return [
        (code, (folder / f"{rank}.out").read_text(), (folder / f"{rank}.err").read_text())
        for rank, code in enumerate(codes)
    ]


@pytest.mark.parametrize(
    ("size", "recipe"), [(2, "w8a8"), (4, "gptq"), (2, "weights")], ids=lambda value: str(value)
)
def test_the_same_checkpoint(
    job: tuple[Path, Path], tmp_path: Path, size: int, recipe: str
) -> None:
    model, data = job
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(RECIPES[recipe]))
    options = ["--recipe", str(file), "--length", "16"]
    if recipe != "weights":
        options += ["--calib", str(data)]
    command = ["quantize", str(model), str(tmp_path / "team"), *options]
    ranks = run_team(size, command, tmp_path / "logs")
    assert [code for code, _, _ in ranks] == [0] * size, ranks[0][2]
    assert "written to" in ranks[0][1]
    assert all(not out for _, out, _ in ranks[1:])
    calibration = None if recipe == "weights" else data
    quantize(
        model,
        tmp_path / "one",
        recipe=Recipe.build(**RECIPES[recipe]),
        calibration=calibration,
        length=16,
    )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "team").iterdir()) == names
    one, team = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "team")
    assert list(team.tensors) == list(one.tensors)
    for name in one.tensors:
        expected, found = one.load(name), team.load(name)
        assert found.dtype == expected.dtype, name
        if recipe != "gptq" or expected.dtype != np.int8:
            np.testing.assert_allclose(
                found.astype(np.float64), expected.astype(np.float64), rtol=1e-5, err_msg=name
            )
        else:  # the sum over tokens is rounded in another order, which can tip a code
            assert np.mean(found != expected) < 0.01, name
            assert np.abs(found.astype(int) - expected).max() <= 1, name


def test_mistakes_end_every_process(job: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = job
    command = ["quantize", str(model), str(tmp_path / "out"), "--calib", str(data)]
    ranks = run_team(2, [*command, "--scheme", "w8a9"], tmp_path / "logs")
    assert [code for code, _, _ in ranks] == [2, 2]
    assert "w8a9" in ranks[0][2]
    assert not ranks[1][2]
    assert not (tmp_path / "out").exists()


def test_what_one_process_meets_it_says(tmp_path: Path, tiny_model: Factory) -> None:
    model = tiny_model("llama")
    ids = [[*range(2, 18)], [*range(18, 34)]]
    with torch.no_grad():
        model.model.embed_tokens.weight[20] = torch.inf  # a token that the second process has
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "calib.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--calib", str(data)]
    ranks = run_team(2, [*command, "--length", "16"], tmp_path / "logs")
    assert ranks[1][0] == 1
    assert "error in process 1: " in ranks[1][2]
    assert "NaN or infinite" in ranks[1][2]
    assert not (tmp_path / "out").exists()


SHAPES = {
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "gate": (96, 32),
    "up": (96, 32),
    "down": (32, 96),
}


class Other(Team):
    """One of several processes, which never meets the others."""

    def collect(self, value: Any) -> list[Any]:
        return [value]


def made_by(team: Team, method: str) -> list[str]:
    """Return the layers of a block that a process quantizes."""
    scheme, spec = QuantScheme.parse("w4a16"), MethodSpec.parse(method)
    generator = torch.Generator().manual_seed(0)
    block = torch.nn.ModuleDict(
        {name: torch.nn.Linear(shape[1], shape[0], bias=False) for name, shape in SHAPES.items()}
    )
    plans = {
        name: LayerPlan(name, shape, scheme, "", method=spec) for name, shape in SHAPES.items()
    }
    statistics: dict[str, InputStatistics] = {}
    for members in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        seen = InputStatistics(members[0], None, make_method(spec).needs)
        seen.watch(torch.randn(200, SHAPES[members[0]][1], generator=generator))
        statistics |= dict.fromkeys(members, seen)
    layers = BlockLayers(block, plans, statistics, {}, "float32", lambda _, tensor: tensor)
    return [local for local, _ in layers.made(team)]


class TestParts:
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 6))
    def test_every_window_goes_to_one_process_in_order(self, rows: list[int], size: int) -> None:
        ids = torch.arange(sum(rows))[:, None].expand(-1, 3)
        data = TokenWindows(ids.split(rows), "x")
        if data.rows < size:
            with pytest.raises(CalibrationError, match=f"{size} processes need"):
                data.part(0, size)
            return
        parts = [data.part(rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([x for part in parts for x in part.batches]), ids)
        counts = [part.rows for part in parts]
        assert max(counts) - min(counts) <= 1

    @given(st.dictionaries(st.text(max_size=3), st.integers(0, 9)), st.integers(1, 4))
    def test_work_is_shared_out(self, costs: dict[str, int], size: int) -> None:
        shares = [Team(rank, size).share(costs) for rank in range(size)]
        assert sorted(key for share in shares for key in share) == sorted(costs)
        loads = [sum(costs[key] for key in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs.values(), default=0)

    def test_what_reads_the_same_second_moments_stays_together(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        factorized: list[str] = []

        def counted(names: Any, *args: Any) -> Any:
            factorized.extend(names)
            return factorize(names, *args)

        monkeypatch.setattr(gptq, "factorize", counted)
        first, second = (made_by(Other(rank, 2), "gptq") for rank in range(2))
        assert sorted(first + second) == sorted(SHAPES)
        for group in ({"q", "k", "v"}, {"gate", "up"}):
            assert group <= set(first) or group <= set(second)
        assert first
        assert second
        assert len(factorized) == 4  # once for each input
        assert made_by(Team(), "gptq") == list(SHAPES)
        assert len(factorized) == 8
        # Of other methods, equal layers are dealt out one by one.
        first, second = (made_by(Other(rank, 2), "hqq") for rank in range(2))
        assert ("gate" in first) != ("up" in first)

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert own_device("cuda") == "cuda"
        monkeypatch.setenv("LOCAL_RANK", "3")
        names = [own_device(name) for name in ("cpu", "cuda", "npu", "cuda:1")]
        assert names == ["cpu", "cuda:3", "npu:3", "cuda:1"]


@pytest.mark.parametrize("kind", list(ObserverKind))
@given(seed=st.integers(0, 99), parts=st.integers(1, 4))
def test_merged_observers(kind: ObserverKind, seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = [
        torch.randn(20, 8, generator=generator) * float(torch.rand(1, generator=generator) * 5)
        for _ in range(8)
    ]
    whole = make_observer(kind)
    for sample in samples:
        whole.update(sample)
    merged = make_observer(kind)
    for part in range(parts):
        own = make_observer(kind)
        for sample in samples[8 * part // parts : 8 * (part + 1) // parts]:
            own.update(sample)
        merged.merge(own)
    merged.merge(make_observer(kind))  # of a process that saw nothing
    assert merged.samples == whole.samples
    low, high = (end.item() for end in whole.bounds())
    # A histogram is put together from bins: off by a few of its 2048.
    slack = 1e-6 if kind in (ObserverKind.MINMAX, ObserverKind.MEAN_MINMAX) else 0.02
    for found, expected in zip(merged.bounds(), (low, high), strict=True):
        assert abs(found.item() - expected) <= slack * (high - low)


def test_merged_histograms_of_single_values() -> None:
    for order in (([2.0], [2.0]), ([2.0], [1.0]), ([1.0, 3.0], [2.0]), ([2.0], [1.0, 3.0])):
        first, second = (make_observer(ObserverKind.HISTOGRAM) for _ in range(2))
        first.update(torch.tensor(order[0]))
        second.update(torch.tensor(order[1]))
        first.merge(second)
        low, high = (end.item() for end in first.bounds())
        values = order[0] + order[1]
        assert min(values) <= low <= high <= max(values)
        assert float(first._counts.sum()) == len(values)  # type: ignore[attr-defined]
