"""Recipes: what to do with a model, as a user writes it in YAML or JSON.

Needs the extra ``recipes`` (pydantic and PyYAML).  Unknown keys are refused::

    scheme: w8a8
    exclude: ["*.layers.0.mlp.down_proj"]
    rules:                                # the first pattern that matches decides
      - {match: "*down_proj", scheme: w8a8_dynamic}
    method: {name: gptq, damp: 0.05}      # or a bare name; rules may have their own
    smooth: {method: smoothquant, alpha: 0.5}
    observer: mean_minmax
    fallback: 2
    kv_cache: {symmetric: true}           # int8; or attention: {}, int8 queries, keys and values
    format: ascend_v1
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from slim_core.errors import RecipeError, SlimError
from slim_core.files import PathLike, check_input_file
from slim_core.formats import ASCEND_FORMATS, FORMATS
from slim_core.method import MethodSpec
from slim_core.scheme import QuantScheme
from slim_core.validate import check_choice

_MAX_BYTES = 1 << 20  # a recipe is a page of text


def _parse_scheme(value: Any) -> QuantScheme:
    if isinstance(value, QuantScheme):
        return value
    try:
        return QuantScheme.parse(value)
    except SlimError as error:
        raise ValueError(str(error)) from error


def _parse_method(value: Any) -> MethodSpec:
    try:
        return MethodSpec.parse(value)
    except SlimError as error:
        raise ValueError(str(error)) from error


def _parse_smooth(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _parse_format(value: Any) -> str:
    try:
        return check_choice("format", value, FORMATS)
    except SlimError as error:
        raise ValueError(str(error)) from error


Scheme = Annotated[QuantScheme, BeforeValidator(_parse_scheme), PlainSerializer(str)]
Method = Annotated[
    MethodSpec, BeforeValidator(_parse_method), PlainSerializer(lambda spec: spec.to_plain())
]


class ObserverKind(str, Enum):
    """How the range of a statically quantized activation is found."""

    MEAN_MINMAX = "mean_minmax"  # mean over the samples of their minima and maxima
    MINMAX = "minmax"  # minimum and maximum over all samples
    HISTOGRAM = "histogram"  # the range that loses least, searched on a histogram
    AUTO = "auto"  # histogram unless the range is extreme against the spread


class SmoothMethod(str, Enum):
    """How activation outliers are moved into weights before quantization."""

    SMOOTHQUANT = "smoothquant"  # all channels, arXiv:2211.10438
    THRESHOLD = "threshold"  # channels beyond a searched threshold, after arXiv:2304.09145
    AWQ = "awq"  # a searched power of the mean activation, arXiv:2306.00978
    ITERATIVE = "iterative"  # all channels, strongly, over every kind of link
    CBQ = "cbq"  # channels found to be outliers, arXiv:2312.07950
    FLEX = "flex"  # shares of activation and weight searched for each link
    ALPHA_SEARCH = "alpha_search"  # one share searched for each link


class SmoothLink(str, Enum):
    """Pairs of layers between which scales can be moved."""

    NORM_LINEAR = "norm->linear"
    V_O = "v->o"
    UP_DOWN = "up->down"


_SMOOTH_OPTIONS: dict[SmoothMethod, tuple[str, ...]] = {
    SmoothMethod.SMOOTHQUANT: ("alpha", "shift"),
    SmoothMethod.THRESHOLD: ("alpha",),
    SmoothMethod.AWQ: (),
    SmoothMethod.ITERATIVE: ("alpha", "shift"),
    SmoothMethod.CBQ: (),
    SmoothMethod.FLEX: ("alpha", "beta"),
    SmoothMethod.ALPHA_SEARCH: ("shift",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Strict):
    """A glob over layer names, and scheme or method of the layers that it matches.

    What a rule leaves out is that of the recipe.
    """

    match: str = Field(min_length=1)
    scheme: Scheme | None = None
    method: Method | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.scheme is None and self.method is None:
            raise ValueError("a rule needs a scheme, a method or both")
        return self


class Smooth(_Strict):
    """Outlier suppression before weights are quantized; what is left out is up to the method.

    ``alpha`` and ``beta`` are the shares of the activation and of the weight in the migration.
    ``shift`` also moves the middle of each channel out of norms, where the layers behind can hold
    it.  ``links`` are the pairs of layers that scales are moved between, ``exclude`` patterns of
    layers whose links are left alone.
    """

    method: SmoothMethod = SmoothMethod.SMOOTHQUANT
    alpha: float | None = Field(default=None, ge=0, le=1)
    beta: float | None = Field(default=None, ge=0, le=1)
    shift: bool | None = None
    links: tuple[SmoothLink, ...] | None = Field(default=None, min_length=1)
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Smooth:
        taken = _SMOOTH_OPTIONS[self.method]
        for name in ("alpha", "beta", "shift"):
            if getattr(self, name) is not None and name not in taken:
                known = f"takes {' and '.join(taken)}" if taken else "has no such option"
                raise ValueError(f"{name} goes with other methods; {self.method.value} {known}")
        if self.method is SmoothMethod.FLEX and (self.alpha is None) != (self.beta is None):
            raise ValueError("flex takes both alpha and beta, or searches both")
        return self


class KVCache(_Strict):
    """Int8 key-value cache with a scale a channel, and an offset if it is not symmetric.

    ``after_rotary`` says that keys are rounded after the rotary embedding, as vllm-ascend does, and
    so measured there; else at the output of their linear layer.
    """

    dtype: Literal["int8"] = "int8"
    symmetric: bool = True
    after_rotary: bool = False


class Attention(_Strict):
    """Int8 queries, keys and values with a scale a head.

    ``fallback`` is how many attention modules, the hardest, stay in floating point; ``exclude``
    patterns of module names that do.
    """

    dtype: Literal["int8"] = "int8"
    fallback: int = Field(default=0, ge=0)
    exclude: tuple[str, ...] = ()


class Rotate(_Strict):
    """Rotation of the residual stream, and of value heads, folded into the weights.

    ``seed`` picks the rotation; ``heads`` says whether value heads are rotated too.
    """

    seed: int = Field(default=0, ge=0)
    heads: bool = True


class Recipe(_Strict):
    """Everything that decides the bytes of the output, but for the model and the data."""

    scheme: Scheme = QuantScheme.parse("w8a8")
    method: Method | None = None
    rules: tuple[Rule, ...] = ()
    exclude: tuple[str, ...] = ()
    fallback: int = Field(default=0, ge=0)
    rotate: Rotate | None = None
    smooth: Annotated[Smooth, BeforeValidator(_parse_smooth)] | None = None
    observer: ObserverKind = ObserverKind.MEAN_MINMAX
    kv_cache: KVCache | None = None
    attention: Attention | None = None
    format: Annotated[str, BeforeValidator(_parse_format)] = "ascend_v1"

    @model_validator(mode="after")
    def _one_of_cache_and_attention(self) -> Recipe:
        if self.kv_cache is not None and self.attention is not None:
            raise ValueError("kv_cache and attention exclude each other")
        if self.format not in ASCEND_FORMATS and (self.kv_cache or self.attention) is not None:
            raise ValueError(f"the {self.format} format holds no quantized kv_cache or attention")
        if self.kv_cache and self.kv_cache.after_rotary and self.format != "ascend_v1":
            raise ValueError("kv_cache.after_rotary goes with the ascend_v1 format only")
        return self

    @classmethod
    def build(cls, **values: Any) -> Recipe:
        """Return a recipe of keyword arguments.

        Raises
        ------
        RecipeError
            Lists every wrong key and value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise RecipeError(_explain("the recipe", error)) from error

    @classmethod
    def load(cls, path: PathLike) -> Recipe:
        """Read a recipe from a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises
        ------
        RecipeError
            The file is not a mapping or has wrong keys or values; lists all of them.
        """
        file = check_input_file(path, max_bytes=_MAX_BYTES)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file} is not YAML or JSON: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{file} must hold a mapping of keys, not {type(content).__name__}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(_explain(str(file), error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return str(yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False))

    def schemes(self) -> set[QuantScheme]:
        """Return every scheme that the recipe names."""
        ruled = {rule.scheme for rule in self.rules if rule.scheme is not None}
        return {self.scheme, *ruled}


def _explain(source: str, error: ValidationError) -> str:
    lines = [f"{source} is not a valid recipe:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown key; known are {', '.join(Recipe.model_fields)}"
        lines.append(f"  - {where}: {message}")
    return "\n".join(lines)
