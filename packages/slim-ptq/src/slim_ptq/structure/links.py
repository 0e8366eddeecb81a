"""Links: pairs of producer and readers between which a positive scale can be moved."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from slim_core.errors import InvalidValueError


class LinkKind(enum.Enum):
    """What the channels of a link pass through between producer and readers."""

    NORM_LINEAR = "norm->linear"
    V_O = "v->o"
    UP_DOWN = "up->down"


class NormForm(enum.Enum):
    """How a norm uses its weight: ``y = w * x + b``, or Gemma's ``y = (1 + w) * x + b``."""

    PLAIN = "w"
    ONE_PLUS = "1+w"


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that reads the channels of a link.

    Parameters
    ----------
    name : str
        Local name of the module, a linear layer or a router.
    parameter : str
        Name of its weight parameter.
    axis : int
        Dimension of the weight that runs over input channels: 1, or 0 for Conv1D.
    index : torch.Tensor
        int64 ``[in_features]``: the producer's channel that each input channel carries.
    """

    name: str
    parameter: str
    axis: int
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class Link:
    """A producer whose channels can be divided by a scale that its readers multiply back.

    Parameters
    ----------
    kind : LinkKind
        What lies between.
    source : str
        Local name of the norm or linear layer that produces the channels.
    targets : tuple of Target
        Everything that reads them.
    width : int
        Number of channels that the source produces.
    norm_form : NormForm or None
        Parametrisation of the norm; None for other sources.
    direct : bool
        Whether every reader reads the output of the source itself, nothing computed from it: then
        a constant that is taken off the source can be made up for in the biases of the readers.
    """

    kind: LinkKind
    source: str
    targets: tuple[Target, ...]
    width: int
    norm_form: NormForm | None = None
    direct: bool = False

    @property
    def target_names(self) -> tuple[str, ...]:
        """Local names of the readers."""
        return tuple(target.name for target in self.targets)

    @property
    def channels(self) -> torch.Tensor:
        """The producer's channels that may be scaled, int64, ascending."""
        carried: torch.Tensor = torch.unique(torch.cat([t.index for t in self.targets]))
        return carried

    @property
    def repeat(self) -> int:
        """How many input channels of a reader carry the same channel: the GQA group size."""
        return int(torch.bincount(self.targets[0].index).max())

    def to_source(self, values: torch.Tensor, how: str = "mean") -> torch.Tensor:
        """Bring values a reader's input channel to values a producer's channel.

        Parameters
        ----------
        values : torch.Tensor
            ``[in_features]`` of the first target.
        how : {"mean", "max"}
            What becomes of several input channels that carry the same channel.

        Returns
        -------
        torch.Tensor
            ``[width]``, one where no reader reads.
        """
        index: torch.Tensor = self.targets[0].index.to(values.device)
        if values.shape != index.shape:
            raise InvalidValueError(
                f"values for the link from {self.source} must have shape {tuple(index.shape)}, "
                f"not {tuple(values.shape)}"
            )
        if how not in ("mean", "max"):
            raise InvalidValueError(f"how must be 'mean' or 'max', not {how!r}")
        reduce = "mean" if how == "mean" else "amax"
        out = torch.ones(self.width, dtype=values.dtype, device=values.device)
        return out.scatter_reduce(0, index, values, reduce, include_self=False)


@dataclass(frozen=True, eq=False)
class RejectedLink:
    """A candidate that is not used, and why."""

    link: Link
    reason: str
