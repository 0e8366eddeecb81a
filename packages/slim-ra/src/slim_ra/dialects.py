"""Head lists of other tools: Golden-Stick's JSON and DuoAttention's pattern files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from slim_core.errors import FormatError

THRESHOLD = 0.5  # DuoAttention's gates are in [0, 1]; from here on a head keeps everything


def heads_json(heads: Mapping[int, list[int]]) -> str:
    """Return ``{"layer": [kv_heads]}``, the retrieval-head file of Golden-Stick."""
    return json.dumps({str(layer): list(row) for layer, row in sorted(heads.items())}) + "\n"


def parse_heads_json(text: str) -> dict[int, list[int]]:
    """Read what :func:`heads_json` writes.

    Raises
    ------
    FormatError
        Not a JSON object of layer numbers and lists.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"the head list is no JSON: {error}") from error
    if not isinstance(content, dict) or not all(key.isdecimal() for key in content):
        raise FormatError("the head list must be a JSON object whose keys are layer numbers")
    return {int(key): row for key, row in content.items()}


def pattern_text(heads: Mapping[int, list[int]], layers: int, kv_heads: int) -> str:
    """Return a table, one tab-separated row a layer, 1 for heads that keep everything."""
    rows = [
        "\t".join("1" if head in heads.get(layer, []) else "0" for head in range(kv_heads))
        for layer in range(layers)
    ]
    return "\n".join(rows) + "\n"


def parse_pattern(text: str, threshold: float = THRESHOLD) -> dict[int, list[int]]:
    """Read a table of gates in ``[0, 1]``, tab, comma or space separated, one row a layer.

    Raises
    ------
    FormatError
        Rows of unequal length, or an entry that is no number in ``[0, 1]``.
    """
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        raise FormatError("a head pattern needs rows of equal length, one a layer")
    heads: dict[int, list[int]] = {}
    for layer, row in enumerate(rows):
        gates = [_gate(entry, layer) for entry in row]
        kept = [head for head, gate in enumerate(gates) if gate >= threshold]
        if kept:
            heads[layer] = kept
    return heads


def _gate(entry: str, layer: int) -> float:
    try:
        gate = float(entry)
    except ValueError as error:
        raise FormatError(f"row {layer} of the head pattern has {entry!r}, no number") from error
    if not (math.isfinite(gate) and 0.0 <= gate <= 1.0):
        raise FormatError(f"row {layer} of the head pattern has {entry}, outside [0, 1]")
    return gate
