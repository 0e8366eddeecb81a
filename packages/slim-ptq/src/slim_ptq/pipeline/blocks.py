"""Running a model block by block, with the weights of one block in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from slim_core.checkpoint import Checkpoint
from slim_core.errors import NumericalError, StructureError
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.calibration.capture import (
    BlockCalls,
    capture_calls,
    first_call,
    output_form,
)
from slim_ptq.calibration.hidden import HiddenStates
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.devices import AUTO, compute_dtype
from slim_ptq.inventory import Inventory
from slim_ptq.loading import load_on_use, load_parameters, unload_parameters
from slim_ptq.memory import trim
from slim_ptq.parallel import Team

Watch = Callable[[torch.Tensor], None]


class BlockRunner:
    """Feeds calibration data through the decoder blocks of a model on the meta device.

    Parameters
    ----------
    checkpoint, inventory
        The model; ``inventory.model`` must be there.
    data : TokenWindows
    device : torch.device
        On which blocks run.
    hidden : HiddenStates, optional
        Where the hidden states between blocks are held: in memory if not given.
    team : Team, optional
        Processes that run the same blocks on other parts of the data.
    dtype : torch.dtype, optional
        In which they compute: that of :func:`slim_ptq.devices.compute_dtype` if not given.

    Raises
    ------
    CheckpointError
        ``hidden`` is to go on from a state, and its files do not fit the data.

    Notes
    -----
    In memory are the embeddings, one block, and one hidden state a batch unless they are on disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inventory: Inventory,
        data: TokenWindows,
        device: torch.device,
        hidden: HiddenStates | None = None,
        team: Team | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if inventory.model is None:
            raise StructureError("the blocks of a model can run only if its code is known")
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._model = inventory.model
        self._device = device
        self.dtype = dtype or compute_dtype(AUTO, device, inventory.model_dtype)
        self._sequence_first = False
        self._looked = False
        self.team = Team() if team is None else team
        self._hidden = HiddenStates() if hidden is None else hidden
        self._calls = self._capture(data)
        if self._hidden.is_resumed:
            self._hidden.restore()

    def __len__(self) -> int:
        return len(self._inventory.blocks)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Yield a block with its weights, which are freed afterwards."""
        name = self._inventory.blocks[index]
        block = self._model.get_submodule(name)
        self._load(block, name)
        self._read_ahead(index + 1)
        try:
            yield block
        finally:
            unload_parameters(block)
            trim()

    def example(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a block for the first batch."""
        calls = self._calls[0]
        return (self._hidden[0], *calls.args[index]), calls.kwargs[index]

    def samples(self, block: nn.Module, index: int) -> BlockSamples:
        """Return the inputs of a block and what it gave for them before its weights were edited.

        :meth:`look` runs it first, unless it was called for this block.
        """
        if not self._looked:
            self.look(block, index)
        return BlockSamples(index, self._calls, self._hidden)

    def look(self, block: nn.Module, index: int) -> None:
        """Run a block on all batches for what hooks see of it, before its weights are edited.

        Its outputs, which the edits change by rounding alone, are what :meth:`advance` passes on.
        """
        with torch.no_grad():
            for batch, calls in enumerate(self._calls):
                self._hidden.put(batch, calls.run(block, index, self._hidden[batch]))
        self._looked = True

    def advance(self, block: nn.Module, index: int, watches: Mapping[str, Watch]) -> None:
        """Run a block on all batches; its outputs become the inputs of the next one.

        After :meth:`look` it is the outputs from there that do.

        Parameters
        ----------
        watches : mapping
            Called with the input of the layers of these local names: (rows, tokens, channels), or
            (tokens, channels) of an expert.

        Raises
        ------
        NumericalError
            The output of the block is NaN or infinite.
        """
        hidden = self._hidden[0]

        def hook(watch: Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _module, inputs: watch(self._by_rows(inputs[0], hidden))

        handles = [
            block.get_submodule(name).register_forward_pre_hook(hook(watch))
            for name, watch in watches.items()
        ]
        try:
            with torch.no_grad():
                for batch, calls in enumerate(self._calls):
                    hidden = self._hidden[batch]
                    output = calls.run(block, index, hidden)
                    self._check(output, index)
                    if not self._looked:
                        self._hidden.replace(batch, output)
        finally:
            for handle in handles:
                handle.remove()
        self._hidden.advance()
        self._looked = False
        trim()

    def _check(self, output: torch.Tensor, index: int) -> None:
        if not bool(torch.isfinite(output).all()):
            raise NumericalError(
                f"the output of {self._inventory.blocks[index]} is NaN or infinite",
                hint="the float model itself overflows on this calibration data",
            )

    def _capture(self, data: TokenWindows) -> list[BlockCalls]:
        """Run what lies before the blocks, and the first block once to see what it returns."""
        blocks = self._inventory.blocks
        handles = self._load_outside_on_use()
        try:
            first = data.batches[0].to(self._device)
            args, kwargs = first_call(self._model, blocks[0], first[:1])
            self._sequence_first = args[0].ndim == 3 and args[0].shape[0] != 1
            with self.loaded(0) as block, torch.no_grad():
                form = output_form(block(*args, **kwargs))
            found = []
            for ids in data.batches:
                hidden, calls = capture_calls(self._model, blocks, ids.to(self._device), form)
                self._hidden.append(hidden)
                found.append(calls)
            return found
        finally:
            for handle in handles:
                handle.remove()
            for path, module in self._outside():
                if path:
                    unload_parameters(module)

    def _read_ahead(self, index: int) -> None:
        """Let the system read the weights of a block while the one before it is worked on.

        They wait in the memory of the system, not in that of the process.
        """
        for name in self._inventory.blocks[index : index + 1]:
            parameters = self._model.get_submodule(name).named_parameters()
            self._checkpoint.will_load(
                self._inventory.rename(f"{name}.{local}") for local, _ in parameters
            )

    def _by_rows(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``x`` as (rows, tokens, channels) if it has a vector for every token of a batch.

        Undoes the flattening in mixtures of experts, and the order (tokens, rows, channels) in
        which ChatGLM and others compute.
        """
        if x.ndim == 2 and x.shape[0] == hidden.shape[:-1].numel():
            x = x.reshape(*hidden.shape[:-1], x.shape[-1])
        return x.transpose(0, 1) if self._sequence_first and x.ndim == 3 else x

    def _load_outside_on_use(self) -> list[Any]:
        """Make every module outside the blocks read its own parameters when it is first called."""

        def loader(path: str) -> Callable[[nn.Module], None]:
            return lambda called: self._load(called, path, recurse=False)

        return [load_on_use(module, loader(path)) for path, module in self._outside()]

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        inside = tuple(f"{block}." for block in self._inventory.blocks)
        for path, module in self._model.named_modules():
            if not path.startswith(inside) and path not in self._inventory.blocks:
                yield path, module

    def _load(self, module: nn.Module, path: str, *, recurse: bool = True) -> None:
        load_parameters(
            module,
            path,
            self._checkpoint,
            self._inventory.rename,
            device=self._device,
            dtype=self.dtype,
            recurse=recurse,
        )
