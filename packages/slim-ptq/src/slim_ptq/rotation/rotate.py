"""Rotating a whole model as its weights are loaded, and proving that it stays the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from slim_core.checkpoint import Checkpoint, EditedCheckpoint
from slim_core.errors import StructureError
from slim_core.progress import track
from slim_core.recipe import Rotate
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.inventory import Inventory
from slim_ptq.orthogonal import Orthogonal
from slim_ptq.pipeline.blocks import BlockRunner
from slim_ptq.rotation.block_edits import BlockEdits
from slim_ptq.structure import NormForm, trace_block
from slim_ptq.structure.norms import is_norm_like, norm_form
from slim_ptq.structure.proof import run_block
from slim_ptq.tensors import from_numpy

TOLERANCE = 1e-4  # of the largest output; a rotation that does not commute is off by its size
_TOKENS = 24

ArrayEdit = Callable[[np.ndarray], np.ndarray]


def rotate_checkpoint(
    checkpoint: Checkpoint, inventory: Inventory, rotate: Rotate, device: torch.device
) -> EditedCheckpoint:
    """Return the checkpoint of the rotated model; its logits are those of the model.

    Parameters
    ----------
    checkpoint, inventory
        The model; its code must be known.
    rotate : Rotate
        Seed, and whether value heads are rotated too.
    device : torch.device
        On which blocks are tried.

    Raises
    ------
    StructureError
        A rotation does not pass through the model: its norms subtract a mean or have a bias,
        something but linear layers behind norms reads the residual stream, or it is multimodal.
    """
    return _Rotation(checkpoint, inventory, rotate, device).checkpoint()


class _Rotation:
    def __init__(
        self, checkpoint: Checkpoint, inventory: Inventory, rotate: Rotate, device: torch.device
    ) -> None:
        if inventory.model is None:
            raise StructureError("a model can be rotated only if its code is known")
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._model: Any = inventory.model
        self._device = device
        embeddings = self._model.get_input_embeddings()
        self._residual = Orthogonal(embeddings.embedding_dim, rotate.seed)
        self._head = self._head_rotation(rotate) if rotate.heads else None
        self._edits: dict[str, ArrayEdit] = {}
        self._copies: dict[str, str] = {}

    def checkpoint(self) -> EditedCheckpoint:
        self._outside()
        self._blocks()
        changes = {"tie_word_embeddings": False} if self._copies else {}
        return EditedCheckpoint(self._checkpoint, self._edits, self._copies, changes)

    def _head_rotation(self, rotate: Rotate) -> Orthogonal | None:
        config = self._model.config
        config = getattr(config, "text_config", None) or config
        heads: Any = getattr(config, "num_attention_heads", None)
        size: Any = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
        if size is None and heads:
            size = config.hidden_size // heads
        return Orthogonal(size, rotate.seed + 1) if size else None

    def _outside(self) -> None:
        """Rotate the embeddings, and what reads the last norm."""
        model, rename = self._model, self._inventory.rename
        paths = {id(module): path for path, module in model.named_modules()}
        home = self._inventory.blocks[0].rpartition(".")[0].rpartition(".")[0]
        embeddings = paths[id(model.get_input_embeddings())]
        head: nn.Module = model.get_output_embeddings()
        norms = [
            path
            for path, module in model.named_modules()
            if not path.startswith(self._inventory.blocks) and is_norm_like(module)
        ]
        if len(norms) != 1 or norms[0].rpartition(".")[0] != home or head is None:
            found = ", ".join(norms) or "none"
            raise StructureError(
                f"a rotation needs one norm between the blocks and the head, and found {found}"
            )
        norm_name = rename(f"{norms[0]}.weight")
        weight = from_numpy(self._checkpoint.load(norm_name)).double()
        one = self._norm_one(norms[0], weight)
        scale = weight + one
        right = self._residual.right
        table = rename(f"{embeddings}.weight")
        name = rename(f"{paths[id(head)]}.weight")
        if name not in self._checkpoint.tensors or name == table:
            name = f"{paths[id(head)]}.weight"
            self._copies[name] = table
        self._edits[table] = _edit(right)
        self._edits[name] = _edit(lambda weight: right(weight * scale))
        self._edits[norm_name] = _edit(lambda weight: torch.full_like(weight, 1.0 - one))

    def _norm_one(self, path: str, weight: torch.Tensor) -> float:
        """Return what the last norm adds to its weight, after trying that a rotation passes it."""
        norm = copy.deepcopy(self._model.get_submodule(path))
        norm.weight = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(8, self._residual.size, generator=torch.Generator().manual_seed(0)).double()
        form = None if getattr(norm, "bias", None) is not None else norm_form(norm, (x,), {})
        if form is not None:
            one = 1.0 if form is NormForm.ONE_PLUS else 0.0
            norm.weight = nn.Parameter(torch.full_like(weight, 1.0 - one), requires_grad=False)
            turned = self._residual.right(norm(x).double())
            if float((norm(self._residual.right(x)) - turned).abs().max()) <= TOLERANCE:
                return one
        raise StructureError(
            f"{path} cannot be rotated: it is no RMSNorm without bias",
            hint="models with LayerNorm have no rotation that leaves them as they are",
        )

    def _blocks(self) -> None:
        """Find the edits of every kind of block, prove them, and set them for all blocks."""
        ids = torch.arange(_TOKENS)[None] % self._model.config.get_text_config().vocab_size
        runner = BlockRunner(
            self._checkpoint, self._inventory, TokenWindows((ids,), "rotation"), self._device
        )
        kinds = [_kind(self._model.get_submodule(name)) for name in self._inventory.blocks]
        edits: dict[Any, BlockEdits] = {}
        last = max(kinds.index(kind) for kind in set(kinds))
        for index in track(range(last + 1), "Proving the rotation"):
            with runner.loaded(index) as block:
                if kinds[index] not in edits:
                    edits[kinds[index]] = self._prove(runner, block, index)
                runner.advance(block, index, {})
        for kind, path in zip(kinds, self._inventory.blocks, strict=True):
            self._set(path, edits[kind])

    def _prove(self, runner: BlockRunner, block: nn.Module, index: int) -> BlockEdits:
        """Return the edits of a loaded block, which is left as it was.

        Raises
        ------
        StructureError
            The rotated block does not compute the rotated output.
        """
        name = self._inventory.blocks[index]
        (hidden, *args), kwargs = runner.example(index)
        try:
            edits = BlockEdits(
                block, trace_block(block, (hidden, *args), kwargs), self._residual, self._head
            )
        except StructureError as error:
            raise StructureError(f"{name} cannot be rotated: {error.message}") from error
        expected = run_block(block, (hidden, *args), kwargs)[0]
        before = {local: block.get_parameter(local).data for local in edits.names}
        with torch.no_grad():
            for local, value in before.items():
                new = edits.value(local, lambda other: before[other])
                block.get_parameter(local).data = new.to(value)
            turned = self._residual.right(hidden).to(hidden)
            found = run_block(block, (turned, *args), kwargs)[0]
            for local, value in before.items():
                block.get_parameter(local).data = value
        wanted = self._residual.right(expected)
        gap = float((found.double() - wanted).abs().max() / wanted.abs().max())
        if not gap <= TOLERANCE:
            raise StructureError(
                f"{name} cannot be rotated: its output changes by {gap:.1e} of its largest value",
                hint="its norms must be RMSNorm without bias, directly before the linear layers",
            )
        return edits

    def _set(self, path: str, edits: BlockEdits) -> None:
        rename, load = self._inventory.rename, self._checkpoint.load

        def read(local: str) -> torch.Tensor:
            return from_numpy(load(rename(f"{path}.{local}")))

        for local in edits.names:

            def edit(array: np.ndarray, local: str = local) -> np.ndarray:
                own = from_numpy(array)
                value = edits.value(local, lambda name: own if name == local else read(name))
                return np.ascontiguousarray(value.numpy())

            self._edits[rename(f"{path}.{local}")] = edit


def _edit(change: Callable[[torch.Tensor], torch.Tensor]) -> ArrayEdit:
    return lambda array: change(from_numpy(array).double()).float().numpy()


def _kind(block: nn.Module) -> Any:
    """Return what two blocks have in common that compute alike."""
    modules = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
