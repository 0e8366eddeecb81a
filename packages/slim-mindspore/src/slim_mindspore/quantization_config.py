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
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from slim_core.dtypes import INT4, INT8
from slim_core.errors import RecipeError
from slim_core.scheme import FLOAT, Granularity, QuantScheme, TensorScheme
from slim_mindspore.algorithm_args import AwqArgs, GptqArgs, SmoothArgs


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _default(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if _none(value) is None else value)


Int8: TypeAlias = Annotated[Literal["int8"] | None, BeforeValidator(_none)]
Int: TypeAlias = Annotated[Literal["int8", "int4"] | None, BeforeValidator(_none)]
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
WeightRange: TypeAlias = Literal["golden_stick", "symmetric"]
GROUP_SIZES = (0, 32, 64, 128, 256)
METHODS = ("rtn", "smooth_quant", "ptq")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerPolicy(_Strict):
    """What a layer gets in place of what the whole configuration says."""

    weight_dtype: Int = None
    activation_dtype: Int8 = None
    weight_quant_granularity: Annotated[
        Literal["per_channel", "per_group"], _default("per_channel")
    ] = "per_channel"
    act_quant_granularity: Annotated[Literal["per_tensor", "per_token"], _default("per_tensor")] = (
        "per_tensor"
    )
    group_size: Annotated[int, _default(0)] = 0

    @model_validator(mode="after")
    def _check_scheme(self) -> LayerPolicy:
        grouped = self.weight_quant_granularity == "per_group"
        if self.group_size not in GROUP_SIZES or grouped != bool(self.group_size):
            sizes = ", ".join(str(size) for size in GROUP_SIZES[1:])
            raise ValueError(
                f"group_size must be one of {sizes} with weight_quant_granularity per_group "
                f"and 0 without, not {self.group_size}"
            )
        if grouped and self.weight_dtype is None:
            raise ValueError("weight_quant_granularity per_group needs a weight_dtype")
        if self.activation_dtype and self.weight_dtype != "int8":
            raise ValueError("activation_dtype int8 needs weight_dtype int8")
        if self.activation_dtype and grouped:
            raise ValueError("activation_dtype int8 needs weight_quant_granularity per_channel")
        if self.act_quant_granularity == "per_token" and not self.activation_dtype:
            raise ValueError("act_quant_granularity per_token needs activation_dtype int8")
        return self

    def scheme(self, symmetric: bool = True) -> QuantScheme:
        """Return how a linear layer is quantized."""
        if self.weight_dtype is None:
            return FLOAT
        dtype = INT8 if self.weight_dtype == "int8" else INT4
        grouped = Granularity.PER_GROUP if self.group_size else Granularity.PER_CHANNEL
        weight = TensorScheme(dtype, grouped, symmetric, self.group_size)
        if self.activation_dtype is None:
            return QuantScheme(weight)
        if self.act_quant_granularity == "per_token":
            return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TOKEN))
        return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False))


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
        the name of a cell decides.
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
    outliers_suppression: Annotated[Literal["smooth", "awq"] | None, BeforeValidator(_none)] = None
    precision_recovery: Annotated[Literal["gptq"] | None, BeforeValidator(_none)] = None
    kvcache_quant_granularity: Annotated[
        Literal["per_channel", "per_token"], _default("per_channel")
    ] = "per_channel"
    modules_to_not_convert: Annotated[tuple[Name, ...], _default(())] = ()
    layer_policies: Annotated[dict[str, LayerPolicy], _default({})] = Field(default_factory=dict)
    algorithm_args: Annotated[dict[str, Any], _default({})] = Field(default_factory=dict)
    smooth_into: Literal["input", "norm"] = "input"
    weight_range: WeightRange = "golden_stick"

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
        for problem in _method_problems(self):
            raise ValueError(problem)
        for options in (self.smooth_args, self.awq_args, self.gptq_args):
            try:
                options()
            except ValidationError as error:
                raise ValueError(_option_problem(error)) from error
        return self

    @classmethod
    def build(cls, **values: Any) -> QuantizationConfig:
        """Return a configuration of keyword arguments; errors as :meth:`from_dict`."""
        return cls.from_dict(values, "the configuration")

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "quantization_config"
    ) -> QuantizationConfig:
        """Return a configuration of plain values.

        Raises
        ------
        RecipeError
            Lists every wrong key and value, with the values that are allowed.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{source} must be a mapping, not {type(values).__name__}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(_explain(source, error, list(cls.model_fields))) from error

    def scheme_of(self, name: str) -> QuantScheme:
        """Return how the linear cell of this name is quantized."""
        if any(part in name for part in self.modules_to_not_convert):
            return FLOAT
        for pattern, policy in self.layer_policies.items():
            if re.search(pattern, name):
                return policy.scheme(self._symmetric)
        return self.scheme(self._symmetric)

    def schemes(self) -> list[QuantScheme]:
        """Return how linear cells can be quantized: as the whole, and as each of the policies."""
        layers = [self, *self.layer_policies.values()]
        return [layer.scheme(self._symmetric) for layer in layers]

    @property
    def _symmetric(self) -> bool:
        return self.outliers_suppression != "awq"

    def smooth_args(self) -> SmoothArgs | None:
        """Return the options of smoothing, None if there is none."""
        used = self.outliers_suppression == "smooth"
        return SmoothArgs.model_validate(self.algorithm_args) if used else None

    def awq_args(self) -> AwqArgs | None:
        """Return the options of AWQ, None if it is not used."""
        used = self.outliers_suppression == "awq"
        return AwqArgs.model_validate(self.algorithm_args) if used else None

    def gptq_args(self) -> GptqArgs | None:
        """Return the options of GPTQ, None if it is not used."""
        used = self.precision_recovery == "gptq"
        return GptqArgs.model_validate(self.algorithm_args) if used else None


def _method_problems(config: QuantizationConfig) -> list[str]:
    """Return what the method does not allow, one line a problem."""
    method, problems = config.quant_method, []
    outliers, recovery = config.outliers_suppression, config.precision_recovery
    layers: list[LayerPolicy] = [config, *config.layer_policies.values()]
    activations = any(layer.activation_dtype for layer in layers)
    if method == "rtn" and (activations or outliers or recovery):
        problems.append(
            "quant_method rtn quantizes weights and the cache only: activation_dtype, "
            "outliers_suppression and precision_recovery must be None"
        )
    whole = (config.weight_dtype, config.activation_dtype, outliers, config.kvcache_dtype, recovery)
    if method == "smooth_quant" and whole != ("int8", "int8", "smooth", None, None):
        problems.append(
            "quant_method smooth_quant needs weight_dtype int8, activation_dtype int8 and "
            "outliers_suppression smooth, with kvcache_dtype and precision_recovery None"
        )
    return problems + _combination_problems(config, layers)


def _combination_problems(config: QuantizationConfig, layers: list[LayerPolicy]) -> list[str]:
    """Return which keys contradict each other, whatever the method."""
    problems = []
    outliers, recovery = config.outliers_suppression, config.precision_recovery
    activations = any(layer.activation_dtype for layer in layers)
    if not any(layer.weight_dtype for layer in layers) and not config.kvcache_dtype:
        problems.append("weight_dtype and kvcache_dtype are both None: there is nothing to do")
    if config.kvcache_quant_granularity == "per_token" and not config.kvcache_dtype:
        problems.append("kvcache_quant_granularity per_token needs kvcache_dtype int8")
    for key, value in (("outliers_suppression", outliers), ("precision_recovery", recovery)):
        if value in ("awq", "gptq") and activations:
            problems.append(f"{key} {value} needs activation_dtype None")
        if value and not any(layer.weight_dtype for layer in layers):
            problems.append(f"{key} {value} needs a weight_dtype")
    if outliers and recovery:
        problems.append(f"outliers_suppression {outliers} and precision_recovery {recovery} clash")
    if config.smooth_into == "norm" and not outliers:
        problems.append("smooth_into norm needs outliers_suppression")
    if config.algorithm_args and not (outliers or recovery):
        problems.append("algorithm_args must be empty: the method has no options")
    return problems


def _option_problem(error: ValidationError) -> str:
    item = error.errors()[0]
    where = ".".join(str(part) for part in item["loc"])
    return f"algorithm_args.{where}: {item['msg']}, found {item['input']!r:.80}"


def _explain(source: str, error: ValidationError, known: list[str]) -> str:
    lines = [f"{source} is not valid:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "as a whole"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            message = f"unknown key; known are {', '.join(known)}"
        elif item["type"] == "literal_error":
            message = f"{message}, not {item['input']!r:.80}"
        lines.append(f"  - {where}: {message}")
    return "\n".join(lines)
