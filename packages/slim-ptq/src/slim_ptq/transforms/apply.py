"""Moving scales over links: function-preserving edits of the weights of one block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from slim_core.errors import InvalidValueError, NumericalError
from slim_ptq.structure import Link, NormForm
from slim_ptq.structure.linears import is_conv1d


class Edit(NamedTuple):
    """A parameter of a module and what it shall become."""

    module: str
    parameter: torch.Tensor
    value: torch.Tensor


def scale_link(block: nn.Module, link: Link, scales: torch.Tensor) -> torch.Tensor:
    """Divide the channels of a link's source by ``scales`` and multiply its readers' columns.

    Everything is computed in float32 (float64 for such weights) and rounded once to the dtype of
    each parameter.  A norm's new weight is rounded first, and the readers get the scale that this
    makes, so that in half precision only their own rounding remains.

    Parameters
    ----------
    block : nn.Module
        The block that the link was traced in; changed in place.
    link : Link
        A proved link.
    scales : torch.Tensor
        ``[link.width]``, positive, one for channels outside ``link.channels``.

    Returns
    -------
    torch.Tensor
        The scales that took effect, ``[link.width]``, float32 or float64.

    Raises
    ------
    InvalidValueError
        ``scales`` has another shape, is not positive and finite, or touches other channels.
    NumericalError
        A scaled weight is too large for its dtype; nothing is changed then.
    """
    _check(link, scales)
    source = block.get_submodule(link.source)
    edits, effective = _source_edits(source, link, scales)
    with torch.no_grad():
        for target in link.targets:
            parameter = block.get_submodule(target.name).get_parameter(target.parameter)
            factor = effective[target.index.to(effective.device)].to(parameter.device)
            columns = factor if target.axis == 1 else factor[:, None]
            edits.append(Edit(target.name, parameter, _work(parameter) * columns))
        rounded = [Edit(name, p, value.to(p.dtype)) for name, p, value in edits]
        for name, _, value in rounded:
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(
                    f"smoothing {link.source} makes the weight of {name} infinite in {value.dtype}"
                )
        for edit in rounded:
            edit.parameter.copy_(edit.value)
    return effective


@contextlib.contextmanager
def scaled(block: nn.Module, link: Link, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """Apply :func:`scale_link` and put back the very same weights at the end."""
    names = [link.source, *link.target_names]
    saved = [
        (parameter, parameter.detach().clone())
        for name in dict.fromkeys(names)
        for parameter in block.get_submodule(name).parameters(recurse=False)
    ]
    try:
        yield scale_link(block, link, scales)
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _check(link: Link, scales: torch.Tensor) -> None:
    if scales.shape != (link.width,):
        raise InvalidValueError(
            f"scales for the link from {link.source} must have shape ({link.width},), "
            f"not {tuple(scales.shape)}"
        )
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise InvalidValueError(f"scales for {link.source} must be positive and finite")
    outside = torch.ones(link.width, dtype=torch.bool)
    outside[link.channels.cpu()] = False
    if bool((scales.detach().cpu()[outside] != 1).any()):
        raise InvalidValueError(f"scales for {link.source} touch channels that are not linked")


def _work(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return value if value.dtype == torch.float64 else value.float()


def _source_edits(
    source: nn.Module, link: Link, scales: torch.Tensor
) -> tuple[list[Edit], torch.Tensor]:
    """Return the new parameters of the source, and the scales that they stand for."""
    weight = source.get_parameter("weight")
    bias = getattr(source, "bias", None)
    values = _work(weight)
    scales = scales.to(values.device, values.dtype)
    if link.norm_form is not None:
        shift = 1.0 if link.norm_form is NormForm.ONE_PLUS else 0.0
        new = (values + shift) / scales - shift
        kept = new.to(weight.dtype).to(values.dtype) + shift
        scales = torch.where(kept * values.add(shift) > 0, values.add(shift) / kept, scales)
    else:
        new = values / (scales if is_conv1d(source) else scales[:, None])
    edits = [Edit(link.source, weight, new)]
    if bias is not None:
        edits.append(Edit(link.source, bias, _work(bias) / scales))
    return edits, scales
