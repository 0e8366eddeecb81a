"""Outlier suppression within the blockwise pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from slim_core.checkpoint import Checkpoint
from slim_core.errors import NumericalError
from slim_core.export import CheckpointExport
from slim_core.formats import ASCEND_FORMATS
from slim_core.logging import get_logger
from slim_core.matching import match_all
from slim_core.plan import LayerPlan, Plan
from slim_core.quantized import ADDED_NORM_BIAS
from slim_core.recipe import Smooth
from slim_ptq.inventory import Inventory
from slim_ptq.norm_entries import norm_entries
from slim_ptq.pipeline.blocks import BlockRunner
from slim_ptq.structure import is_linear, trace_block
from slim_ptq.tensors import from_numpy, to_numpy
from slim_ptq.transforms import (
    BlockData,
    LinkStatistics,
    added_biases,
    choose_links,
    scale_method,
    suppress_block,
    wrapped_norms,
)

_log = get_logger("ptq")


def excluded_layers(smooth: Smooth, plan: Plan) -> frozenset[str]:
    """Return the names in the checkpoint of the layers whose links are left alone.

    Raises
    ------
    PatternError
        A pattern matches no layer; names the nearest ones.
    """
    names = [layer.name for layer in plan.layers]
    hits = match_all("smooth.exclude", smooth.exclude, names)
    return frozenset(name for found in hits.values() for name in found)


class BlockSmoother:
    """Smooths the blocks of a model one by one and writes what that adds to the checkpoint.

    Parameters
    ----------
    smooth : Smooth
    checkpoint, inventory, plan
        The model and what will be done to it.

    Raises
    ------
    PatternError
        A pattern of ``smooth.exclude`` matches no layer.
    """

    def __init__(
        self,
        smooth: Smooth,
        checkpoint: Checkpoint,
        inventory: Inventory,
        plan: Plan,
    ) -> None:
        self._method = scale_method(smooth)
        self._excluded = excluded_layers(smooth, plan)
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._plan = plan
        self._added: list[str] = []

    def smooth(
        self, runner: BlockRunner, block: nn.Module, index: int, layers: Mapping[str, LayerPlan]
    ) -> None:
        """Move activation outliers of a block into its weights; its output stays what it is.

        Parameters
        ----------
        layers : mapping
            Planned layers of the block by their local names; those that stay in floating point
            have no say in the scales.

        Raises
        ------
        NumericalError
            A weight or an activation has NaN or infinity; names the layer or the block.
        """
        name = self._inventory.blocks[index]
        try:
            trace = trace_block(block, *runner.example(index))
        except NumericalError as error:
            raise NumericalError(f"{name}: {error.message}", hint=error.hint) from error
        barred = {
            local: f"{plan.name} is in smooth.exclude"
            for local, plan in layers.items()
            if plan.name in self._excluded
        }
        links, left = choose_links(trace, self._method.kinds, barred)
        statistics = LinkStatistics(block, links, tokens=self._method.tokens, prefix=name)
        with statistics:
            runner.look(block, index)
        statistics.of = {name: runner.team.merged(seen) for name, seen in statistics.of.items()}
        done, others = suppress_block(
            block,
            links,
            statistics,
            self._method,
            {local: plan.scheme for local, plan in layers.items()},
            prefix=name,
            can_add=self._plan.format in ASCEND_FORMATS,
            stored={link.source: self._stored(f"{name}.{link.source}.weight") for link in links},
            data=BlockData(
                runner.samples(block, index),
                {local: plan.method for local, plan in layers.items()},
                runner.team,
            ),
        )
        for item in (*left, *others):
            _log.warning("not smoothed: %s.%s: %s", name, item.source, item.reason)
        for link in done:
            if link.unshifted:
                _log.warning("not shifted: %s.%s: %s", name, link.source, link.unshifted)

    def write(self, export: CheckpointExport, block: nn.Module, index: int) -> None:
        """Write what engines look for beside the own parameters of the norms of a block."""
        name = self._inventory.blocks[index]
        for local in added_biases(block):
            if not is_linear(block.get_submodule(local)):
                self._added.append(self._inventory.rename(f"{name}.{local}.bias"))
        if self._plan.format != "safe_tensor":
            return
        for local in sorted(wrapped_norms(block)):
            parameter = f"{name}.{local}.weight"
            saved = self._inventory.rename(parameter).removesuffix(".weight")
            for entry in norm_entries(saved, block.get_submodule(local), copies=True):
                assert entry.tensor is not None  # narrowing: nothing of a norm is tied
                kind = self._plan.model_type if entry.is_copy else "FLOAT"
                array = to_numpy(entry.tensor.to(self._stored(parameter)))
                export.add_float(entry.name, array, kind)

    def save_state(self) -> list[str]:
        """Return JSON values for :meth:`load_state`."""
        return list(self._added)  # what is returned is written while the next block is smoothed

    def load_state(self, state: list[str]) -> None:
        """Go on after the blocks of an interrupted run."""
        self._added = list(state)

    def close(self, export: CheckpointExport) -> None:
        """Note in the description which norms have a bias that the float model lacks."""
        if self._added and self._plan.format == "ascend_v1":
            export.note(ADDED_NORM_BIAS, self._added)

    def _stored(self, parameter: str) -> torch.dtype:
        """Return the dtype that a parameter of the model has in the checkpoint."""
        info = self._checkpoint.tensors.get(self._inventory.rename(parameter))
        if info is None:
            found: torch.dtype = getattr(torch, self._plan.model_dtype)
            return found
        return from_numpy(np.empty(0, info.dtype)).dtype
