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
        return math.exp(float(self._losses(self._exact).mean()))

    def judge(self, model: Model) -> dict[str, list[float]]:
        """Return what a model loses, in each window.

        ``losses`` are the mean negative log likelihoods in nats, ``divergences`` the mean
        Kullback-Leibler divergences from the predictions of the float model in thousandths of a
        nat.
        """
        found = [self._log_likelihoods(model, ids) for ids in self._batches()]
        apart = [
            functional.kl_div(b, a, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)
            for a, b in zip(self._exact, found, strict=True)
        ]
        return {
            "losses": self._losses(found).tolist(),
            "divergences": (1000 * torch.cat(apart).double()).tolist(),
        }

    def judge_file(self, file: Path) -> dict[str, list[float]]:
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
            return self.judge(model)

    def _float(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._directory, dtype=torch.float32).eval()

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return torch.split(self._ids, BATCH)

    def _log_likelihoods(self, model: Model, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, self._first - 1 : -1]
            return torch.log_softmax(logits.float(), dim=-1)

    def _losses(self, found: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean negative log likelihood of each window, float64."""
        losses = [
            -values.gather(-1, ids[:, self._first :, None]).double().mean(dim=(1, 2))
            for values, ids in zip(found, self._batches(), strict=True)
        ]
        return torch.cat(losses)


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
