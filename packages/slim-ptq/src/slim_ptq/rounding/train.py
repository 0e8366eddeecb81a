"""Learning the rounding of all layers of one decoder block together.

The idea of AutoRound (Cheng et al., arXiv:2309.05516): what counts is the output of the block, and
the signs of its gradients decide which way a weight is rounded and how wide steps are.  Other than
there, learning starts from the codes and scales of another method, and what it gives is gone back
from as far as serves the block best on all calibration data, to the start if need be: steps by sign
never rest, and leave many weights a hair beyond the point where their code flips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_core.logging import get_logger
from slim_ptq.methods import Parts
from slim_ptq.rounding.linear import RoundedLinear, Start
from slim_ptq.structure import replaced

_FACTOR_RATE = 0.25  # of the rate: a factor moves the weights of a whole row or group
_SHARES = 1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3  # of the way from the start that are looked at

_log = get_logger("ptq")


class Samples(Protocol):
    """Batches of a block, such as :class:`slim_ptq.calibration.block_samples.BlockSamples`."""

    def __len__(self) -> int:
        """Return how many batches there are."""

    def run(self, block: nn.Module, batch: int) -> torch.Tensor:
        """Return the output of the block, as it is now, for a batch."""

    def target(self, batch: int) -> torch.Tensor:
        """Return what it should be."""


def train_rounding(
    name: str,
    block: nn.Module,
    starts: Mapping[str, Start],
    samples: Samples,
    *,
    iterations: int,
    rate: float,
    seed: int = 0,
) -> dict[str, Parts]:
    """Learn how the layers of a block are rounded.

    The mean squared error of the output of the block, relative to its mean square, is not above
    that of the start, on all batches together.

    Parameters
    ----------
    name : str
        Of the block, for messages.
    block : nn.Module
        In floating point, as it is again afterwards.
    starts : mapping
        By the local names of the layers.
    iterations : int
        Steps, each on one batch.
    rate : float
        Of the first step, in steps of the grid, falling linearly to 0.
    seed : int
        Of the order of the batches.

    Raises
    ------
    NumericalError
        The error is NaN or infinite.
    """
    layers = {
        local: RoundedLinear(block.get_submodule(local), start) for local, start in starts.items()
    }
    learned = [p for layer in layers.values() for p in (layer.shift, layer.factor)]
    loss = _Loss(name, block, samples)
    order = _shuffled(len(samples), seed)
    with replaced(block, layers), torch.enable_grad():
        first = loss.mean()
        for step in range(iterations):
            # An expert that no token of the batch reaches has no slope: it stays where it is.
            now = loss(next(order))
            slopes = iter(
                torch.autograd.grad(now, learned, allow_unused=True, materialize_grads=True)
            )
            speed = rate * (1 - step / iterations)
            for layer, shift, factor in zip(layers.values(), slopes, slopes, strict=True):
                layer.step(speed * shift.sign_(), _FACTOR_RATE * speed * factor.sign_())
        ends = {local: layer.learned() for local, layer in layers.items()}
        best, last = 0.0, first
        for share in _SHARES if iterations else ():
            for local, layer in layers.items():
                layer.go(share, ends[local])
            found = loss.mean()
            if found < last:
                best, last = share, found
    _log.info("%s: error %.3e -> %.3e, %.0f %% of the way", name, first, last, 100 * best)
    if not best:
        return {local: _as_it_was(start.parts, iterations) for local, start in starts.items()}
    note = f"block error {first:.2e} -> {last:.2e} in {iterations} steps"
    for local, layer in layers.items():
        layer.go(best, ends[local])
    return {local: layer.parts(note) for local, layer in layers.items()}


def _as_it_was(parts: Parts, iterations: int) -> Parts:
    """Return the start, noted if learning was to change it."""
    if not iterations:
        return parts
    note = f"{iterations} steps brought the block no closer: rounded as before them"
    return replace(parts, notes=(*parts.notes, note))


class _Loss:
    """The error of the output of a block, relative to the mean square of the batch."""

    def __init__(self, name: str, block: nn.Module, samples: Samples) -> None:
        self._name, self._block, self._samples = name, block, samples

    def __call__(self, batch: int) -> torch.Tensor:
        target = self._samples.target(batch).float()
        gap = self._samples.run(self._block, batch).float() - target
        return gap.square().mean() / target.square().mean().clamp(min=torch.finfo().tiny)

    def mean(self) -> float:
        """Return the mean over all batches, which is finite."""
        with torch.no_grad():
            losses = [float(self(batch)) for batch in range(len(self._samples))]
        mean = sum(losses) / len(losses)
        if not mean < float("inf"):
            raise NumericalError(f"{self._name}: the error of its output is NaN or infinite")
        return mean


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield batches in random order, all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
