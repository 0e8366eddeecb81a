"""One evaluation for all tools: float weights, fake-quantized inputs, the same windows."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import evaluation
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

BATCH = 4
Model = Callable[..., Any]


class Judge:
    """Compares models with the float one on the windows of one model.

    Parameters
    ----------
    work : Path
    model : str
        Name of the model.
    """

    def __init__(self, work: Path, model: str) -> None:
        self._directory = work / model
        self._ids, self._first = evaluation(model)
        self._exact = [self._log_likelihoods(self._float(), ids) for ids in self._batches()]

    def float_perplexity(self) -> float:
        """Return the perplexity of the float model."""
        return self._perplexity(self._exact)

    def judge(self, model: Model) -> dict[str, float]:
        """Return the perplexity, and how far predictions are from those of the float model.

        The divergence is the mean Kullback-Leibler divergence in nats a token, times 1000.
        """
        found = [self._log_likelihoods(model, ids) for ids in self._batches()]
        total = sum(
            float(functional.kl_div(b, a, reduction="sum", log_target=True))
            for a, b in zip(self._exact, found, strict=True)
        )
        count = sum(a.shape[0] * a.shape[1] for a in found)
        return {"perplexity": self._perplexity(found), "divergence": 1000 * total / count}

    def judge_file(self, file: Path) -> dict[str, float]:
        """Judge what a worker has saved."""
        model = self._float()
        with safe_open(file, framework="pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            notes = stored.metadata()
        missing, unknown = model.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        if unknown or set(missing) - tied:
            raise ValueError(f"{file.name}: unknown {unknown[:3]}, missing {missing[:3]}")
        inputs = json.loads(notes["inputs"])
        with quantized_inputs(model, inputs):
            return {**self.judge(model), "seconds": float(notes["seconds"])}

    def _float(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._directory, dtype=torch.float32).eval()

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return torch.split(self._ids, BATCH)

    def _log_likelihoods(self, model: Model, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, self._first - 1 : -1]
            return torch.log_softmax(logits.float(), dim=-1)

    def _perplexity(self, found: list[torch.Tensor]) -> float:
        losses = [
            -values.gather(-1, ids[:, self._first :, None]).double().flatten()
            for values, ids in zip(found, self._batches(), strict=True)
        ]
        return math.exp(float(torch.cat(losses).mean()))


@contextlib.contextmanager
def quantized_inputs(model: nn.Module, inputs: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Round the inputs of layers: symmetric for each token, or static where a scale is given."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(_round, how=how))
        for name, how in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round(_module: nn.Module, args: tuple[torch.Tensor, ...], how: dict[str, Any]) -> Any:
    x = args[0]
    most = 2 ** (how["bits"] - 1) - 1
    if "scale" in how:
        codes = (x / how["scale"] + how["zero"]).round().clamp(-most - 1, most)
        return ((codes - how["zero"]) * how["scale"], *args[1:])
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / most
    return ((x / scale).round().clamp(-most, most) * scale, *args[1:])
