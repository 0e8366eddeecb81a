"""Linear layers in training: their inputs and weights are transformed and rounded."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from slim_core.kronecker import transform_input
from slim_core.microscaling import round_groups
from slim_core.numerics import EPS
from slim_core.scheme import ScaleKind, TensorScheme
from slim_ptq.flatquant.transform import Kronecker
from slim_ptq.structure import bias_of, weight_of

_OPEN = 30.0  # whose sigmoid is one in float32
_WEIGHT_CLIP, _INPUT_CLIP = 4.0, 4.0  # to begin with, before the sigmoid


class SharedInput(nn.Module):
    """What layers that read one tensor share: its transform, channel scales and clip ratio.

    Parameters
    ----------
    channels : int
    scheme : TensorScheme
        Of the activations.
    seed : int
        Of the rotations to begin with.
    scales : torch.Tensor, optional
        float32: the channel scales to begin with, one for each channel of the module that
        produces the tensor; no scales are trained if not given.
    index : torch.Tensor, optional
        int64, shape (channels,): which of them each input channel has.
    """

    index: torch.Tensor | None

    def __init__(
        self,
        channels: int,
        scheme: TensorScheme,
        seed: int,
        scales: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.transform = Kronecker(channels, seed)
        self.clip = _clip(torch.tensor([_INPUT_CLIP]), scheme)
        self._scheme = scheme
        self.log_scales = None if scales is None else nn.Parameter(scales.log())
        self.register_buffer("index", index)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Compute the matrices of the parameters as they are now."""
        left, left_inverse = self.transform.left()
        right, right_inverse = self.transform.right()
        self.matrices = left, right
        self._inverses = left_inverse, right_inverse
        self._seen = None

    def become_plain(self) -> None:
        """Go back to no transform, no scales and no clipping."""
        self.transform.become_identity()
        with torch.no_grad():
            self.clip.fill_(_OPEN)
            if self.log_scales is not None:
                self.log_scales.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input as the engine multiplies it, float32; computed once for all readers."""
        if self._seen is None or self._seen[0] is not x:
            moved = transform_input(x.float() / self._channel_scales(), *self.matrices)
            self._seen = x, fake_round(moved, torch.sigmoid(self.clip), self._scheme)
        return self._seen[1]

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, (out, in), with the inverse of the transform in it."""
        moved: torch.Tensor = transform_input(weight * self._channel_scales(), *self._inverses)
        return moved

    def _channel_scales(self) -> torch.Tensor | float:
        return 1.0 if self.log_scales is None else self.log_scales.exp()[self.index]


class TrainedLinear(nn.Module):
    """A linear layer as it will be when it is quantized, differentiable.

    Parameters
    ----------
    linear : nn.Module
        ``nn.Linear`` or Conv1D.
    scheme : TensorScheme
        Of the weight.
    shared : SharedInput
        Registered by whoever trains it, since it has several readers.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Module, scheme: TensorScheme, shared: SharedInput) -> None:
        super().__init__()
        weight = weight_of(linear)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias_of(linear))
        clip = torch.full((len(weight), 1), _WEIGHT_CLIP, device=weight.device)
        self.clip = _clip(clip, scheme)
        self._scheme = scheme
        self._shared = (shared,)

    def become_plain(self) -> None:
        """Go back to no clipping."""
        with torch.no_grad():
            self.clip.fill_(_OPEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for ``x`` of shape (..., in), in the dtype of ``x``."""
        shared = self._shared[0]
        moved = shared.weight(self.weight.float())
        weight = fake_round(moved, torch.sigmoid(self.clip), self._scheme)
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(shared(x), weight, bias).to(x.dtype)


def fake_round(x: torch.Tensor, ratio: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Round as a scheme does; the gradient passes as if that were not there (arXiv:1308.3432).

    Integers: each vector of the last axis symmetrically, clipped to ``ratio`` of its peak, as
    :func:`slim_core.numerics.quantize_per_token` does.  Groups that share a power of two are
    :func:`slim_core.microscaling.round_groups` and know no ratio.
    """
    if scheme.scales is ScaleKind.E8M0:
        plain = x.detach()
        change: torch.Tensor = round_groups(plain, scheme) - plain
        return x + change
    dtype = scheme.dtype
    peak = x.abs().amax(dim=-1, keepdim=True) * ratio
    scale = (peak / dtype.max).clamp(min=EPS)
    levels = x / scale
    rounded = levels + (levels.round() - levels).detach()
    return rounded.clamp(-dtype.max - 1, dtype.max) * scale


def _clip(start: torch.Tensor, scheme: TensorScheme) -> nn.Parameter:
    """Return clip ratios before the sigmoid; powers of two for scales leave none to learn."""
    if scheme.scales is ScaleKind.E8M0:
        return nn.Parameter(torch.full_like(start, _OPEN), requires_grad=False)
    return nn.Parameter(start)
