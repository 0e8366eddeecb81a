"""Calibrate and quantize a model one decoder block at a time.

For each block: run it in floating point on all calibration batches while the inputs of its linear
layers are observed, edit its weights if the recipe asks for outlier suppression, quantize, write,
free.  The outputs of the float block are the inputs of the next one, so each block runs once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from slim_core.checkpoint import Checkpoint
from slim_core.errors import InvalidValueError
from slim_core.export import CheckpointExport
from slim_core.method import MethodSpec
from slim_core.numerics import check_finite
from slim_core.plan import LayerPlan, Plan
from slim_core.progress import track
from slim_core.recipe import Recipe
from slim_core.report import LayerReport
from slim_core.resume import ResumableDir
from slim_ptq.calibration.hidden import HiddenStates
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.flatquant import train_block
from slim_ptq.inventory import Inventory
from slim_ptq.methods import FlatQuant, LearnedTransform, Parts, SignRound, make_method
from slim_ptq.parallel import Team
from slim_ptq.pipeline.attention import BlockAttention
from slim_ptq.pipeline.block_layers import BlockLayers
from slim_ptq.pipeline.blocks import BlockRunner
from slim_ptq.pipeline.inputs import by_block
from slim_ptq.pipeline.quantizing import float_report, write_layer
from slim_ptq.pipeline.saving import StateSaver
from slim_ptq.pipeline.smoothing import BlockSmoother
from slim_ptq.pipeline.statistics import InputStatistics, block_statistics, first_watchers
from slim_ptq.rounding import RoundedStream
from slim_ptq.structure import trace_block, weight_of
from slim_ptq.structure.norms import is_norm_like
from slim_ptq.tensors import from_numpy, to_numpy


def run_blockwise(
    checkpoint: Checkpoint,
    inventory: Inventory,
    plan: Plan,
    recipe: Recipe,
    data: TokenWindows,
    export: CheckpointExport,
    device: torch.device,
    work: ResumableDir | None = None,
    activation_bytes: int = 0,
    team: Team | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerReport]:
    """Write the quantized checkpoint.

    Parameters
    ----------
    work : ResumableDir, optional
        Where hidden states go that are too many for memory; after each block the state is saved
        to it, and a state that is in it is taken up.  Without it everything is held in memory.
    activation_bytes : int
        Up to how many bytes hidden states stay in memory.
    team : Team, optional
        Processes that share the work; ``data`` is the part of this one, the others must call the
        same with theirs.
    dtype : torch.dtype, optional
        In which blocks compute (:class:`BlockRunner`).

    Raises
    ------
    NumericalError
        A weight or an activation is NaN or infinite; names the layer.
    CalibrationError
        No token reached a layer that needs a range.
    """
    team = Team() if team is None else team
    state = None if work is None else work.state

    def hidden_states(name: str) -> HiddenStates:
        return HiddenStates(
            None if work is None else work.path,
            activation_bytes,
            None if state is None else state[name][team.rank],
            name=f"{name}-{team.rank}",
        )

    hidden = hidden_states("hidden")
    rounding = RoundedStream(hidden_states("rounded")) if _trained(plan, SignRound) else None
    streams = [hidden] if rounding is None else [hidden, rounding.hidden]
    job = _Job(checkpoint, inventory, plan, recipe, export, team, rounding)
    if state is not None:
        job.load_state(state["job"])
        export.load_state(state["export"])
    if state is not None and state["complete"]:
        _remove_files(streams)
        return job.reports
    runner = BlockRunner(checkpoint, inventory, data, device, hidden, team, dtype)
    start = 0 if state is None else state["blocks"]
    with contextlib.nullcontext() if work is None else StateSaver(work) as saver:

        def save(done: int, *, complete: bool = False) -> None:
            """Leave the state of all processes to the saver of the first one."""
            if saver is None:
                return
            sync = saver.sync if team.is_first else os.fsync
            states = [
                team.collect(None if complete else stream.save_state(sync)) for stream in streams
            ]
            if team.is_first:
                saver.save(
                    {
                        "blocks": done,
                        "complete": complete,
                        "job": job.save_state(),
                        "export": export.save_state(sync),
                        **dict(zip(("hidden", "rounded"), states, strict=False)),
                    }
                )

        blocks = range(start, len(runner))
        for index in track(blocks, "Quantizing blocks", total=len(runner), done=start):
            with runner.loaded(index) as block:
                job.block(runner, block, index)
            save(index + 1)
        if team.is_first:
            job.rest()
        export.finish()
        save(len(runner), complete=True)
    _remove_files(streams)
    return job.reports


def _remove_files(streams: Iterable[HiddenStates]) -> None:
    for stream in streams:
        stream.remove_files()


def _trained(plan: Plan, *kinds: type[FlatQuant] | type[SignRound]) -> list[MethodSpec]:
    """Return the methods of a plan that are of these kinds, which are trained block by block."""
    names = {kind.name for kind in kinds}
    return [layer.method for layer in plan.quantized.values() if layer.method.name in names]


def check_alone(plan: Plan, team: Team) -> None:
    """Require one process where blocks are trained.

    Raises
    ------
    InvalidValueError
        There are several.
    """
    trained = _trained(plan, FlatQuant, SignRound)
    if trained and team.size > 1:
        raise InvalidValueError(
            f"method {trained[0]} trains each block in one process, not in {team.size}",
            hint="start it without torchrun",
        )


class _Job:
    """The state of one run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inventory: Inventory,
        plan: Plan,
        recipe: Recipe,
        export: CheckpointExport,
        team: Team,
        rounding: RoundedStream | None = None,
    ) -> None:
        self._team = team
        self._rounding = rounding
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._plan = plan
        self._recipe = recipe
        self._export = export
        self._layers = by_block(inventory, plan)
        self._attention = BlockAttention(recipe, inventory, export)
        self._smoother = (
            None
            if recipe.smooth is None
            else BlockSmoother(recipe.smooth, checkpoint, inventory, plan)
        )
        self._written: set[str] = set()
        self.reports: list[LayerReport] = []

    def block(self, runner: BlockRunner, block: nn.Module, index: int) -> None:
        """Calibrate, quantize and write one block."""
        path = self._inventory.blocks[index]
        layers = self._layers[path]
        quantized = {name: plan for name, plan in layers.items() if not plan.scheme.is_float}
        self._check_weights(block, layers)
        if self._smoother is not None:
            self._smoother.smooth(runner, block, index, layers)
        learned: dict[str, LearnedTransform | Parts] = {
            **self._train(runner, block, index, quantized),
            **self._learn_rounding(runner, block, index, quantized),
        }
        statistics = block_statistics(quantized, self._recipe.observer)
        watches = {name: stats.watch for name, stats in first_watchers(statistics).items()}
        with self._attention.watching(runner, block, index):
            runner.advance(block, index, watches)
        for seen in first_watchers(statistics).values():
            seen.combine(self._team)
        self._quantize(block, quantized, statistics, learned)
        self._write_others(block, path, quantized)
        if self._smoother is not None:
            self._smoother.write(self._export, block, index)
        self.reports += [
            float_report(plan, self._checkpoint.tensors[f"{plan.name}.weight"].nbytes)
            for plan in layers.values()
            if plan.scheme.is_float
        ]

    def save_state(self) -> dict[str, Any]:
        """Return JSON values for :meth:`load_state`."""
        return {
            "written": sorted(self._written),
            "reports": [report.to_dict() for report in self.reports],
            "attention": self._attention.save_state(),
            "smoother": None if self._smoother is None else self._smoother.save_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on after the blocks of an interrupted run."""
        self._written = set(state["written"])
        self.reports = [LayerReport.from_dict(report) for report in state["reports"]]
        self._attention.load_state(state["attention"])
        if self._smoother is not None:
            self._smoother.load_state(state["smoother"])

    def rest(self) -> None:
        """Write every tensor that does not belong to a block."""
        self._attention.finish()
        if self._smoother is not None:
            self._smoother.close(self._export)
        for _, names in self._checkpoint.iter_shards():
            for name in names:
                if name not in self._written:
                    dtype = self._checkpoint.tensors[name].dtype
                    array = self._checkpoint.load(name).astype(dtype, copy=False)
                    self._export.add_float(name, array)

    def _check_weights(self, block: nn.Module, layers: dict[str, LayerPlan]) -> None:
        """Look at the weights before running them, so that the message names the right layer."""
        for local, plan in layers.items():
            check_finite(plan.name, "weight", weight_of(block.get_submodule(local)))

    def _train(
        self, runner: BlockRunner, block: nn.Module, index: int, quantized: Mapping[str, LayerPlan]
    ) -> dict[str, LearnedTransform]:
        """Train the transforms of a block, if a method of its layers wants that."""
        methods = {local: make_method(plan.method) for local, plan in quantized.items()}
        trained = {local: m for local, m in methods.items() if isinstance(m, FlatQuant)}
        if not trained:
            return {}
        name = self._inventory.blocks[index]
        samples = runner.samples(block, index)
        stored = {
            local: self._as_stored(self._inventory.rename(f"{name}.{local}.weight"), module.weight)
            for local, module in block.named_modules()
            if is_norm_like(module)
        }
        return train_block(
            name,
            block,
            trace_block(block, *runner.example(index)),
            trained,
            {local: quantized[local].scheme for local in trained},
            samples,
            stored={local: tensor.dtype for local, tensor in stored.items()},
        )

    def _learn_rounding(
        self, runner: BlockRunner, block: nn.Module, index: int, quantized: Mapping[str, LayerPlan]
    ) -> dict[str, Parts]:
        """Learn the rounding of a block, if a method of any layer of the model wants that."""
        if self._rounding is None:
            return {}
        layers = {}
        for local, plan in quantized.items():
            method = make_method(plan.method)
            if isinstance(method, SignRound) and plan.scheme.weight is not None:
                layers[local] = method, plan.scheme.weight
        samples = runner.samples(block, index)
        return self._rounding.block(self._inventory.blocks[index], block, samples, layers)

    def _quantize(
        self,
        block: nn.Module,
        quantized: Mapping[str, LayerPlan],
        statistics: Mapping[str, InputStatistics],
        learned: Mapping[str, LearnedTransform | Parts],
    ) -> None:
        """Quantize the layers together with the other processes; the first one writes them."""
        layers = BlockLayers(
            block, quantized, statistics, learned, self._plan.model_dtype, self._as_stored
        )
        for local, item in layers.made(self._team):  # alone, each is written as soon as made
            plan = quantized[local]
            self.reports.append(
                write_layer(
                    self._export,
                    plan,
                    item,
                    bytes_before=self._checkpoint.tensors[f"{plan.name}.weight"].nbytes,
                    transposed=plan.name in self._inventory.transposed,
                )
            )
            self._written.update((f"{plan.name}.weight", f"{plan.name}.bias"))

    def _write_others(self, block: nn.Module, path: str, quantized: Iterable[str]) -> None:
        """Write the parameters of a block that stay in floating point, as they are now."""
        done = tuple(f"{name}." for name in quantized)
        for local, parameter in block.named_parameters():
            name = self._inventory.rename(f"{path}.{local}")
            if not local.startswith(done):
                self._export.add_float(name, to_numpy(self._as_stored(name, parameter)))
                self._written.add(name)

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the dtype that it has in the checkpoint.

        One that nothing has edited is what is stored, though the block may compute with less.
        """
        stored = self._checkpoint.tensors.get(name)
        if stored is None:
            return tensor.to(getattr(torch, self._plan.model_dtype))
        dtype = from_numpy(np.empty(0, stored.dtype)).dtype
        if torch.promote_types(dtype, tensor.dtype) != tensor.dtype:
            original = from_numpy(self._checkpoint.load(name)).to(tensor.device)
            if torch.equal(original.to(tensor.dtype), tensor):
                return original
        return tensor.to(dtype)
