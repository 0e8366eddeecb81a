"""Plans: every layer and its scheme, with all errors found before any work is done.

A plan is made from names, shapes and a recipe alone, so a mistake costs seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slim_core.engines import reader_warnings
from slim_core.errors import PatternError, PlanError
from slim_core.formats import ASCEND_FORMATS, FORMATS, Format
from slim_core.groups import group_by, is_expert, is_router
from slim_core.matching import match_all
from slim_core.method import MINMAX, MethodRules, MethodSpec, OnlyMinMax
from slim_core.scheme import (
    FLOAT,
    PER_TOKEN_INT8,
    Granularity,
    QuantScheme,
    TensorScheme,
    model_type,
)

if TYPE_CHECKING:
    from slim_core.recipe import Recipe

Shape = tuple[int, int]

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = re.compile(r".*?\.\d+(?=\.)")  # up to the number of the decoder block


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer: its weight shape (out, in), its scheme, and why it has that scheme.

    ``asked`` is False where the scheme is another one than the recipe asks for; ``needs_data``
    says whether its method, which a layer in floating point does not use, needs calibration data.
    """

    name: str
    shape: Shape
    scheme: QuantScheme
    reason: str
    asked: bool = True
    method: MethodSpec = MINMAX
    needs_data: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of the input of the layer are needed."""
        return self.scheme.is_static or (self.needs_data and not self.scheme.is_float)

    def nbytes(self, form: Format, model_dtype: str) -> int:
        """Return the bytes of the stored layer without its float bias."""
        if self.scheme.is_float:
            return self.shape[0] * self.shape[1] * _ITEM_BYTES[model_dtype]
        return form.nbytes(self.name, self.scheme, self.shape, model_dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    ``warnings`` are facts that do not stop it: engines that will not read the result, layers that
    got another scheme than the recipe's.
    """

    layers: tuple[LayerPlan, ...]
    model_dtype: str
    format: str
    bytes_before: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> dict[str, LayerPlan]:
        """The layers that do not stay in floating point, by name."""
        return {layer.name: layer for layer in self.layers if not layer.scheme.is_float}

    @property
    def model_type(self) -> str:
        """Type name of the whole model."""
        return model_type({layer.scheme.ascend_type for layer in self.layers})

    @property
    def group_size(self) -> int:
        """The one group size of the model, 0 if no layer is grouped."""
        return max((layer.scheme.group_size for layer in self.layers), default=0)

    @property
    def needs_calibration(self) -> bool:
        """Whether some layer needs statistics of activations."""
        return any(layer.needs_calibration for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Estimated bytes of the weight files."""
        form = FORMATS[self.format]
        saved = sum(
            layer.shape[0] * layer.shape[1] * _ITEM_BYTES[self.model_dtype]
            - layer.nbytes(form, self.model_dtype)
            for layer in self.layers
        )
        return self.bytes_before - saved

    @property
    def memory(self) -> int:
        """Rough peak memory of the run in bytes, without libraries and calibration activations.

        Block by block: three times the largest block in float32 (its weights, one layer's codes
        and errors, intermediate activations) and what lies outside the blocks.  Weights only: four
        float32 copies of the largest weight and the 64 MiB that the writer buffers.
        """
        sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in self.layers}
        if not self.needs_calibration:
            return 16 * max(sizes.values()) + (1 << 26)
        blocks: dict[str, int] = {}
        for name, size in sizes.items():
            numbered = _BLOCK.match(name)
            block = numbered.group() if numbered else name
            blocks[block] = blocks.get(block, 0) + size
        outside = self.bytes_before // _ITEM_BYTES[self.model_dtype] - sum(sizes.values())
        return 12 * max(blocks.values()) + 4 * outside

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return {
            "format": self.format,
            "model_type": self.model_type,
            "model_dtype": self.model_dtype,
            "group_size": self.group_size,
            "needs_calibration": self.needs_calibration,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "memory": self.memory,
            "warnings": list(self.warnings),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "scheme": str(layer.scheme),
                    "method": "" if layer.scheme.is_float else str(layer.method),
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
        }


def build_plan(
    linears: Mapping[str, Shape],
    recipe: Recipe,
    form: Format,
    *,
    model_dtype: str,
    bytes_before: int,
    calibrated: bool,
    methods: MethodRules | None = None,
) -> Plan:
    """Give every linear layer its scheme and its method.

    Parameters
    ----------
    linears : mapping
        Weight shape (out, in) of every layer that can be quantized, by name.
    calibrated : bool
        Whether calibration data is there.
    methods : MethodRules, optional
        Rounding to nearest alone if not given.

    Raises
    ------
    PlanError
        Everything that is wrong, each problem naming its layer.
    """
    problems: list[str] = []
    layers = tuple(_resolve(linears, recipe, problems))
    layers = tuple(_with_methods(layers, recipe, methods or OnlyMinMax(), problems))
    for layer in layers:
        reason = form.unsupported(layer.scheme, layer.shape)
        if reason:
            problems.append(f"{layer.name} cannot be {layer.scheme} in {form.name}: {reason}")
        if is_expert(layer.name) and layer.scheme.is_static:
            problems.append(
                f"{layer.name} is an expert and cannot be {layer.scheme}: no engine runs "
                "experts with static activations; use the _dynamic scheme"
            )
    problems += _unlike_groups(layers)
    sizes = sorted({layer.scheme.group_size for layer in layers if layer.scheme.group_size})
    if len(sizes) > 1:
        problems.append(f"the description holds one group size, the recipe asks for {sizes}")
    if not calibrated:
        problems += _without_data(layers, recipe)
    if not linears:
        problems.append("the model has no linear layer in a decoder block")
    elif (
        not problems
        and all(layer.scheme.is_float for layer in layers)
        and recipe.kv_cache is None
        and recipe.attention is None
        and recipe.rotate is None
    ):
        problems.append("the recipe leaves every layer in floating point")
    if problems:
        raise PlanError(problems)
    warnings = (*_warnings(layers, form, model_dtype), *_attention_warnings(recipe))
    return Plan(layers, model_dtype, form.name, bytes_before, warnings)


def _without_data(layers: tuple[LayerPlan, ...], recipe: Recipe) -> Iterable[str]:
    """Yield what cannot be done without calibration data."""
    if any(layer.scheme.is_static for layer in layers):
        yield "static activation schemes need calibration data, and there is none"
    if (recipe.kv_cache or recipe.attention) is not None:
        yield "int8 caches and attention need calibration data, and there is none"
    for method in sorted({str(layer.method) for layer in layers if layer.needs_data}):
        yield f"method {method} needs calibration data, and there is none"


def dynamic_variant(scheme: QuantScheme) -> QuantScheme:
    """Return the scheme with per-token activations in the place of static ones."""
    weight = scheme.weight
    if not scheme.is_static or weight is None:
        return scheme
    per_channel = TensorScheme(weight.dtype, Granularity.PER_CHANNEL)
    return QuantScheme(per_channel, PER_TOKEN_INT8)


def _resolve(
    linears: Mapping[str, Shape], recipe: Recipe, problems: list[str]
) -> Iterable[LayerPlan]:
    names = list(linears)
    excluded = _expand("exclude", recipe.exclude, names, problems)
    ruled = _expand("rules", [rule.match for rule in recipe.rules], names, problems)
    schemes = {rule.match: rule.scheme or recipe.scheme for rule in recipe.rules}
    for name, shape in linears.items():
        if name in excluded:
            yield LayerPlan(name, shape, FLOAT, f"excluded by {excluded[name]!r}")
        elif name in ruled:
            yield LayerPlan(name, shape, schemes[ruled[name]], f"rule {ruled[name]!r}")
        elif is_router(name):
            yield LayerPlan(name, shape, FLOAT, "a router stays in float", asked=False)
        elif is_expert(name) and recipe.scheme.is_static:
            scheme = dynamic_variant(recipe.scheme)
            yield LayerPlan(name, shape, scheme, "experts have no static kernel", asked=False)
        else:
            yield LayerPlan(name, shape, recipe.scheme, "recipe")


def _with_methods(
    layers: Iterable[LayerPlan], recipe: Recipe, rules: MethodRules, problems: list[str]
) -> Iterable[LayerPlan]:
    """Give every layer that is quantized its method: of its rule, of the recipe, of its scheme."""
    layers = tuple(layers)
    named = {rule.match: rule.method for rule in recipe.rules}
    ruled = _expand("rules", named, [layer.name for layer in layers], [])
    said: set[str] = set()
    for layer in layers:
        if layer.scheme.is_float:
            yield layer
            continue
        method = named.get(ruled.get(layer.name, "")) or recipe.method
        method = method or rules.default(layer.scheme)
        problem = rules.problem(method, layer.scheme, layer.shape)
        if problem is None:
            yield replace(layer, method=method, needs_data=rules.needs_data(method))
            continue
        if problem not in said:  # once, not for every layer
            said.add(problem)
            problems.append(f"{layer.name}: {problem}")
        yield layer


def _expand(
    what: str, patterns: Iterable[str], names: list[str], problems: list[str]
) -> dict[str, str]:
    """Return the first pattern that matches each name; lost patterns become problems."""
    first: dict[str, str] = {}
    for pattern in patterns:
        try:
            hits = match_all(what, [pattern], names)[pattern]
        except PatternError as error:
            problems.append(f"{error.message} ({error.hint})")
            continue
        for name in hits:
            first.setdefault(name, pattern)
    return first


def _unlike_groups(layers: tuple[LayerPlan, ...]) -> Iterable[str]:
    schemes = {layer.name: layer.scheme for layer in layers}
    for group, members in group_by(schemes).items():
        if len({schemes[name] for name in members}) > 1:
            listed = ", ".join(
                f"{name.rsplit('.', 1)[-1]}: {schemes[name]}" for name in members[:6]
            )
            yield (
                f"{group} is run as one matrix by the engines, its layers must share one scheme"
                f" ({listed})"
            )


def _attention_warnings(recipe: Recipe) -> Iterable[str]:
    if recipe.kv_cache is not None and not recipe.kv_cache.symmetric:
        yield "an asymmetric cache is read by MindIE only (vllm-ascend drops offsets in decoding)"
    if recipe.kv_cache and recipe.format == "ascend_v1" and not recipe.kv_cache.after_rotary:
        yield (
            "vllm-ascend rounds keys after the rotary embedding, where kv_cache.after_rotary "
            "measures them"
        )
    if recipe.attention is not None:
        yield "FAQuant attention is read by MindIE only"


def _warnings(layers: tuple[LayerPlan, ...], form: Format, model_dtype: str) -> Iterable[str]:
    if form.name not in ASCEND_FORMATS:
        return
    yield from reader_warnings({layer.name: layer.scheme for layer in layers}, model_dtype)
    changed = [layer for layer in layers if layer.reason == "experts have no static kernel"]
    if changed:
        yield f"{len(changed)} expert layers are {changed[0].scheme}: {changed[0].reason}"
