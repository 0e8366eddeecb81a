"""Observers: what a statically quantized activation needs to remember of its calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from slim_core.dtypes import IntType
from slim_core.errors import CalibrationError
from slim_core.numerics import affine_params
from slim_core.scheme import TensorScheme


class Observer(ABC):
    """Watches the tensors that enter a layer and chooses one range for all their elements."""

    samples = 0  # how many tensors with elements came

    def update(self, x: torch.Tensor) -> None:
        """Take in one sample: a tensor of any shape with finite elements, or an empty one."""
        if x.numel():
            self.samples += 1
            self._add(x.detach())

    def update_rows(self, x: torch.Tensor) -> None:
        """Take in each entry of the first axis as a sample of its own."""
        for row in x:
            self.update(row)

    def merge(self, other: Observer) -> None:
        """Take in what another observer of the same kind has seen of later samples."""
        if other.samples:
            self.samples += other.samples
            self._join(other)

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the low and high end of the range, float32, shape (1,).

        Raises
        ------
        CalibrationError
            No sample came.
        """
        if not self.samples:
            raise CalibrationError(
                "no calibration sample reached the layer",
                hint="an expert that no token is routed to needs more or other calibration data",
            )
        return self._range()

    @abstractmethod
    def _add(self, x: torch.Tensor) -> None:
        """Take in one sample with elements."""

    @abstractmethod
    def _join(self, other: Any) -> None:
        """Take in the samples of another observer of the same class, which has some."""

    @abstractmethod
    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range, after at least one sample."""

    def params(
        self, scheme: TensorScheme, storage: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset, float32, shape (1,).

        The scale is rounded to ``storage`` first, since engines keep it in the dtype of the model;
        the offset belongs to the rounded scale.
        """
        low, high = self.bounds()
        scale, _ = affine_params(low, high, scheme)
        rounded = scale.to(storage).float()
        scale = torch.where(torch.isfinite(rounded) & (rounded > 0), rounded, scale)
        if scheme.symmetric:
            return scale, torch.zeros_like(scale)
        dtype = scheme.dtype
        assert isinstance(dtype, IntType)  # narrowing: fixed ranges are those of integers
        offset = torch.round(-low.clamp(max=0) / scale) + dtype.min
        return scale, offset.clamp(dtype.min, dtype.max)
