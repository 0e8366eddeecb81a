"""What FlatQuant has learned of one layer: the transform of its input, and where to clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slim_core.kronecker import transform_input


@dataclass(frozen=True, slots=True, eq=False)
class LearnedTransform:
    """The Kronecker factors and clip ratios of a layer (:mod:`slim_core.kronecker`).

    Parameters
    ----------
    left : torch.Tensor
        float32, shape (a, a), invertible.
    right : torch.Tensor
        float32, shape (b, b), invertible; the layer has ``a * b`` input channels.
    clip_ratio : torch.Tensor
        float32, shape (1,), in (0, 1]: share of the largest magnitude of a token that is kept.
    row_clip : torch.Tensor
        float32, shape (out, 1), in (0, 1]: the same of the rows of the transformed weight.
    loss_before, loss_after : float
        Mean squared error of the output of the block, relative to its mean square, with identity
        transforms and as trained.
    epochs : int
        Passes over the calibration data that were made.
    """

    left: torch.Tensor
    right: torch.Tensor
    clip_ratio: torch.Tensor
    row_clip: torch.Tensor
    loss_before: float
    loss_after: float
    epochs: int

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, (out, in), for inputs that are transformed: the inverse is in it."""
        left, right = (
            torch.linalg.inv(factor.double()).T.to(weight) for factor in (self.left, self.right)
        )
        moved: torch.Tensor = transform_input(weight, left, right)
        return moved

    def hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """Return the mean of ``x xᵀ`` of transformed inputs from that of the inputs."""
        for _ in range(2):
            hessian = transform_input(hessian, self.left, self.right).T.contiguous()
        return hessian

    def extras(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer under their names on disk."""
        return {
            "left_trans": self.left,
            "right_trans": self.right,
            "clip_ratio": self.clip_ratio,
        }
