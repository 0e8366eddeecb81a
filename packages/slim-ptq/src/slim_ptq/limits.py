"""Limits of a model that its configuration declares: positions and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slim_core.errors import CalibrationError
from slim_core.logging import get_logger
from slim_ptq.calibration.text import TokenWindows

_log = get_logger("ptq")


def within_positions(length: int, config: Mapping[str, Any]) -> int:
    """Return the length of windows, cut to the number of positions that a model knows."""
    known = positions(config)
    if known is None or length <= known:
        return length
    _log.info("windows have %d tokens, more the model cannot place", known)
    return known


def positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a model knows, None if its configuration has no limit."""
    return _setting(config, "max_position_embeddings", "n_positions")


def check_tokens(data: TokenWindows, config: Mapping[str, Any]) -> None:
    """Require that the model knows every token.

    Raises
    ------
    CalibrationError
        Names the highest token.
    """
    known = _setting(config, "vocab_size", "padded_vocab_size")
    highest = max(int(batch.max()) for batch in data.batches)
    if known is not None and highest >= known:
        raise CalibrationError(
            f"{data.source} has token {highest}, and the model knows {known} tokens",
            hint="is the tokenizer that of the model?",
        )


def _setting(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of these numbers in a configuration, or in that of its text model."""
    for holder in (config, config.get("text_config") or {}):
        for key in keys:
            if isinstance(holder.get(key), int):
                return int(holder[key])
    return None
