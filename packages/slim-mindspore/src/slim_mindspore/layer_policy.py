"""What a ``quantization_config`` can say of a linear cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from slim_core.dtypes import INT4, INT8
from slim_core.errors import RecipeError
from slim_core.scheme import FLOAT, Granularity, QuantScheme, TensorScheme
from slim_mindspore.algorithm_args import AwqArgs, GptqArgs, SmoothArgs

if TYPE_CHECKING:
    from typing_extensions import Self


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def none_means(default: Any) -> BeforeValidator:
    """Return a validator that takes null and ``None`` for a default."""
    return BeforeValidator(lambda value: default if _none(value) is None else value)


Int8: TypeAlias = Annotated[Literal["int8"] | None, BeforeValidator(_none)]
Int: TypeAlias = Annotated[Literal["int8", "int4"] | None, BeforeValidator(_none)]
Suppression: TypeAlias = Annotated[Literal["smooth", "awq"] | None, BeforeValidator(_none)]
Recovery: TypeAlias = Annotated[Literal["gptq"] | None, BeforeValidator(_none)]
WeightGranularity: TypeAlias = Annotated[
    Literal["per_channel", "per_group"], none_means("per_channel")
]
InputGranularity: TypeAlias = Annotated[
    Literal["per_tensor", "per_token"], none_means("per_tensor")
]
Options: TypeAlias = Annotated[dict[str, Any], none_means({})]
GROUP_SIZES = (0, 32, 64, 128, 256)


class LayerPolicy(BaseModel):
    """How a linear cell is quantized and by which algorithm; the keys are those of the whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_dtype: Int = None
    activation_dtype: Int8 = None
    outliers_suppression: Suppression = None
    precision_recovery: Recovery = None
    weight_quant_granularity: WeightGranularity = "per_channel"
    act_quant_granularity: InputGranularity = "per_tensor"
    group_size: Annotated[int, none_means(0)] = 0
    algorithm_args: Options = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_policy(self) -> LayerPolicy:
        for problem in (*_scheme_problems(self), *_algorithm_problems(self)):
            raise ValueError(problem)
        for options in (self.smooth_args, self.awq_args, self.gptq_args):
            try:
                options()
            except ValidationError as error:
                raise ValueError(_option_problem(error)) from error
        return self

    @classmethod
    def build(cls, **values: Any) -> Self:
        """Return a policy or configuration of keyword arguments; errors as :meth:`from_dict`."""
        return cls.from_dict(values, "the configuration")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "quantization_config") -> Self:
        """Return a policy or configuration of plain values.

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

    def scheme(self) -> QuantScheme:
        """Return how the weight and the input are quantized."""
        if self.weight_dtype is None:
            return FLOAT
        dtype = INT8 if self.weight_dtype == "int8" else INT4
        grouped = Granularity.PER_GROUP if self.group_size else Granularity.PER_CHANNEL
        symmetric = self.outliers_suppression != "awq"
        weight = TensorScheme(dtype, grouped, symmetric, self.group_size)
        if self.activation_dtype is None:
            return QuantScheme(weight)
        if self.act_quant_granularity == "per_token":
            return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TOKEN))
        return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False))

    def needs_data(self) -> bool:
        """Whether quantizing a cell in this way takes calibration data."""
        scheme = self.scheme()
        return not scheme.is_float and bool(
            scheme.is_static or self.outliers_suppression or self.precision_recovery
        )

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


def _scheme_problems(policy: LayerPolicy) -> list[str]:
    problems = []
    grouped = policy.weight_quant_granularity == "per_group"
    if policy.group_size not in GROUP_SIZES or grouped != bool(policy.group_size):
        sizes = ", ".join(str(size) for size in GROUP_SIZES[1:])
        problems.append(
            f"group_size must be one of {sizes} with weight_quant_granularity per_group "
            f"and 0 without, not {policy.group_size}"
        )
    if grouped and policy.weight_dtype is None:
        problems.append("weight_quant_granularity per_group needs a weight_dtype")
    if policy.activation_dtype and policy.weight_dtype != "int8":
        problems.append("activation_dtype int8 needs weight_dtype int8")
    if policy.activation_dtype and grouped:
        problems.append("activation_dtype int8 needs weight_quant_granularity per_channel")
    if policy.act_quant_granularity == "per_token" and not policy.activation_dtype:
        problems.append("act_quant_granularity per_token needs activation_dtype int8")
    return problems


def _algorithm_problems(policy: LayerPolicy) -> list[str]:
    problems = []
    outliers, recovery = policy.outliers_suppression, policy.precision_recovery
    for key, value in (("outliers_suppression", outliers), ("precision_recovery", recovery)):
        if value in ("awq", "gptq") and policy.activation_dtype:
            problems.append(f"{key} {value} needs activation_dtype None")
    if outliers and recovery:
        problems.append(f"outliers_suppression {outliers} and precision_recovery {recovery} clash")
    if policy.algorithm_args and not (outliers or recovery):
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
