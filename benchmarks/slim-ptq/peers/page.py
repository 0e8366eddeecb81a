"""The page of the documentation with the comparison."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import OURS

PAGE = Path(__file__).parents[3] / "packages" / "slim-ptq" / "docs" / "peers.md"
HEAD = """# Against other tools, at equal bits

Perplexity after quantization with slim-ptq and with the tools that others use: the same float32
models of `examples/`, the same calibration tokens (24 windows of 256, drawn anew for each seed),
the same 20 windows of 512 tokens of `eval.txt` (tiny-llama, tiny-bloom) or of repeated random
segments (copy-llama), one evaluation. `{command}` installs each tool in an environment of its
own, quantizes there, and measures here the float weights that the codes of each stand for, with
inputs rounded where the scheme rounds them, so that no kernel matters
(benchmarks/slim-ptq/peers/, which writes this page; {machine}).

*Bits* are those of a weight with its share of a 16-bit scale and of the zero point (as many bits as
a weight, 16 where a tool keeps fractions). *Divergence* is the mean Kullback-Leibler divergence
from the predictions of the float model, in thousandths of a nat a token: it does not reward a
model for errors that happen to suit the text, and varies far less between seeds than perplexity.
± is the standard deviation between seeds, left out where there is one. *Seconds* are those of the
whole call, the least of the seeds. Schemes of 3 bits have no format; their weights are put into the
model. How the defaults of our methods were chosen is told with the
[methods](../../../docs/methods.md): those of `gptq` and `signround` on the text measured here.
"""


@dataclass(frozen=True)
class Entry:
    """A method of a tool on a model and scheme, over its seeds."""

    tool: str
    method: str
    bits: float
    perplexity: tuple[float, ...]
    divergence: tuple[float, ...]
    seconds: float


def page(result: dict[str, Any], speed: dict[str, Any] | None = None) -> str:
    """Return the page as Markdown.

    Parameters
    ----------
    speed : dict, optional
        What ``speed.py`` has saved.
    """
    machine = result["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}"
    lines = [HEAD.format(command=result["command"], machine=where)]
    lines += [result["note"], ""] if result["note"] else []
    groups = entries(result["rows"])
    lines += ["## Verdicts", "", *verdicts(groups), ""]
    lines += [] if speed is None else speed_table(speed)
    for (model, scheme), found in groups.items():
        lines += [
            f"## {model}, {scheme} (float: {result['float'][model]:.3f})",
            "",
            "| tool | method | bits | perplexity | divergence | seconds |",
            "|---|---|---|---|---|---|",
        ]
        best = min(_mean(entry.divergence) for entry in found)
        for entry in sorted(found, key=lambda entry: _mean(entry.divergence)):
            mark = "**" if _mean(entry.divergence) == best else ""
            lines.append(
                f"| {mark}{entry.tool}{mark} | {entry.method} | {entry.bits:.2f} "
                f"| {_spread(entry.perplexity, 3)} | {_spread(entry.divergence, 2)} "
                f"| {entry.seconds:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def speed_table(speed: dict[str, Any]) -> list[str]:
    """Return the section on speed."""
    calls = " x ".join(str(number) for number in speed["calibration"])
    return [
        "## Speed",
        "",
        f"{speed['question'].capitalize()}",
        f"({speed['model']}; {calls} tokens; {speed['threads']} threads;",
        f"`{speed['command']}`):",
        "",
        "| method | tool | seconds a million weights |",
        "|---|---|---|",
        *(
            f"| {row['method']} | {row['tool']} | {row['seconds_per_million']} |"
            for row in sorted(speed["rows"], key=lambda row: (row["method"], row["seconds"]))
        ),
        "",
    ]


def entries(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[Entry]]:
    """Return what was measured by model and scheme."""
    seeds: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        seeds[row["model"], row["scheme"], row["tool"], row["method"]].append(row)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for (model, scheme, tool, method), found in seeds.items():
        perplexity = tuple(row["perplexity"] for row in found)
        divergence = tuple(row["divergence"] for row in found)
        seconds = min(row["seconds"] for row in found)
        groups[model, scheme].append(
            Entry(tool, method, found[0]["bits"], perplexity, divergence, seconds)
        )
    return {key: found for key, found in groups.items() if any(e.tool != OURS for e in found)}


def verdicts(groups: dict[tuple[str, str], list[Entry]]) -> list[str]:
    """Return a table: our best recipe and the best of the others, and each method with its peer."""
    lines = [
        "| model | scheme | best of slim-ptq | best of the others | lower | behind a peer's |",
        "|---|---|---|---|---|---|",
    ]
    for (model, scheme), found in groups.items():
        ours = [entry for entry in found if entry.tool == OURS]
        others = [entry for entry in found if entry.tool != OURS]
        if not ours:
            continue
        mine, theirs = (min(part, key=lambda e: _mean(e.divergence)) for part in (ours, others))
        lower = OURS if _mean(mine.divergence) <= _mean(theirs.divergence) else theirs.tool
        behind = [text for entry in ours for text in _behind(entry, others)]
        lines.append(
            f"| {model} | {scheme} | {_name(mine)} | {theirs.tool} {_name(theirs)} | {lower} "
            f"| {'; '.join(behind) or 'none'} |"
        )
    return lines


def _name(entry: Entry) -> str:
    return f"{entry.method}: {_spread(entry.perplexity, 3)} ({_spread(entry.divergence, 2)})"


def _behind(entry: Entry, others: list[Entry]) -> list[str]:
    """Return the tools whose version of a method is better by more than twice the seed noise."""
    found = []
    for other in others:
        if other.method.split()[0] != entry.method:
            continue
        noise = (_deviation(entry.divergence) ** 2 + _deviation(other.divergence) ** 2) ** 0.5
        if _mean(other.divergence) < _mean(entry.divergence) - 2 * noise:
            found.append(f"{entry.method} ({other.tool} {_spread(other.divergence, 2)})")
    return found


def _mean(values: tuple[float, ...]) -> float:
    return statistics.fmean(values)


def _deviation(values: tuple[float, ...]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(values: tuple[float, ...], digits: int) -> str:
    noise = f" ± {_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{_mean(values):.{digits}f}{noise}"
