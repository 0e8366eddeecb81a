"""Tests of plans: the scheme of every layer, all problems at once, sizes, warnings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slim_core.errors import PlanError
from slim_core.formats import FORMATS
from slim_core.plan import Plan, build_plan, dynamic_variant
from slim_core.recipe import Recipe
from slim_core.scheme import QuantScheme

LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
DENSE = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()}
EXPERT = "model.layers.0.mlp.experts"
MOE = {
    "model.layers.0.self_attn.o_proj": (64, 64),
    **{f"{EXPERT}.{n}.{p}_proj": (32, 64) for n in range(4) for p in ("gate", "up")},
    **{f"{EXPERT}.{n}.down_proj": (64, 32) for n in range(4)},
}


def plan(
    linears: Any = DENSE,
    *,
    model_dtype: str = "float32",
    calibrated: bool = True,
    before: int = 1_000_000,
    **recipe: Any,
) -> Plan:
    made = Recipe.build(**recipe)
    return build_plan(
        linears,
        made,
        FORMATS[made.format],
        model_dtype=model_dtype,
        bytes_before=before,
        calibrated=calibrated,
    )


def schemes(made: Plan) -> dict[str, str]:
    return {layer.name: str(layer.scheme) for layer in made.layers}


def problems(*args: Any, **given: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan(*args, **given)
    return caught.value.problems


class TestSchemes:
    def test_one_for_all(self) -> None:
        made = plan(scheme="w8a16")
        assert set(schemes(made).values()) == {"w8a16"}
        assert list(schemes(made)) == list(DENSE)
        assert made.model_type == "W8A16"
        assert not made.needs_calibration

    def test_exclusion_goes_before_rules_and_the_first_rule_decides(self) -> None:
        made = plan(
            scheme="w8a8",
            exclude=["*.0.mlp.down_proj"],
            rules=[
                {"match": "*down_proj", "scheme": "w8a8_dynamic"},
                {"match": "*.1.*down_proj", "scheme": "float"},
            ],
        )
        found = {layer.name: (str(layer.scheme), layer.reason) for layer in made.layers}
        assert found["model.layers.0.mlp.down_proj"] == (
            "float",
            "excluded by '*.0.mlp.down_proj'",
        )
        assert found["model.layers.1.mlp.down_proj"] == ("w8a8_dynamic", "rule '*down_proj'")
        assert found["model.layers.1.mlp.up_proj"] == ("w8a8", "recipe")
        assert made.model_type == "W8A8"
        assert len(made.quantized) == 13

    def test_experts_are_per_token_and_that_is_said(self) -> None:
        made = plan(MOE, scheme="w8a8")
        found = schemes(made)
        assert found["model.layers.0.self_attn.o_proj"] == "w8a8"
        assert {s for name, s in found.items() if "experts" in name} == {"w8a8_dynamic"}
        assert any("12 expert layers are w8a8_dynamic" in warning for warning in made.warnings)

    def test_routers_stay_in_float(self) -> None:
        made = plan({**MOE, "model.layers.0.mlp.gate": (4, 64)}, scheme="w8a16")
        assert schemes(made)["model.layers.0.mlp.gate"] == "float"

    def test_dynamic_variant(self) -> None:
        for text in ("w8a8", "w8a8_tensor"):
            assert str(dynamic_variant(QuantScheme.parse(text))) == "w8a8_dynamic"
        for text in ("w8a16_g32", "w8a8_dynamic", "float"):
            assert str(dynamic_variant(QuantScheme.parse(text))) == text


class TestProblems:
    def test_all_at_once(self) -> None:
        found = problems(
            scheme="w8a16_g48", exclude=["*.nothing"], rules=[{"match": "*zip", "scheme": "float"}]
        )
        assert any("'*.nothing'" in problem for problem in found)
        assert any("'*zip'" in problem for problem in found)
        assert sum("cannot be w8a16_g48 in ascend_v1" in problem for problem in found) == 14

    def test_a_near_miss_is_named(self) -> None:
        (found,) = problems(exclude=["model.layers.0.mlp.dwn_proj"])
        assert "'model.layers.0.mlp.down_proj'" in found

    def test_groups_must_divide(self) -> None:
        found = problems({"model.layers.0.self_attn.o_proj": (64, 80)}, scheme="w8a16_g32")
        assert "model.layers.0.self_attn.o_proj" in found[0]
        assert "does not divide its 80 input channels" in found[0]

    @pytest.mark.parametrize("part", ["q_proj", "up_proj"])
    def test_layers_of_one_matrix_share_a_scheme(self, part: str) -> None:
        found = problems(rules=[{"match": f"*.0.*{part}", "scheme": "float"}])
        assert len(found) == 1
        assert "must share one scheme" in found[0]
        assert f"{part}: float" in found[0]

    def test_experts_of_a_layer_share_a_scheme(self) -> None:
        rule = {"match": "*.experts.2.*", "scheme": "w8a16"}
        found = problems(MOE, scheme="w8a8_dynamic", rules=[rule])
        assert len(found) == 1
        assert found[0].startswith(f"{EXPERT} is run as one matrix")

    def test_experts_have_no_static_kernel(self) -> None:
        found = problems(MOE, scheme="w8a16", rules=[{"match": "*.experts.*", "scheme": "w8a8"}])
        assert len(found) == 12
        assert "use the _dynamic scheme" in found[0]

    def test_one_group_size(self) -> None:
        rule = {"match": "*o_proj", "scheme": "w8a16_g64"}
        assert "[32, 64]" in problems(scheme="w8a16_g32", rules=[rule])[0]

    def test_static_schemes_need_data(self) -> None:
        assert "need calibration data" in problems(calibrated=False)[0]
        assert plan(calibrated=False, scheme="w8a8_dynamic")

    def test_nothing_to_do(self) -> None:
        assert "no linear layer" in problems({})[0]
        assert "leaves every layer" in problems(scheme="float")[0]

    def test_the_error_lists_them(self) -> None:
        with pytest.raises(PlanError, match=r"the plan has 2 problems:\n  - ") as caught:
            plan(exclude=["a", "b"])
        assert isinstance(caught.value, ValueError)


class TestSizes:
    @pytest.mark.parametrize(
        ("scheme", "dtype", "expected"),
        [
            ("w8a16", "float32", 64 * 128 + 64 * 8),
            ("w8a8_dynamic", "bfloat16", 64 * 128 + 64 * 8),
            ("w8a16_g32", "float32", 64 * 128 + 64 * 4 * 8),
            ("w8a8", "float16", 64 * 128 + 64 * 8 + 8 + 64 * 4 + 64 * 8),
            ("w8a8", "bfloat16", 64 * 128 + 64 * 8 + 8 + 64 * 4 + 64 * 4),
        ],
    )
    def test_of_a_layer(self, scheme: str, dtype: str, expected: int) -> None:
        linears = {"model.layers.0.mlp.down_proj": (64, 128)}
        made = plan(linears, scheme=scheme, model_dtype=dtype)
        assert made.layers[0].nbytes(FORMATS[made.format], dtype) == expected
        width = 4 if dtype == "float32" else 2
        assert made.bytes_after == 1_000_000 - (64 * 128 * width - expected)

    def test_a_float_layer_keeps_its_size(self) -> None:
        made = plan(exclude=["*.0.*"], scheme="w8a16", model_dtype="bfloat16")
        assert made.layers[0].nbytes(FORMATS[made.format], "bfloat16") == 64 * 64 * 2

    def test_group_size(self) -> None:
        assert plan(scheme="w8a16").group_size == 0
        assert plan(scheme="w8a16_g32", exclude=["*.0.*"]).group_size == 32


class TestWarnings:
    @pytest.mark.parametrize(
        ("scheme", "says"),
        [
            ("w8a16_asym", "MindIE (vllm-ascend adds the offset)"),
            ("w8a16_g32", "read by MindIE only"),
            ("w8a8_tensor", "per-tensor weights"),
        ],
    )
    def test_engines_that_will_not_read_it(self, scheme: str, says: str) -> None:
        assert any(says in warning for warning in plan(scheme=scheme).warnings)
        assert plan(scheme=scheme, format="float").warnings == ()

    def test_none_for_what_all_engines_read(self) -> None:
        for scheme in ("w8a8", "w8a8_dynamic", "w8a16"):
            assert plan(scheme=scheme).warnings == ()


def test_as_plain_values() -> None:
    made = plan(scheme="w8a8", exclude=["*.0.mlp.down_proj"])
    found = json.loads(json.dumps(made.to_dict()))
    assert found["model_type"] == "W8A8"
    assert found["needs_calibration"] is True
    assert found["group_size"] == 0
    assert len(found["layers"]) == 14
    assert found["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert found["layers"][0]["shape"] == [64, 64]
    assert found["layers"][0]["scheme"] == "w8a8"


def test_memory_of_a_calibrated_run_is_that_of_one_block() -> None:
    block = 4 * sum(rows * columns for rows, columns in LAYER.values())
    for depth in (2, 8):
        layers = {
            f"model.layers.{n}.{k}": shape for n in range(depth) for k, shape in LAYER.items()
        }
        outside = 1000
        made = plan(layers, before=depth * block + 4 * outside)
        assert made.memory == 3 * block + 4 * outside


def test_memory_of_a_weights_only_run_is_that_of_the_largest_weight() -> None:
    assert plan(scheme="w8a16").memory == 4 * 4 * 128 * 64 + 2**26
