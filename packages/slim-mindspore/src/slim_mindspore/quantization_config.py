"""The ``quantization_config`` block of MindFormers YAML files, checked.

::

    quantization_config:
      quant_method: 'ptq'
      weight_dtype: 'int4'
      activation_dtype: None
      precision_recovery: 'gptq'
      weight_quant_granularity: 'per_group'
      group_size: 64
      modules_to_not_convert: ['lm_head']
      algorithm_args: {damp_percent: 0.01}

In YAML ``None`` is a string; it means the same here as null and as leaving the key out.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from slim_core.scheme import QuantScheme
from slim_mindspore.layer_policy import Int8, LayerPolicy, none_means

Name: TypeAlias = Annotated[str, StringConstraints(min_length=1)]


class QuantizationConfig(LayerPolicy):
    """A whole ``quantization_config``.

    Parameters
    ----------
    quant_method : str
        ``rtn`` (weights and cache, no data for weights), ``smooth_quant`` (int8 weights and
        activations after smoothing) or ``ptq`` (every combination).
    weight_dtype, activation_dtype, kvcache_dtype : str or None
        ``int8``, or ``int4`` for weights; None leaves floating point.
    outliers_suppression : str or None
        ``smooth`` or ``awq``.
    precision_recovery : str or None
        ``gptq``.
    weight_quant_granularity, act_quant_granularity, kvcache_quant_granularity : str
        ``per_channel``/``per_group``, ``per_tensor``/``per_token``, ``per_channel``/``per_token``.
    group_size : int
        32, 64, 128 or 256 with ``per_group``, else 0.
    modules_to_not_convert : list of str
        A cell whose name contains one of these stays in floating point.
    layer_policies : dict
        From regular expressions to the keys of :class:`LayerPolicy`; the first that is found in
        the name of a cell decides, and nothing of the whole holds for that cell then.
    algorithm_args : dict
        Options of the algorithm: see :mod:`slim_mindspore.algorithm_args`.
    smooth_into : str
        ``input``: scales of ``smooth`` and ``awq`` divide the input of each cell, which they were
        found for; ``norm``: cells that read a norm share their scales, which go into its weight,
        and other cells are not smoothed.
    weight_range : str
        ``golden_stick``: ``scale = 2 max|w| / (2^b - 1)`` and codes from ``-2^(b-1)``;
        ``symmetric``: ``scale = max|w| / (2^(b-1) - 1)``, as slim-ptq and msModelSlim.
    """

    quant_method: Literal["rtn", "smooth_quant", "ptq"]
    kvcache_dtype: Int8 = None
    kvcache_quant_granularity: Annotated[
        Literal["per_channel", "per_token"], none_means("per_channel")
    ] = "per_channel"
    modules_to_not_convert: Annotated[tuple[Name, ...], none_means(())] = ()
    layer_policies: Annotated[dict[str, LayerPolicy], none_means({})] = Field(default_factory=dict)
    smooth_into: Literal["input", "norm"] = "input"
    weight_range: Literal["golden_stick", "symmetric"] = "golden_stick"

    @field_validator("layer_policies")
    @classmethod
    def _check_patterns(cls, value: dict[str, LayerPolicy]) -> dict[str, LayerPolicy]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_method(self) -> QuantizationConfig:
        for problem in (*_method_problems(self), *_combination_problems(self)):
            raise ValueError(problem)
        return self

    def policy_of(self, name: str) -> LayerPolicy:
        """Return what holds for the linear cell of this name."""
        if any(part in name for part in self.modules_to_not_convert):
            return _UNTOUCHED
        for pattern, policy in self.layer_policies.items():
            if re.search(pattern, name):
                return policy
        return self

    def scheme_of(self, name: str) -> QuantScheme:
        """Return how the linear cell of this name is quantized."""
        return self.policy_of(name).scheme()

    @property
    def policies(self) -> list[LayerPolicy]:
        """What holds for cells: the whole, and each of the policies."""
        return [self, *self.layer_policies.values()]


_UNTOUCHED = LayerPolicy()


def _method_problems(config: QuantizationConfig) -> list[str]:
    """Return what the method does not allow, one line a problem."""
    method, problems = config.quant_method, []
    keys = ("activation_dtype", "outliers_suppression", "precision_recovery")
    used = any(getattr(policy, key) for policy in config.policies for key in keys)
    if method == "rtn" and used:
        problems.append(
            "quant_method rtn quantizes weights and the cache only: activation_dtype, "
            "outliers_suppression and precision_recovery must be None"
        )
    whole = (
        *(config.weight_dtype, config.activation_dtype, config.outliers_suppression),
        *(config.kvcache_dtype, config.precision_recovery),
    )
    if method == "smooth_quant" and whole != ("int8", "int8", "smooth", None, None):
        problems.append(
            "quant_method smooth_quant needs weight_dtype int8, activation_dtype int8 and "
            "outliers_suppression smooth, with kvcache_dtype and precision_recovery None"
        )
    return problems


def _combination_problems(config: QuantizationConfig) -> list[str]:
    """Return which keys contradict each other, whatever the method."""
    problems = []
    weights = any(policy.weight_dtype for policy in config.policies)
    if not weights and not config.kvcache_dtype:
        problems.append("weight_dtype and kvcache_dtype are both None: there is nothing to do")
    if config.kvcache_quant_granularity == "per_token" and not config.kvcache_dtype:
        problems.append("kvcache_quant_granularity per_token needs kvcache_dtype int8")
    for key in ("outliers_suppression", "precision_recovery"):
        if getattr(config, key) and not weights:
            problems.append(f"{key} {getattr(config, key)} needs a weight_dtype")
    if config.smooth_into == "norm" and not config.outliers_suppression:
        problems.append("smooth_into norm needs outliers_suppression")
    return problems
