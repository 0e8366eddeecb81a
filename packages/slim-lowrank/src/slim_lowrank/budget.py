"""What all decomposed layers together may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slim_core.errors import InvalidValueError
from slim_core.validate import check_choice, check_float
from slim_lowrank.ranks import check_ratio

Sensitivity = Literal["auto", "energy", "gradient", "loss"]


@dataclass(frozen=True)
class Budget:
    """What all decomposed layers together may cost; set exactly one of the first three.

    Parameters
    ----------
    params, flops, bytes : float, optional
        Share to keep, within (0, 1), of the weights, multiply-adds or bytes of the layers that the
        decomposer takes.  Multiply-adds of convolutions need a calibration to know image sizes.
    sensitivity : str
        What makes losses of different layers comparable: ``energy`` is the share of each layer's
        output that is lost; ``gradient`` the output error times the mean squared gradient;
        ``loss`` the predicted rise of the loss.  ``auto`` takes ``loss`` where the factors keep the
        loss, else ``gradient`` where gradients were seen, else ``energy``.
    floor : float
        Least share of its weights that every layer keeps, within [0, 1].

    Raises
    ------
    InvalidTypeError, InvalidValueError
        None or several of the costs, or a value out of its range.
    """

    params: float | None = None
    flops: float | None = None
    bytes: float | None = None
    sensitivity: Sensitivity = "auto"
    floor: float = 0.0

    def __post_init__(self) -> None:
        given = [key for key in ("params", "flops", "bytes") if getattr(self, key) is not None]
        if len(given) != 1:
            raise InvalidValueError(
                f"a Budget needs exactly one of params, flops and bytes, not {given or 'none'}"
            )
        check_ratio(given[0], getattr(self, given[0]))
        check_choice("sensitivity", self.sensitivity, ("auto", "energy", "gradient", "loss"))
        check_float("floor", self.floor, low=0.0, high=1.0)

    @property
    def unit(self) -> str:
        """Which cost is limited."""
        return next(key for key in ("params", "flops", "bytes") if getattr(self, key) is not None)

    @property
    def share(self) -> float:
        """Share of it to keep."""
        return float(getattr(self, self.unit))
