"""How the samples of the classic interface are handed to a model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


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
    if "attention_mask" in names and len(names) > 1 and names[1].startswith("past"):
        return {names[0]: sample[0], "attention_mask": sample[1]}
    return sample
