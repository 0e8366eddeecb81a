"""What the quantization of one group of layers does to the predictions of the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_core.progress import track
from slim_core.quantized import QuantizedCheckpoint
from slim_ptq.evaluate import evaluating, input_device
from slim_ptq.modules import FakeQuantLinear, as_torch, on_device

_ROWS = 512  # logits that are compared at once: float32 rows of a large vocabulary take gigabytes


@dataclass(slots=True)
class Effect:
    """Sums over predicted tokens.

    Parameters
    ----------
    divergence : float
        Kullback-Leibler divergence of the float model's prediction from the quantized one's, nats.
    loss : float
        Negative log likelihood, nats.
    tokens : int
    """

    divergence: float = 0.0
    loss: float = 0.0
    tokens: int = 0

    @property
    def mean_divergence(self) -> float:
        """Divergence of a token, in nats."""
        return self.divergence / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss of a token."""
        mean = self.loss / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def add(self, logits: torch.Tensor, float_logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Take in one window: logits of shape (tokens, vocabulary), ids of shape (tokens,)."""
        for start in range(0, len(ids) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(ids) - 1))
            found = torch.log_softmax(logits[rows].float(), dim=-1)
            expected = torch.log_softmax(float_logits[rows].float(), dim=-1)
            targets = ids[rows.start + 1 : rows.stop + 1, None]
            self.divergence += float((expected.exp() * (expected - found)).sum())
            self.loss -= float(found.gather(1, targets).double().sum())
            self.tokens += len(targets)


def model_effects(
    model: Any,
    quantized: Path,
    groups: Mapping[str, Mapping[str, str]],
    batches: Sequence[torch.Tensor],
) -> tuple[Effect, dict[str, Effect]]:
    """Return what the float model does, and what it does with one group quantized, by group.

    Parameters
    ----------
    model : transformers model
        In floating point, with every linear layer a module of its own.
    quantized : Path
        Checkpoint with the quantized layers.
    groups : mapping
        For each group, names in the model by names in the checkpoint.
    batches : sequence of torch.Tensor
        Token ids, int64, shape (rows, tokens) each.

    Raises
    ------
    NumericalError
        The logits of the model are NaN or infinite; names the group.

    Notes
    -----
    In memory are the float model, the codes of all layers, and the logits of one batch, twice.
    """
    stored = QuantizedCheckpoint(quantized)
    device = input_device(model)
    replaced = {
        group: {
            module: _fake(stored, name, device, model.dtype) for name, module in members.items()
        }
        for group, members in groups.items()
    }
    base, effects = Effect(), {group: Effect() for group in groups}
    with evaluating(model), torch.no_grad():
        for ids in track([batch for batch in batches if batch.shape[1] > 1], "Running the model"):
            ids = ids.to(device)
            expected = _logits(model, ids, "the float model")
            _add(base, expected, expected, ids)
            for group, modules in replaced.items():
                with _swapped(model, modules):
                    _add(effects[group], _logits(model, ids, group), expected, ids)
    return base, effects


def _fake(
    stored: QuantizedCheckpoint, name: str, device: torch.device, dtype: torch.dtype
) -> FakeQuantLinear:
    return FakeQuantLinear(on_device(as_torch(stored.layer(name)), device), dtype)


def _logits(model: Any, ids: torch.Tensor, what: str) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(f"{what}: the logits of the model are NaN or infinite")
    return logits


def _add(
    effect: Effect, logits: torch.Tensor, float_logits: torch.Tensor, ids: torch.Tensor
) -> None:
    for row, expected, tokens in zip(logits, float_logits, ids, strict=True):
        effect.add(row, expected, tokens)


@contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of these names for a while."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            _put(model, path, module)
        yield
    finally:
        for path, module in before.items():
            _put(model, path, module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
