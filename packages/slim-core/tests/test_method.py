"""Tests of methods as recipes name them, and of what a plan makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from slim_core.errors import InvalidTypeError, InvalidValueError, PlanError, RecipeError
from slim_core.formats import FORMATS
from slim_core.method import MINMAX, MethodSpec, OnlyMinMax
from slim_core.plan import Plan, build_plan
from slim_core.recipe import Recipe
from slim_core.scheme import QuantScheme

LAYERS = {"model.layers.0.mlp.up_proj": (64, 64), "model.layers.0.mlp.down_proj": (64, 64)}


class Rules(OnlyMinMax):
    """``learned`` needs data and cannot make 8 bits; asymmetric weights default to ``plain``."""

    def default(self, scheme: QuantScheme) -> MethodSpec:
        symmetric = scheme.weight is None or scheme.weight.symmetric
        return MINMAX if symmetric else MethodSpec("plain")

    def problem(
        self, method: MethodSpec, scheme: QuantScheme, shape: tuple[int, int]
    ) -> str | None:
        wide = scheme.weight is not None and scheme.weight.dtype.bits == 8
        return f"{method} has no 8 bits" if method.name == "learned" and wide else None

    def needs_data(self, method: MethodSpec) -> bool:
        return method.name == "learned"


def plan(*, calibrated: bool = True, rules: Any = None, **recipe: Any) -> Plan:
    made = Recipe.build(**recipe)
    return build_plan(
        LAYERS,
        made,
        FORMATS[made.format],
        model_dtype="float32",
        bytes_before=1_000_000,
        calibrated=calibrated,
        methods=rules,
    )


class TestSpec:
    def test_reading_and_writing(self) -> None:
        assert MethodSpec.parse("gptq") == MethodSpec("gptq")
        spec = MethodSpec.parse({"name": "a", "z": 1, "b": [1, 2]})
        assert spec.options == (("b", (1, 2)), ("z", 1))
        assert hash(spec) == hash(MethodSpec.parse({"z": 1, "b": (1, 2), "name": "a"}))
        assert spec.to_plain() == {"name": "a", "b": [1, 2], "z": 1}
        assert str(spec) == "a(b=(1, 2), z=1)"

    def test_what_is_no_method(self) -> None:
        with pytest.raises(InvalidTypeError, match="method must be str"):
            MethodSpec.parse(3)
        with pytest.raises(InvalidValueError, match="method must have a name"):
            MethodSpec.parse({"damp": 0.1})
        with pytest.raises(InvalidTypeError, match="name of method must be str"):
            MethodSpec.parse({"name": 1})


class TestRecipes:
    def test_round_trip(self) -> None:
        recipe = Recipe.build(
            method={"name": "gptq", "damp": 0.1}, rules=[{"match": "*o_proj", "method": "hqq"}]
        )
        assert Recipe.build(**recipe.to_dict()) == recipe
        assert "name: gptq" in recipe.to_yaml()

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"method": 3}, "method: method must be str"),
            ({"rules": [{"match": "*"}]}, "a rule needs a scheme, a method or both"),
        ],
    )
    def test_mistakes(self, values: dict[str, Any], says: str) -> None:
        with pytest.raises(RecipeError, match=says):
            Recipe.build(**values)


class TestPlans:
    def test_of_the_recipe_or_else_of_the_scheme(self) -> None:
        made = plan(
            rules=Rules(),
            scheme="w4a16",
            method="learned",
        )
        assert {str(layer.method) for layer in made.layers} == {"learned"}
        assert made.needs_calibration
        assert [layer["method"] for layer in made.to_dict()["layers"]] == ["learned"] * 2
        assert {str(layer.method) for layer in plan(rules=Rules(), scheme="w8a16_asym").layers} == {
            "plain"
        }

    def test_a_layer_in_float_has_none(self) -> None:
        made = plan(rules=Rules(), scheme="w4a16", method="learned", exclude=["*up_proj"])
        assert [layer["method"] for layer in made.to_dict()["layers"]] == ["", "learned"]

    def test_problems_are_said_once(self) -> None:
        with pytest.raises(PlanError) as caught:
            plan(rules=Rules(), scheme="w8a16", method="learned")
        assert caught.value.problems == ("model.layers.0.mlp.up_proj: learned has no 8 bits",)
        with pytest.raises(PlanError, match="method learned needs calibration data"):
            plan(rules=Rules(), scheme="w4a16", method="learned", calibrated=False)

    def test_minmax_is_all_there_is_without_rules(self) -> None:
        assert {layer.method for layer in plan(scheme="w4a16").layers} == {MINMAX}
        with pytest.raises(PlanError, match="method gptq is unknown; known is minmax"):
            plan(scheme="w4a16", method="gptq")
