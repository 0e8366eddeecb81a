"""Accuracy targets as a user writes them: ``ppl+1%``, ``ppl<=24.5``, ``accuracy-0.5%``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slim_core.errors import InvalidValueError
from slim_core.validate import check_type

_FORM = re.compile(r"\s*(ppl|perplexity|acc|accuracy)\s*(\+|-|<=|>=)\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*")
_LOWER_IS_BETTER = {"ppl": True, "perplexity": True, "acc": False, "accuracy": False}


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one number of a quantized model.

    Parameters
    ----------
    metric : str
        ``perplexity`` or ``accuracy``.
    amount : float
        How much worse than the float model, or the bound itself.
    relative : bool
        ``amount`` is a share of the value of the float model.
    absolute : bool
        ``amount`` is the bound itself.
    """

    metric: str
    amount: float
    relative: bool = False
    absolute: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target.

        ``ppl+1%`` is at most one hundredth above the float model, ``ppl+0.2`` at most 0.2 above,
        ``ppl<=24.5`` at most 24.5; ``accuracy-1%``, ``accuracy-0.01`` and ``accuracy>=0.7`` alike.

        Raises
        ------
        InvalidTypeError, InvalidValueError
        """
        found = _FORM.fullmatch(check_type("target", text, str))
        if found is None:
            raise InvalidValueError(
                f"target must look like ppl+1%, ppl<=24.5 or accuracy-0.5%, not {text!r:.60}"
            )
        name, sign, number, percent = found.groups()
        lower = _LOWER_IS_BETTER[name]
        metric = "perplexity" if lower else "accuracy"
        if sign not in (("+", "<=") if lower else ("-", ">=")):
            better = "lower" if lower else "higher"
            raise InvalidValueError(
                f"target {text!r}: a {better} {metric} is better, so the sign must be "
                f"{'+ or <=' if lower else '- or >='}"
            )
        absolute = len(sign) == 2
        if absolute and percent:
            raise InvalidValueError(f"target {text!r}: a bound has no %")
        amount = float(number) / (100 if percent else 1)
        return cls(metric, amount, relative=bool(percent), absolute=absolute)

    def bound(self, reference: float) -> float:
        """Return the worst value that still meets the target, given that of the float model."""
        if self.absolute:
            return self.amount
        change = self.amount * reference if self.relative else self.amount
        return reference + change if self.metric == "perplexity" else reference - change

    def met(self, value: float, reference: float) -> bool:
        """Whether a value meets the target."""
        bound = self.bound(reference)
        return value <= bound if self.metric == "perplexity" else value >= bound

    def __str__(self) -> str:
        """Return a text that :meth:`parse` reads."""
        short, worse, at = (
            ("ppl", "+", "<=") if self.metric == "perplexity" else ("accuracy", "-", ">=")
        )
        if self.absolute:
            return f"{short}{at}{self.amount:g}"
        return f"{short}{worse}" + (
            f"{100 * self.amount:g}%" if self.relative else f"{self.amount:g}"
        )
