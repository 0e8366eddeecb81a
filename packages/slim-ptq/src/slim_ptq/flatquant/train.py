"""Training the transforms, scales and clip ratios of one decoder block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.scheme import QuantScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.flatquant.trained_block import TrainedBlock
from slim_ptq.methods.flatquant import FlatQuant
from slim_ptq.methods.learned import LearnedTransform
from slim_ptq.structure import BlockTrace
from slim_ptq.transforms import scale_link

_PATIENCE = 4  # epochs without progress after which training ends
_PROGRESS = 0.01  # share of the loss
_LAST_RATE = 1e-3  # share of the learning rate that is left at the end
_CLIP_RATE = 10.0  # learning rate of clip ratios in that of the transforms

_log = get_logger("ptq")


def train_block(
    name: str,
    block: nn.Module,
    trace: BlockTrace,
    methods: Mapping[str, FlatQuant],
    schemes: Mapping[str, QuantScheme],
    samples: BlockSamples,
    *,
    stored: Mapping[str, torch.dtype] | None = None,
) -> dict[str, LearnedTransform]:
    """Train a block and move its channel scales into its weights.

    The mean squared error of the output of the block, relative to its mean square, falls below
    that of plain rounding, or plain rounding is what is returned.

    Parameters
    ----------
    name : str
        Of the block, for messages.
    block : nn.Module
        In floating point.  It stays the same function: channel scales go from what produces a
        tensor (a norm, a value or an up projection) to its readers.
    methods : mapping
        How the layers to train, by their local names, are trained.  The options of the first hold
        for the block.
    schemes : mapping
        How these layers will be quantized.
    stored : mapping, optional
        In which dtype the weights of norms, by local names, will be stored, where that is another
        one than that of the block.

    Returns
    -------
    dict
        Of the layers that the block ran.  Layers that read one tensor share factors and
        ``clip_ratio``.

    Raises
    ------
    NumericalError
        The loss is NaN or infinite.
    """
    options = next(iter(methods.values()))
    with torch.enable_grad(), _frozen(block):
        layers = {local: schemes[local] for local in methods}
        trained = TrainedBlock(block, trace, layers, samples, options)
        with trained.installed():
            learned = _Training(name, block, trained, samples, options).train()
    for link, scales in trained.scales():
        kind = None if stored is None or link.norm_form is None else stored[link.source]
        scale_link(block, link, scales, stored=kind)
    return learned


class _Training:
    """The epochs of one block."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        trained: TrainedBlock,
        samples: BlockSamples,
        options: FlatQuant,
    ) -> None:
        self._name, self._block, self._samples, self._options = name, block, samples, options
        self._trained = trained
        self._power = [
            float(samples.target(i).float().square().mean()) for i in range(len(samples))
        ]
        self._epochs = 0

    def train(self) -> dict[str, LearnedTransform]:
        """Train, and return what was learned where the loss was smallest."""
        started = self._trained.state()
        self._trained.become_plain()
        plain = best = self._measured()
        kept = self._trained.state()
        self._trained.load_state(started)
        best, kept = self._better(self._measured(), best, kept)
        optimizer, schedule = self._optimizer()
        waited = 0
        for _ in track(range(self._options.epochs), f"Training {self._name}"):
            self._epoch(optimizer, schedule)
            self._epochs += 1
            loss = self._measured()
            _log.info("%s: epoch %d, error %.3e", self._name, self._epochs, loss)
            waited = 0 if loss < best * (1 - _PROGRESS) else waited + 1
            best, kept = self._better(loss, best, kept)
            if waited == _PATIENCE:
                break
        self._trained.load_state(kept)
        self._trained.refresh()
        return self._trained.learned(plain, best, self._epochs)

    def _better(
        self, loss: float, best: float, kept: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the smallest loss so far, and the parameters that gave it."""
        return (loss, self._trained.state()) if loss < best else (best, kept)

    def _epoch(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for batch in range(len(self._samples)):
            self._trained.refresh()
            loss = self._loss(batch)
            optimizer.zero_grad()
            # Divided by its own value, each batch has the same say, however large its outputs.
            share: Any = loss / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny)
            share.backward()
            optimizer.step()
            schedule.step()

    def _measured(self) -> float:
        """Return the mean loss over all batches.

        Raises
        ------
        NumericalError
            It is NaN or infinite.
        """
        with torch.no_grad():
            self._trained.refresh()
            losses = [self._loss(batch) for batch in range(len(self._samples))]
            mean = torch.stack(losses).mean()
        if not bool(torch.isfinite(mean)):
            raise NumericalError(
                f"{self._name}: the error of its output is NaN or infinite",
                hint="a lower lr of method flatquant, if the float model is sound",
            )
        return float(mean)

    def _loss(self, batch: int) -> torch.Tensor:
        found = self._samples.run(self._block, batch).float()
        target = self._samples.target(batch).float()
        tiny = torch.finfo(torch.float32).tiny
        return (found - target).square().mean() / max(self._power[batch], tiny)

    def _optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        clips, others = self._trained.parameters()
        rate = self._options.lr
        optimizer = torch.optim.AdamW(
            [
                {"params": others, "lr": rate},
                *([{"params": clips, "lr": rate * _CLIP_RATE}] if clips else []),
            ],
            weight_decay=0.0,
        )
        steps = self._options.epochs * len(self._samples)

        def factor(step: int) -> float:
            half = (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()) / 2
            return _LAST_RATE + (1 - _LAST_RATE) * half

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextlib.contextmanager
def _frozen(block: nn.Module) -> Iterator[None]:
    """Take the weights of a block for constants."""
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
