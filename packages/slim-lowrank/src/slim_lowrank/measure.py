"""Measure what decomposed layers lose: their own error, and the perplexity of a whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim_core.progress import track
from slim_lowrank.calibrate import evaluating, run_batch, token_mask
from slim_lowrank.layers import find_layers
from slim_lowrank.watch import flat_rows, output_rows

_KEPT = 32
"""How many layers are compared in one pass: their outputs are in memory together."""


def measure(
    dense: nn.Module,
    small: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    *,
    own_inputs: bool = False,
) -> dict[str, float]:
    """Return each layer's relative output error, ``sqrt(E|y - y'|^2 / E|y|^2)`` without bias.

    Parameters
    ----------
    dense, small : Module
        The model before and after.
    names : sequence of str
        Decomposed layers.
    batches : sequence
        As for :func:`slim_lowrank.calibrate.collect`.
    own_inputs : bool
        False gives every decomposed layer the inputs of the dense one, so errors do not add up;
        True lets it have those of the decomposed model, as the sequential update assumes.  Layers
        that then see other positions (experts) are left out.
    """
    layers = find_layers(dense)
    replaced = dict(small.named_modules(remove_duplicate=False))
    sums = {name: [0.0, 0.0] for name in names}
    with evaluating(dense), evaluating(small), torch.no_grad():
        for batch in batches:
            mask = token_mask(batch)
            for start in range(0, len(names), _KEPT):
                chosen = names[start : start + _KEPT]
                wanted = _outputs(dense, {n: layers[n].module for n in chosen}, batch)
                if own_inputs:
                    got = _outputs(small, {n: replaced[n] for n in chosen}, batch)
                for name, (x, y) in wanted.items():
                    if own_inputs and name not in got:
                        continue
                    new = got[name][1] if own_inputs else replaced[name](x)
                    if new.shape == y.shape:
                        lost = flat_rows(layers[name], y - new, mask).double()
                        kept = output_rows(layers[name], y, mask).double()
                        sums[name][0] += float(lost.square().sum())
                        sums[name][1] += float(kept.square().sum())
    return {name: math.sqrt(lost / kept) for name, (lost, kept) in sums.items() if kept > 0}


def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], batch: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a batch and return input and output of the last call of the modules it reached."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            seen[name] = (args[0], y.clone())  # what follows may work in place

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def perplexity(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return ``exp`` of the mean negative log-likelihood per predicted token.

    Parameters
    ----------
    model : Module
        Causal language model whose output has ``logits (batch, length, vocabulary)``.
    batches : sequence of dict
        ``input_ids (batch, length)``; every token but the first of a row is predicted.
    """
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in track(batches, "measuring perplexity"):
            ids = batch["input_ids"]
            logits = cast(Tensor, model(input_ids=ids).logits)[:, :-1].float()
            flat = logits.reshape(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum")
            total += float(loss)
            count += ids[:, 1:].numel()
    return math.exp(total / count)
