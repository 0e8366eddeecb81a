"""slim-ptq against the tools that others use: perplexity at equal bits.

Each tool quantizes in an environment of its own (``worker.py``), from the same calibration tokens,
and leaves float weights; what is here measures all of them, and slim-ptq, on the same windows.

    python run.py cases WORK     write models, calibration tokens and cases
    python run.py measure WORK [MODEL ...]   measure what is there, and write results and page
    python run.py report WORK    write them from what was measured before
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from cases import (
    MODELS,
    OURS,
    SCHEMES,
    TOOLS,
    bits_per_weight,
    cases,
    write_models,
)
from compare import entries
from measure import Judge
from ours import quantized
from page import PAGE, page

sys.path.insert(0, str(Path(__file__).parents[1]))
from _common import RESULTS, machine, save

COMMAND = "nox -s bench-peers"


def main() -> None:
    """Do one of the steps."""
    step, work = sys.argv[1], Path(sys.argv[2]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if step == "cases":
        write_models(work)
        for tool in TOOLS:
            (work / f"{tool}.json").write_text(json.dumps(list(cases(tool, work)), indent=1))
    else:
        known = {model: _Known(work / f"measured-{model}.json") for model in MODELS}
        if step == "measure":
            for model in sys.argv[3:] or MODELS:
                measure(work, model, known[model])
        report(work, {name: row for part in known.values() for name, row in part.rows.items()})


class _Known:
    """What was measured, by case, on disk: a run that was stopped goes on where it was."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Take in what was measured of a case."""
        self.rows[name] = row
        self._file.write_text(json.dumps(self.rows, indent=1))
        print(name, flush=True)


def measure(work: Path, model: str, known: _Known) -> None:
    """Measure all cases of a model that are not known yet, the first seed of all first."""
    judge = Judge(work, model)
    known.add(model, {"perplexity": judge.float_perplexity()})
    todo = [(tool, case) for tool in (*TOOLS, OURS) for case in cases(tool, work)]
    for tool, case in sorted(todo, key=lambda item: item[1]["seed"]):
        name = case["name"]
        if Path(case["model"]).name == model and name not in known.rows:
            found = _measured(work, tool, case, judge)
            if found is not None:
                known.add(name, found)
                print(_summary(found), flush=True)


def report(work: Path, known: dict[str, Any]) -> None:
    """Write the results and the page."""
    rows = []
    for tool in (OURS, *TOOLS):
        for case in cases(tool, work):
            if case["name"] not in known:
                continue
            model, scheme = Path(case["model"]).name, _scheme_of(case)
            bits = bits_per_weight(work / model, tool, case["method"], scheme)
            rows.append(
                {
                    "tool": tool,
                    "model": model,
                    "scheme": scheme.name,
                    "method": case["method"],
                    "seed": case["seed"],
                    "bits": round(bits, 3),
                    **known[case["name"]],
                }
            )
    result = {
        "question": "what is lost on the same windows after quantization on the same tokens",
        "tools": {tool: _version(work, tool) for tool in TOOLS},
        "failed": _failed(work),
        "float": {name: known[name]["perplexity"] for name in MODELS if name in known},
    }
    save("peers", COMMAND, {**result, "rows": [_summary(row) for row in rows]})
    record = {"command": COMMAND, "machine": machine(), **result}
    timed = RESULTS / "peers_speed.json"
    speed = json.loads(timed.read_text()) if timed.exists() else None
    PAGE.write_text(page(record, entries(rows), speed), encoding="utf-8")


def _version(work: Path, tool: str) -> str:
    file = work / f"{tool}.version"
    return file.read_text() if file.exists() else "not run"


def _failed(work: Path) -> dict[str, str]:
    """Return what tools could not do, and how they put it."""
    failed = {}
    for tool in TOOLS:
        for case in cases(tool, work):
            file = work / "out" / f"{case['name']}.error"
            if file.exists():
                label = f"{case['method']} of {tool} on {Path(case['model']).name}"
                failed[label] = file.read_text().splitlines()[0][:200]
    return failed


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with means in the place of the values of all windows."""
    means = {
        "perplexity": round(math.exp(statistics.fmean(row["losses"])), 4),
        "divergence": round(statistics.fmean(row["divergences"]), 4),
    }
    kept = {k: v for k, v in row.items() if k not in ("losses", "divergences")}
    return kept | means


def _measured(work: Path, tool: str, case: dict[str, Any], judge: Judge) -> dict[str, Any] | None:
    """Return what a case gives, None where its tool has not run."""
    if tool != OURS:
        file = work / "out" / f"{case['name']}.safetensors"
        return judge.judge_file(file) if file.exists() else None
    calibration = Path(case["calibration"])
    model = quantized(Path(case["model"]), calibration, _scheme_of(case), case["method"])
    return judge.judge(model)


def _scheme_of(case: dict[str, Any]) -> Any:
    keys = ("bits", "group", "symmetric", "activation")
    wanted = tuple(case[key] for key in keys)
    return next(
        scheme
        for scheme in SCHEMES.values()
        if tuple(getattr(scheme, key) for key in keys) == wanted
    )


if __name__ == "__main__":
    main()
