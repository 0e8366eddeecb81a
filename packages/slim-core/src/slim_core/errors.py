"""Typed errors of the slim toolkit.

Every error carries a one-line message that names the thing at fault and, where something can be
done about it, a ``hint``.  Errors about arguments also derive from the built-in exception that a
Python user would expect, so ``except ValueError`` keeps working::

    SlimError
    ├── InvalidTypeError       (TypeError)       an argument of the wrong type
    ├── InvalidValueError      (ValueError)      an argument out of its range
    │   ├── RecipeError                          a recipe or configuration file
    │   ├── PatternError                         a layer pattern that matches nothing
    │   └── PlanError                            a job that cannot be done as asked
    ├── CheckpointError        (ValueError)      files that are not the checkpoint they claim to be
    ├── FormatError            (ValueError)      a tensor that an on-disk format cannot hold
    ├── CalibrationError       (ValueError)      calibration data that cannot be used
    ├── NumericalError         (ArithmeticError) NaN or infinity where numbers are needed
    ├── StructureError         (ValueError)      a model whose structure is not understood
    ├── FileSecurityError      (ValueError)      a path that is unsafe to read or to write
    ├── OutputExistsError      (FileExistsError) an output that would be overwritten
    ├── ResumeError            (RuntimeError)    an interrupted run that cannot be taken up again
    ├── DeviceError            (RuntimeError)    a device that is not there
    └── MissingDependencyError (ModuleNotFoundError) an optional package that is not installed
"""

from __future__ import annotations

from collections.abc import Sequence


class SlimError(Exception):
    """Base of all errors raised on purpose by the slim packages.

    Parameters
    ----------
    message : str
        What is wrong, naming the layer, parameter or file at fault.
    hint : str, optional
        What the user can do about it; printed below the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"


class InvalidTypeError(SlimError, TypeError):
    """An argument has the wrong type."""


class InvalidValueError(SlimError, ValueError):
    """An argument has a value outside its range."""


class RecipeError(InvalidValueError):
    """A recipe or configuration file is wrong."""


class PatternError(InvalidValueError):
    """A layer name or pattern matches nothing."""


class PlanError(InvalidValueError):
    """The job cannot be done as asked; lists every reason found.

    Parameters
    ----------
    problems : sequence of str
        One line a problem, each naming its layer.
    """

    def __init__(self, problems: Sequence[str], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"the plan has {count} problem{'s'[: count != 1]}:{lines}", hint=hint)


class CheckpointError(SlimError, ValueError):
    """The files of a checkpoint are missing, damaged or contradict one another."""


class FormatError(SlimError, ValueError):
    """A tensor or layer cannot be held by an on-disk format."""


class CalibrationError(SlimError, ValueError):
    """Calibration data is missing, empty or malformed."""


class NumericalError(SlimError, ArithmeticError):
    """NaN or infinity was found where finite numbers are needed."""


class StructureError(SlimError, ValueError):
    """The structure of a model is not understood."""


class FileSecurityError(SlimError, ValueError):
    """A path is unsafe to read from or to write to."""


class OutputExistsError(SlimError, FileExistsError):
    """The output is there already and would be overwritten."""


class ResumeError(SlimError, RuntimeError):
    """An interrupted run cannot be taken up again: it was another one, or is damaged."""


class DeviceError(SlimError, RuntimeError):
    """The device that was asked for is not there."""


class MissingDependencyError(SlimError, ModuleNotFoundError):
    """An optional package is needed and not installed."""
