"""What is trained of one decoder block, and how it takes part in the block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.scheme import QuantScheme, TensorScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.flatquant.linear import SharedInput, TrainedLinear
from slim_ptq.methods.flatquant import FlatQuant
from slim_ptq.methods.learned import LearnedTransform
from slim_ptq.structure import BlockTrace, Link, weight_of
from slim_ptq.transforms.smooth import smooth_scales


class TrainedBlock:
    """The transforms, channel scales and clip ratios of a decoder block.

    Parameters
    ----------
    block : nn.Module
        In floating point.
    trace : BlockTrace
        Which layers read one tensor, and what produces it.
    layers : mapping
        How the layers to train, by their local names, will be quantized.
    samples : BlockSamples
        On which the layers are run once, to begin with scales that suit their inputs.
    options : FlatQuant
        Seed and share of the activation in the scales.
    """

    def __init__(
        self,
        block: nn.Module,
        trace: BlockTrace,
        layers: Mapping[str, QuantScheme],
        samples: BlockSamples,
        options: FlatQuant,
    ) -> None:
        self._block, self._samples, self._options = block, samples, options
        self._schemes = layers
        self._float = {local: block.get_submodule(local) for local in sorted(layers)}
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

    def become_plain(self) -> None:
        """Go back to identities, no scales and no clipping: plain rounding."""
        for shared in self._shared.values():
            shared.become_plain()
        for linear in self._linears.values():
            linear.become_plain()

    def refresh(self) -> None:
        """Compute the matrices of the parameters as they are now."""
        for shared in dict.fromkeys(self._shared.values()):
            shared.refresh()

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the clip ratios that are trained, and all else that is."""
        clips: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self._modules.named_parameters():
            if parameter.requires_grad:
                (clips if name.endswith("clip") else others).append(parameter)
        return clips, others

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the parameters for :meth:`load_state`."""
        return {name: value.clone() for name, value in self._modules.state_dict().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take parameters back."""
        self._modules.load_state_dict(state)

    def learned(self, before: float, after: float, epochs: int) -> dict[str, LearnedTransform]:
        """Return what was learned of each layer, with the losses and epochs that it took."""
        return {
            local: LearnedTransform(
                left=self._shared[local].matrices[0].detach(),
                right=self._shared[local].matrices[1].detach(),
                clip_ratio=torch.sigmoid(self._shared[local].clip.detach()),
                row_clip=torch.sigmoid(linear.clip.detach()),
                loss_before=before,
                loss_after=after,
                epochs=epochs,
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


def _put(block: nn.Module, local: str, module: nn.Module) -> None:
    parent, _, leaf = local.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
