"""Training the transforms, scales and clip ratios of one decoder block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.errors import NumericalError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.scheme import QuantScheme, TensorScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.flatquant.linear import SharedInput, TrainedLinear
from slim_ptq.methods.flatquant import FlatQuant
from slim_ptq.methods.learned import LearnedTransform
from slim_ptq.structure import BlockTrace, Link, weight_of
from slim_ptq.transforms import scale_link
from slim_ptq.transforms.smooth import smooth_scales

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
        training = _Training(
            name, block, trace, {local: schemes[local] for local in methods}, samples, options
        )
        with training.installed():
            training.train()
        learned = training.learned()
    for link, scales in training.scales():
        kind = None if stored is None or link.norm_form is None else stored[link.source]
        scale_link(block, link, scales, stored=kind)
    return learned


class _Training:
    def __init__(
        self,
        name: str,
        block: nn.Module,
        trace: BlockTrace,
        layers: Mapping[str, QuantScheme],
        samples: BlockSamples,
        options: FlatQuant,
    ) -> None:
        self._name, self._block, self._samples, self._options = name, block, samples, options
        self._schemes = layers
        self._float = {local: block.get_submodule(local) for local in sorted(layers)}
        self._power = [
            float(samples.target(i).float().square().mean()) for i in range(len(samples))
        ]
        peaks = self._input_peaks()
        self._links: list[tuple[Link, SharedInput]] = []
        self._shared: dict[str, SharedInput] = {}
        for group in trace.groups:
            members = [local for local in group if local in layers and local in peaks]
            if members:
                link = _link_of(trace.links, members)
                shared = self._share(members, peaks[members[0]], link)
                self._shared |= dict.fromkeys(members, shared)
                if link is not None:
                    self._links.append((link, shared))
        self._linears = {
            local: TrainedLinear(self._float[local], self._weight_scheme(local), shared)
            for local, shared in self._shared.items()
        }
        everything: list[Any] = [*dict.fromkeys(self._shared.values()), *self._linears.values()]
        self._modules = nn.ModuleList(everything).to(samples.target(0).device)
        self._losses: tuple[float, float] = (0.0, 0.0)
        self._epochs = 0

    def _input_peaks(self) -> dict[str, torch.Tensor]:
        """Return the largest magnitude of each input channel of the layers that are run."""
        peaks: dict[str, torch.Tensor] = {}

        def hook(local: str) -> Any:
            def watch(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                x = inputs[0]
                if x.numel():
                    peak = x.detach().float().abs().reshape(-1, x.shape[-1]).amax(dim=0)
                    peaks[local] = torch.maximum(peaks.get(local, peak), peak)

            return watch

        handles = [
            module.register_forward_pre_hook(hook(local)) for local, module in self._float.items()
        ]
        try:
            with torch.no_grad():
                for batch in range(len(self._samples)):
                    self._samples.run(self._block, batch)
        finally:
            for handle in handles:
                handle.remove()
        return peaks

    def _share(self, members: Sequence[str], peak: torch.Tensor, link: Link | None) -> SharedInput:
        seed = self._options.seed + self._samples.index
        scheme = self._schemes[members[0]].activation
        assert scheme is not None  # narrowing: only schemes of transforms are trained
        if link is None:
            return SharedInput(len(peak), scheme, seed)
        weights = [weight_of(self._float[local]).float().abs().amax(dim=0) for local in members]
        scales = smooth_scales(peak, torch.stack(weights).amax(dim=0), self._options.alpha)
        index = link.targets[0].index.to(peak.device)
        return SharedInput(len(peak), scheme, seed, link.to_source(scales), index)

    def _weight_scheme(self, local: str) -> TensorScheme:
        scheme = self._schemes[local].weight
        assert scheme is not None  # narrowing: only quantized layers are trained
        return scheme

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the layers in training into the block for the time being."""
        try:
            for local, linear in self._linears.items():
                _put(self._block, local, linear)
            yield
        finally:
            for local in self._linears:
                _put(self._block, local, self._float[local])

    def train(self) -> None:
        """Train, and take the parameters with which the loss was smallest."""
        started = self._state()
        for shared in self._shared.values():
            shared.become_plain()
        for linear in self._linears.values():
            linear.become_plain()
        plain = best = self._measured()
        kept = self._state()
        self._modules.load_state_dict(started)
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
        self._modules.load_state_dict(kept)
        self._refresh()
        self._losses = plain, best

    def _better(
        self, loss: float, best: float, kept: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the smallest loss so far, and the parameters that gave it."""
        return (loss, self._state()) if loss < best else (best, kept)

    def _epoch(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for batch in range(len(self._samples)):
            self._refresh()
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
            self._refresh()
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
        clips: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self._modules.named_parameters():
            if parameter.requires_grad:
                (clips if name.endswith("clip") else others).append(parameter)
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

    def _refresh(self) -> None:
        for shared in dict.fromkeys(self._shared.values()):
            shared.refresh()

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self._modules.state_dict().items()}

    def learned(self) -> dict[str, LearnedTransform]:
        """Return what was learned of each layer."""
        before, after = self._losses
        return {
            local: LearnedTransform(
                left=self._shared[local].matrices[0].detach(),
                right=self._shared[local].matrices[1].detach(),
                clip_ratio=torch.sigmoid(self._shared[local].clip.detach()),
                row_clip=torch.sigmoid(linear.clip.detach()),
                loss_before=before,
                loss_after=after,
                epochs=self._epochs,
            )
            for local, linear in self._linears.items()
        }

    def scales(self) -> Iterator[tuple[Link, torch.Tensor]]:
        """Yield the links whose channels have learned scales, and the scales."""
        for link, shared in self._links:
            assert shared.log_scales is not None
            yield link, shared.log_scales.detach().exp()


def _link_of(links: Sequence[Link], members: Sequence[str]) -> Link | None:
    """Return the link whose readers are just these layers."""
    return next((link for link in links if set(link.target_names) == set(members)), None)


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


def _put(block: nn.Module, local: str, module: nn.Module) -> None:
    parent, _, leaf = local.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
