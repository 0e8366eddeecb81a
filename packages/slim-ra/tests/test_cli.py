from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from slim_ra import RetrievalHeads, cli, read_profile, write_profile
from slim_ra.scorefile import read_scores, write_scores
from slim_ra.scores import HeadScores

EXAMPLES = Path(__file__).parents[3] / "examples"
COPY, BLOOM, LLAMA = (str(EXAMPLES / name) for name in ("copy-llama", "tiny-bloom", "tiny-llama"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_heads_show_convert(here):
    out = run("heads", COPY, "win.pt", "--induction-ratio", 0.34, "--unit-length", 64,
              "--needles", 2, "--plot", "heads.svg")  # fmt: skip
    assert "4 heads keep everything" in out
    assert "131,072" in out
    assert read_profile("win.pt").induction == {1: [0, 1, 2, 3]}
    scores = read_scores("win.scores.pt")
    assert scores.needle is not None
    assert scores.settings["unit_length"] == 64
    assert Path("heads.svg").read_text().startswith("<?xml")
    out = run("show", "win.pt", "--model", COPY, "--plot", "again.png")
    assert "induction score" in out
    assert "8,192" in out
    assert Path("again.png").read_bytes().startswith(b"\x89PNG")
    run("convert", "win.pt", "heads.json")
    run("convert", "heads.json", "duo.tsv", "--model", COPY)
    run("convert", "duo.tsv", "back.pt")
    assert read_profile("back.pt").union() == read_profile("win.pt").union()
    run("show", "heads.json", "--plot", "plain.svg")


def test_heads_by_budget(here):
    out = run("heads", COPY, "win.pt", "--unit-length", 64, "--budget", 0.4)
    assert read_profile("win.pt").count() == 2
    share = next(line for line in out.splitlines() if "32,768" in line)
    assert float(share.split("│")[-2].split()[0]) <= 40.0


def test_windows(here):
    out = run("windows", BLOOM, "win.pt", "--plot", "win.svg")
    assert "22724" in out
    assert not Path("win.layers.pt").exists()
    run("windows", BLOOM, "bound.pt", "--mode", "bound", "--mass", "--epsilon", 0.001)
    assert read_profile("bound.layers.pt").windows.shape == (4, 8)
    text = Path("text.txt")
    text.write_text("The king spoke to his people, and they answered him with one voice. " * 60)
    run("windows", BLOOM, "cal.pt", "--mode", "calibrated", "--text", text, "--length", 128)
    calibrated = read_profile("cal.layers.pt")
    assert int(calibrated.windows.max()) <= 128
    assert calibrated.settings["epsilon"] == 1e-3
    assert "all" in run("show", "cal.pt", "--model", BLOOM, "--plot", "cal.png")


def test_eval(here):
    write_profile("win.pt", RetrievalHeads({1: [0, 1, 2, 3]}))
    out = run("eval", COPY, "--heads", "win.pt", "--length", 128, "--samples", 2, "--window", 16,
              "--window", 40, "--json", "out.json", "--plot", "curve.svg")  # fmt: skip
    assert "razor, window 40" in out
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "razor, window 16", "razor, window 40"]
    assert (
        rows[1]["passkey"]["nbytes"] < rows[2]["passkey"]["nbytes"] < rows[0]["passkey"]["nbytes"]
    )
    text = Path("text.txt")
    text.write_text("The king spoke to his people, and they answered him with one voice. " * 20)
    write_profile("all.pt", RetrievalHeads({}))
    out = run("eval", LLAMA, "--heads", "all.pt", "--text", text, "--prompt", 60, "--decode", 20,
              "--length", 100, "--samples", 1, "--window", 20)  # fmt: skip
    assert "perplexity" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("heads", "nowhere", "win.pt"), "no config.json"),
        (("heads", COPY, "win.bin"), ".pt file"),
        (("heads", COPY, "win.pt", "--induction-ratio", "1.5"), "induction-ratio"),
        (("heads", COPY, "win.pt", "--needle-ratio", "0.1"), "needles"),
        (("heads", COPY, "win.pt", "--plot", "x.pdf"), ".png"),
        (("heads", COPY, "win.pt", "--budget", "2"), "budget"),
        (("heads", COPY, "win.pt", "--dtype", "int8"), "dtype"),
        (("heads", BLOOM, "win.pt"), "rotary"),
        (("windows", BLOOM, "win.pt", "--mode", "magic"), "mode"),
        (("windows", BLOOM, "win.pt", "--mode", "calibrated"), "--text"),
        (("windows", BLOOM, "win.pt", "--theta", "1"), "theta"),
        (("show", "nothing.pt"), "no such file"),
        (("eval", COPY, "--heads", "nothing.pt"), "no such file"),
    ],
)
def test_errors_end_with_status_two(here, arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slim-ra", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "slim-ra: error:" in message
    assert text in message
    assert not list(Path().glob("*.pt"))


def test_convert_errors(here):
    write_profile("win.pt", RetrievalHeads({0: [1]}))
    for output, text in (("x.bin", "must end"), ("x.tsv", "shape")):
        with pytest.raises(ValueError, match=text):
            run("convert", "win.pt", output)


def test_scores_file(tmp_path):
    scores = HeadScores(torch.rand(2, 3), torch.rand(2, 3), None, (0, 1), {"seed": 3})
    write_scores(tmp_path / "s.pt", scores)
    again = read_scores(tmp_path / "s.pt")
    assert torch.equal(again.induction, scores.induction)
    assert (again.candidates, again.settings, again.needle) == ((0, 1), {"seed": 3}, None)
    torch.save({"induction": 1}, tmp_path / "t.pt")
    (tmp_path / "t.pt").chmod(0o600)
    with pytest.raises(ValueError, match="no head scores"):
        read_scores(tmp_path / "t.pt")
    write_scores(tmp_path / "n.pt", HeadScores(torch.full((1, 1), torch.nan), torch.zeros(1, 1)))
    with pytest.raises(ValueError, match="finite"):
        read_scores(tmp_path / "n.pt")


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom slim_ra.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "windows" in done.stdout
