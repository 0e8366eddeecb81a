"""Linear layers in training: their inputs and weights are transformed and rounded."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from slim_core.dtypes import INT4
from slim_core.kronecker import transform_input
from slim_core.numerics import EPS
from slim_ptq.flatquant.transform import Kronecker
from slim_ptq.structure import bias_of, weight_of

_OPEN = 30.0  # whose sigmoid is one in float32
_WEIGHT_CLIP, _INPUT_CLIP = 4.0, 4.0  # to begin with, before the sigmoid


class SharedInput(nn.Module):
    """What layers that read one tensor share: its transform, channel scales and clip ratio.

    Parameters
    ----------
    channels : int
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
        seed: int,
        scales: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.transform = Kronecker(channels, seed)
        self.clip = nn.Parameter(torch.tensor([_INPUT_CLIP]))
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
            self._seen = x, fake_round(moved, torch.sigmoid(self.clip))
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
    shared : SharedInput
        Registered by whoever trains it, since it has several readers.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Module, shared: SharedInput) -> None:
        super().__init__()
        weight = weight_of(linear)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias_of(linear))
        clip = torch.full((len(weight), 1), _WEIGHT_CLIP, device=weight.device)
        self.clip = nn.Parameter(clip)
        self._shared = (shared,)

    def become_plain(self) -> None:
        """Go back to no clipping."""
        with torch.no_grad():
            self.clip.fill_(_OPEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for ``x`` of shape (..., in), in the dtype of ``x``."""
        shared = self._shared[0]
        weight = fake_round(shared.weight(self.weight.float()), torch.sigmoid(self.clip))
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(shared(x), weight, bias).to(x.dtype)


def fake_round(x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Round each vector of the last axis to int4 symmetrically, clipped to a share of its peak.

    The values are those of :func:`slim_core.numerics.quantize_per_token`; the gradient passes
    rounding as if it were not there (arXiv:1308.3432).
    """
    peak = x.abs().amax(dim=-1, keepdim=True) * ratio
    scale = (peak / INT4.max).clamp(min=EPS)
    levels = x / scale
    rounded = levels + (levels.round() - levels).detach()
    return rounded.clamp(INT4.min, INT4.max) * scale
