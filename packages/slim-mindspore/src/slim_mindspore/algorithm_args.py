"""Options of the algorithms, as they stand in ``algorithm_args``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SmoothArgs(_Options):
    """Smoothing: ``alpha`` is the share of the activation in the migration."""

    alpha: Share = 0.5


class GptqArgs(_Options):
    """GPTQ.

    Parameters
    ----------
    block_size : int
        Columns quantized before the rest is updated; 0 for all at once.
    desc_act : bool
        Take the columns of the largest inputs first.
    damp_percent : float
        Added to the diagonal of the Hessian, as a share of its mean.
    static_groups : bool
        Find the scales of all groups before any column is changed.
    """

    block_size: Annotated[int, Field(ge=0)] = 128
    desc_act: bool = False
    damp_percent: Share = 0.01
    static_groups: bool = False


class AwqArgs(_Options):
    """AWQ.

    Parameters
    ----------
    duo_scaling : bool
        Whether weights have a part in the scales.
    smooth_alpha : list of float or float
        Exponents to try.
    weight_clip_ratio : list of float or float
        Shares of the range to try; ``1`` alone keeps the whole range.
    """

    duo_scaling: bool = True
    smooth_alpha: list[Share] | Share = [i / 20 for i in range(20)]
    weight_clip_ratio: (
        list[Annotated[float, Field(gt=0.0, le=1.0)]] | Annotated[float, Field(gt=0.0, le=1.0)]
    ) = [1 - i / 20 for i in range(10)]

    @property
    def alphas(self) -> list[float]:
        """The exponents to try."""
        return self.smooth_alpha if isinstance(self.smooth_alpha, list) else [self.smooth_alpha]

    @property
    def ratios(self) -> list[float]:
        """The shares of the range to try."""
        given = self.weight_clip_ratio
        return given if isinstance(given, list) else [given]

    def unscaled(self) -> AwqArgs:
        """Return options that leave input channels as they are and try the ranges only."""
        ratios = self.weight_clip_ratio
        return AwqArgs(duo_scaling=False, smooth_alpha=0.0, weight_clip_ratio=ratios)
