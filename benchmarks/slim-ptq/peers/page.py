"""The page of the documentation with the comparison."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cases import OURS
from compare import Entry, gap

_SAME_BITS = 0.01
PAGE = Path(__file__).parents[3] / "packages" / "slim-ptq" / "docs" / "peers.md"
HEAD = """# Against other tools, at equal bits

Quality after quantization with slim-ptq and with the tools that others use: the same float32
models of `examples/`, the same calibration tokens (24 windows of 256, drawn anew for each of three
seeds), the same 38 windows of 512 tokens of `eval.txt` (tiny-llama, tiny-bloom) or of repeated
random segments (copy-llama), one evaluation. `{command}` installs each tool in an environment of
its own, quantizes there, and measures here the float weights that the codes of each stand for, with
inputs rounded where the scheme rounds them, so that no kernel matters (benchmarks/slim-ptq/peers/,
which writes this page).

{tools}.

*Bits* are those of a weight with its share of a 16-bit scale and of the zero point (as many bits as
a weight, 16 where a tool keeps fractions). *Divergence* is the mean Kullback-Leibler divergence
from the predictions of the float model, in thousandths of a nat a token: it does not reward a
model for errors that happen to suit the text, and varies far less between seeds and texts than
perplexity. ± is the standard deviation between seeds, left out where seeds play no part.

Differences are paired: the same seed, the same window. Their standard error counts both the draw of
the seeds and that of the windows; *behind* names methods whose peer of the same name has, with no
more bits, a lower divergence by more than twice that error. `minmax` of slim-ptq is that with
`full_range` where weights are symmetric, as llm-compressor defines it. Schemes of 3 bits have no
Ascend format; their weights are put into the model. AutoRound is not run on tiny-bloom, which it
does not support with these versions. How the defaults of our methods were chosen is told with the
[methods](../../../docs/methods.md).
"""


def page(
    result: dict[str, Any],
    groups: dict[tuple[str, str], list[Entry]],
    speed: dict[str, Any] | None = None,
) -> str:
    """Return the page as Markdown.

    Parameters
    ----------
    groups : dict
        What was measured, by model and scheme.
    speed : dict, optional
        What ``speed.py`` has saved.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["tools"].items())
    lines = [HEAD.format(command=result["command"], tools=versions)]
    lines += ["## Verdicts", "", *verdicts(groups), ""]
    if result["failed"]:
        lines += ["Not in the tables, since it failed:", ""]
        lines += [f"* {label}: `{error}`" for label, error in result["failed"].items()] + [""]
    lines += [] if speed is None else speed_table(speed)
    for (model, scheme), found in groups.items():
        lines += [
            f"## {model}, {scheme} (float: {result['float'][model]:.3f})",
            "",
            "| tool | method | bits | perplexity | divergence |",
            "|---|---|---|---|---|",
        ]
        best = min(entry.divergence for entry in found)
        for entry in sorted(found, key=lambda entry: entry.divergence):
            mark = "**" if entry.divergence == best else ""
            lines.append(
                f"| {mark}{entry.tool}{mark} | {entry.method} | {entry.bits:.2f} "
                f"| {_perplexity(entry)} | {_divergence(entry)} |"
            )
        lines.append("")
    return "\n".join(lines)


def speed_table(speed: dict[str, Any]) -> list[str]:
    """Return the section on speed."""
    calls = " x ".join(str(number) for number in speed["calibration"])
    ours = {row["method"]: row["seconds"] for row in speed["rows"] if row["tool"] == OURS}
    rows = sorted(speed["rows"], key=lambda row: (row["method"], row["seconds"]))
    return [
        "## Speed",
        "",
        f"{speed['question'].capitalize()}",
        f"({speed['model']}; {calls} tokens; {speed['threads']} threads;",
        f"`{speed['command']}`):",
        "",
        "| method | tool | seconds a million weights | times slim-ptq |",
        "|---|---|---|---|",
        *(
            f"| {row['method']} | {row['tool']} | {row['seconds_per_million']} "
            f"| {row['seconds'] / ours[row['method']]:.2f} |"
            for row in rows
        ),
        "",
        "AWQ of slim-ptq runs the whole decoder block for every candidate, llm-compressor the part",
        "that reads the scaled channels, attention or feed-forward.",
        "",
    ]


def verdicts(groups: dict[tuple[str, str], list[Entry]]) -> list[str]:
    """Return a table: our best recipe and the best of the others, and each method with its peer."""
    lines = [
        "| model | scheme | best of slim-ptq | best of the others | divergence, ours less theirs "
        "| perplexity, ours less theirs | behind |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, scheme), found in groups.items():
        ours = [entry for entry in found if entry.tool == OURS]
        others = [entry for entry in found if entry.tool != OURS]
        if not ours or not others:
            continue
        mine, theirs = (min(part, key=lambda e: e.divergence) for part in (ours, others))
        apart = gap(mine.divergences, theirs.divergences)
        lost = gap(mine.losses, theirs.losses)
        behind = [text for entry in ours for text in _behind(entry, others)]
        lines.append(
            f"| {model} | {scheme} | {_name(mine)} | {theirs.tool} {_name(theirs)} "
            f"| {_signed(*apart, 3)} | {_signed(*(100 * part for part in lost), 3)} % "
            f"| {'; '.join(behind) or 'none'} |"
        )
    return lines


def _name(entry: Entry) -> str:
    return f"{entry.method}: {_divergence(entry)}"


def _behind(entry: Entry, others: list[Entry]) -> list[str]:
    """Return the tools whose version of a method is better by more than twice the noise.

    One that takes more bits is no match: fractional zero points cost as many as a scale.
    """
    found = []
    for other in others:
        if other.method.split()[0] != entry.method or other.bits > entry.bits + _SAME_BITS:
            continue
        mean, error = gap(entry.divergences, other.divergences)
        if mean > 2 * error:
            found.append(f"{entry.method} ({other.tool}, {_signed(mean, error, 3)})")
    return found


def _signed(mean: float, error: float, digits: int) -> str:
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def _perplexity(entry: Entry) -> str:
    return _spread(entry.perplexities, 3)


def _divergence(entry: Entry) -> str:
    return _spread([statistics.fmean(windows) for windows in entry.divergences], 2)


def _spread(values: list[float], digits: int) -> str:
    noise = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{noise}"
