"""The result of an analysis: groups of layers, the most sensitive first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import yaml

from slim_core.groups import is_expert, type_group


class Metric(str, Enum):
    """What sensitivity is measured by; a larger number is a more sensitive layer."""

    STD = "std"  # magnitude over standard deviation of the input, as in disable_level
    QUANTILE = "quantile"  # int8 step over the distance of the quartiles of the input
    KURTOSIS = "kurtosis"  # kurtosis of the input
    LAYER_ERROR = "layer_error"  # relative error of the output of the layer alone
    MODEL_ERROR = "model_error"  # divergence of the logits with only this layer quantized


MEANINGS = {
    Metric.STD: "largest magnitude of the input over its standard deviation",
    Metric.QUANTILE: "int8 step over the distance of the quartiles of the input",
    Metric.KURTOSIS: "kurtosis of the input (3 for a normal distribution)",
    Metric.LAYER_ERROR: "relative error of the output of the layer alone",
    Metric.MODEL_ERROR: "KL divergence of the predicted tokens, in nats a token, "
    "with only these layers quantized",
}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Layers that engines run as one, and how sensitive they are.

    Parameters
    ----------
    group : str
        Such as ``model.layers.0.self_attn.qkv``; the name of the layer if it is alone.
    layers : tuple of str
        Names in the checkpoint, as recipes have them.
    modules : tuple of str
        Names in the model, as ``disable_names`` has them.
    scheme : str
        That the layers would be quantized to.
    score : float
        The largest of the layers.
    perplexity : float, optional
        Of the model with only these layers quantized.
    """

    group: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    scheme: str
    score: float
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class Analysis:
    """A ranking, and what it was measured on.

    Parameters
    ----------
    model : str
    scheme : str
    metric : Metric
    data : dict
        Source, samples and tokens.
    groups : tuple of Sensitivity
        The most sensitive first.
    perplexity : float, optional
        Of the float model on the same tokens.
    """

    model: str
    scheme: str
    metric: Metric
    data: dict[str, Any]
    groups: tuple[Sensitivity, ...]
    perplexity: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def top(self, count: int) -> tuple[Sensitivity, ...]:
        """Return the first groups."""
        return self.groups[:count]

    def exclude(self, count: int) -> list[str]:
        """Return the layers of the first groups, as the key ``exclude`` of a recipe takes them.

        The experts of a block are one pattern.
        """
        return [name for group in self.top(count) for name in _listed(group.layers)]

    def disable_names(self, count: int) -> list[str]:
        """Return the layers of the first groups, as ``QuantConfig(disable_names=...)`` has them."""
        return [name for group in self.top(count) for name in _listed(group.modules)]

    def to_dict(self, count: int) -> dict[str, Any]:
        """Return plain values for JSON; the lists of names are those of the first groups.

        A score that is infinite, that of a constant input, is None.
        """
        return {
            "model": self.model,
            "scheme": self.scheme,
            "metric": self.metric.value,
            "data": self.data,
            "perplexity": self.perplexity,
            "groups": [
                {
                    "rank": rank,
                    "group": item.group,
                    "layers": list(item.layers),
                    "scheme": item.scheme,
                    "score": item.score if math.isfinite(item.score) else None,
                    "perplexity": item.perplexity,
                }
                for rank, item in enumerate(self.groups, 1)
            ],
            "exclude": self.exclude(count),
            "disable_names": self.disable_names(count),
            "provenance": self.provenance,
        }


def _listed(names: Sequence[str]) -> list[str]:
    """Return the names, those of experts as one pattern for all of them."""
    return list(dict.fromkeys(f"{type_group(n)}.*" if is_expert(n) else n for n in names))


def as_yaml(exclude: Sequence[str]) -> str:
    """Return the lines of a recipe that leave these layers in floating point."""
    return str(yaml.safe_dump({"exclude": list(exclude)}, sort_keys=False, width=1000))


def as_python(disable_names: Sequence[str]) -> str:
    """Return the argument of ``QuantConfig`` that leaves these layers in floating point."""
    lines = "".join(f"    {json.dumps(name)},\n" for name in disable_names)
    return f"disable_names = [\n{lines}]\n"
