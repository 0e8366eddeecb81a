"""From the ``smooth`` entry of a recipe to the method that it names."""

from __future__ import annotations

from typing import Any

from slim_core.recipe import Smooth, SmoothMethod
from slim_ptq.structure import LinkKind
from slim_ptq.transforms.alpha_search import AlphaSearch
from slim_ptq.transforms.awq import BlockAwq
from slim_ptq.transforms.base import ScaleMethod
from slim_ptq.transforms.cbq import CbqSmooth
from slim_ptq.transforms.flex import FlexSmooth
from slim_ptq.transforms.smooth import IterativeSmooth, SmoothQuant
from slim_ptq.transforms.threshold import ThresholdSmooth

_METHODS: dict[SmoothMethod, Any] = {
    SmoothMethod.SMOOTHQUANT: SmoothQuant,
    SmoothMethod.THRESHOLD: ThresholdSmooth,
    SmoothMethod.AWQ: BlockAwq,
    SmoothMethod.ITERATIVE: IterativeSmooth,
    SmoothMethod.CBQ: CbqSmooth,
    SmoothMethod.FLEX: FlexSmooth,
    SmoothMethod.ALPHA_SEARCH: AlphaSearch,
}


def scale_method(smooth: Smooth) -> ScaleMethod:
    """Return the method of a recipe, with the method's own value for what the recipe leaves out."""
    options = {name: getattr(smooth, name) for name in ("alpha", "beta", "shift")}
    if smooth.links is not None:
        options["kinds"] = frozenset(LinkKind(link.value) for link in smooth.links)
    given = {name: value for name, value in options.items() if value is not None}
    method: ScaleMethod = _METHODS[smooth.method](**given)
    return method
