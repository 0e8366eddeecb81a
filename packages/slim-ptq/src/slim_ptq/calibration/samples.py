"""Calibration samples of the classic interface: lists or dicts of tensors, fed to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.errors import CalibrationError, InvalidTypeError, SlimError
from slim_core.progress import track
from slim_ptq.offload import input_device
from slim_ptq.structure import named_sample

Sample = list[Any] | dict[str, Any]


def check_samples(name: str, value: Any) -> list[Sample]:
    """Require a list of lists or dicts and return it; None stands for an empty list.

    Raises
    ------
    InvalidTypeError
        The list or an element has another type.
    CalibrationError
        A sample is empty, or a tensor in it has no elements.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidTypeError(f"{name} must be list, not {type(value).__name__}")
    for index, sample in enumerate(value):
        if not isinstance(sample, (list, dict)):
            raise InvalidTypeError(
                f"{name}[{index}] must be list or dict, not {type(sample).__name__}"
            )
        items = list(sample.values() if isinstance(sample, dict) else sample)
        if not items:
            raise CalibrationError(f"{name}[{index}] is empty")
        if any(isinstance(item, torch.Tensor) and item.numel() == 0 for item in items):
            raise CalibrationError(f"{name}[{index}] holds a tensor without elements")
    return value


def feed(model: nn.Module, samples: Sequence[Sample], description: str) -> Iterator[int]:
    """Call the model on each sample, without gradients, and yield the number of the sample.

    Raises
    ------
    CalibrationError
        The model does not take the sample: a wrong argument, a token that it does not know.
    """
    for index, given in enumerate(track(samples, description)):
        with torch.no_grad():
            run_sample(model, index, given)
        yield index


def run_sample(model: nn.Module, index: int, given: Sample) -> None:
    """Call the model on the sample of a number; :func:`feed` without gradients switched off."""
    device = input_device(model)
    sample = named_sample(model, given)
    try:
        if isinstance(sample, dict):
            model(**{key: _to(value, device) for key, value in sample.items()})
        else:
            model(*(_to(value, device) for value in sample))
    except SlimError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(
            f"calib_data[{index}]: {type(model).__name__} cannot run on it: {error}",
            hint="a list is called as model(*sample), a dict as model(**sample)",
        ) from error


def shortest(samples: Sequence[Sample]) -> tuple[int, Sample]:
    """Return the number of the sample with the fewest elements, and the sample."""
    return min(enumerate(samples), key=lambda item: _elements(item[1]))


def _elements(sample: Sample) -> int:
    items = sample.values() if isinstance(sample, dict) else sample
    return sum(item.numel() for item in items if isinstance(item, torch.Tensor))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
