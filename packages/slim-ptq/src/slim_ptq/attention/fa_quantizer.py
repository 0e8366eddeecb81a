"""``FAQuantizer``: int8 queries, keys and values of one attention module."""

from __future__ import annotations

import logging
from enum import Enum
from typing import Any

import torch

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.numerics import check_finite
from slim_core.validate import check_choice, check_int, check_type
from slim_ptq.attention.head_range import HeadRange, round_heads
from slim_ptq.attention.states import StatesQuantizer

STATES = ("q", "k", "v")


class Mode(Enum):
    """What a quantizer does with states."""

    IDLE = "idle"
    OBSERVE = "observe"
    EMULATE = "emulate"


class FAQuantizer(StatesQuantizer):
    """Finds the int8 scales of queries, keys and values by head, and emulates them.

    An attention module that computes with the attention functions of transformers gets one by
    itself.  Any other makes one in its ``__init__`` and calls it between the cache and the
    repetition of heads::

        self.fa_quantizer = FAQuantizer(config, logger)
        ...
        query = self.fa_quantizer.quant(query, qkv="q")
        key = self.fa_quantizer.quant(key, qkv="k")
        value = self.fa_quantizer.quant(value, qkv="v")

    Parameters
    ----------
    config : PretrainedConfig
        Has ``num_attention_heads`` and ``hidden_size``; ``num_key_value_heads`` is optional.
    logger : logging.Logger

    Raises
    ------
    InvalidTypeError
        An argument has another type, or the configuration lacks a number.
    """

    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    def __init__(self, config: Any, logger: logging.Logger) -> None:
        super().__init__()
        check_type("logger", logger, logging.Logger)
        for name in ("num_attention_heads", "hidden_size"):
            if not hasattr(config, name):
                raise InvalidTypeError(f"config of {type(config).__name__} has no {name}")
            check_int(f"config.{name}", getattr(config, name), low=1)
        if getattr(config, "num_key_value_heads", None) is None:
            logger.warning("config has no num_key_value_heads: as many as attention heads")
        self.mode = Mode.IDLE
        self._clear()
        for part in STATES:  # not in the state dict: checkpoints of float models lack them
            self.register_buffer(f"{part}_scale", None, persistent=False)

    def quant(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Observe or emulate; returns the states unchanged until the scales are fixed.

        Parameters
        ----------
        states : torch.Tensor, shape (batch, heads, tokens, channels)
            After the cache, before the repetition of key and value heads.
        qkv : {"q", "k", "v"}

        Raises
        ------
        InvalidTypeError, InvalidValueError
            Another type, number of dimensions, number of heads, or name.
        NumericalError
            The states that are observed have NaN or infinity.
        """
        check_choice("qkv", qkv, STATES)
        check_type("states", states, torch.Tensor)
        if self.mode is Mode.IDLE:
            return states
        if states.ndim != 4:
            raise InvalidValueError(
                "states must have shape (batch, heads, tokens, channels), not "
                f"{tuple(states.shape)}"
            )
        if self.mode is Mode.OBSERVE:
            self._observe(states, qkv)
            return states
        scale = self.scale(qkv).to(states.device)
        _check_heads(states, scale.shape[0])
        return round_heads(states, scale)

    def forward(self, states: torch.Tensor, qkv: str) -> torch.Tensor:
        """Return :meth:`quant` of the states."""
        return self.quant(states, qkv)

    @property
    def missing(self) -> list[str]:
        """Which of ``q``, ``k``, ``v`` were not observed yet."""
        return [part for part in STATES if not self._ranges[part].heads]

    @property
    def difficulty(self) -> float:
        """Largest relative squared error of q, k or v on the first batch that was observed."""
        return max(self._errors.values(), default=0.0)

    def observe(self) -> None:
        """Begin to observe, from nothing."""
        self.mode = Mode.OBSERVE
        self._clear()

    def hold(self) -> None:
        """Keep what was observed, and hand states on unchanged from here on."""
        self.mode = Mode.IDLE

    def idle(self) -> None:
        """Forget what was observed, and hand states on unchanged from here on."""
        self.mode = Mode.IDLE
        self._clear()

    def merge(self, other: FAQuantizer) -> None:
        """Take in what another one has observed of later data."""
        for part, seen in self._ranges.items():
            seen.merge(other._ranges[part])
        self._errors.update({p: e for p, e in other._errors.items() if p not in self._errors})

    def params(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return scale and offset of each of ``q``, ``k``, ``v`` that was observed."""
        return {part: self._ranges[part].params() for part in STATES}

    def emulate(self, scales: dict[str, torch.Tensor]) -> None:
        """Fix the scales, float32, shape (heads, 1), and round states from here on."""
        for part in STATES:
            setattr(self, f"{part}_scale", scales[part])
        self.mode = Mode.EMULATE
        self._clear()

    def scale(self, part: str) -> torch.Tensor:
        """Return the fixed scale of ``q``, ``k`` or ``v``."""
        scale = getattr(self, f"{part}_scale")
        return check_type(f"{part}_scale", scale, torch.Tensor)

    def _observe(self, states: torch.Tensor, part: str) -> None:
        if not states.numel():
            return
        check_finite("an attention", {"q": "query", "k": "key", "v": "value"}[part], states)
        seen = self._ranges[part]
        if seen.heads:
            _check_heads(states, seen.heads)
        seen.update(states)
        if part not in self._errors:
            rounded = round_heads(states, seen.params()[0].to(states.device)).double()
            power = float(states.double().pow(2).sum())
            error = float((rounded - states.double()).pow(2).sum())
            self._errors[part] = error / power if power else 0.0

    def _clear(self) -> None:
        self._ranges = {part: HeadRange(shortest=part != "v") for part in STATES}
        self._errors: dict[str, float] = {}


def _check_heads(states: torch.Tensor, heads: int) -> None:
    if states.shape[1] != heads:
        raise InvalidValueError(f"states must have {heads} heads, not {states.shape[1]}")
