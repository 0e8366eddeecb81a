"""How samples and caches are handed to a model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module) -> str | None:
    """Return the name under which a model takes its key-value cache; None if it takes none.

    ``cache`` from transformers 5.24 on, ``past_key_values`` before and in the code of older models.
    """
    names = inspect.signature(model.forward).parameters
    return next((name for name in names if name == "cache" or name.startswith("past")), None)


def named_sample(model: nn.Module, sample: list[Any] | dict[str, Any]) -> Any:
    """Name the parts of a sample ``[ids, mask]`` if the model takes something else second.

    The second positional argument of GPT-2, Bloom and others is the key-value cache, where scripts
    mean the attention mask.

    Returns
    -------
    dict or list
        ``{"input_ids": ids, "attention_mask": mask}`` in that case, else the sample.
    """
    if isinstance(sample, dict) or len(sample) != 2:
        return sample
    names = list(inspect.signature(model.forward).parameters)
    if "attention_mask" in names and cache_argument(model) in names[1:2]:
        return {names[0]: sample[0], "attention_mask": sample[1]}
    return sample
