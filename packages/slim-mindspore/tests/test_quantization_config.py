import pytest
import yaml

from slim_core.errors import RecipeError
from slim_mindspore import QuantizationConfig
from slim_mindspore.algorithm_args import AwqArgs, GptqArgs, SmoothArgs
from slim_mindspore.approaches import APPROACHES, from_approach

# The five blocks that MindFormers ships, by what they say.
SHIPPED = {
    "rtn 13b": """
        quant_method: 'rtn'
        weight_dtype: 'int8'
        activation_dtype: None
        kvcache_dtype: None
        outliers_suppression: None
        modules_to_not_convert: ['lm_head']
        algorithm_args: {}
    """,
    "rtn 70b": """
        quant_method: 'rtn'
        weight_dtype: 'int8'
        activation_dtype: None
        modules_to_not_convert: ['lm_head']
        algorithm_args: {}
    """,
    "smooth_quant": """
        quant_method: 'smooth_quant'
        weight_dtype: 'int8'
        activation_dtype: 'int8'
        kvcache_dtype: None
        outliers_suppression: smooth
        modules_to_not_convert: ['lm_head', 'w2']
        algorithm_args: {}
    """,
    "smooth_quant with alpha": """
        quant_method: 'smooth_quant'
        weight_dtype: 'int8'
        activation_dtype: 'int8'
        outliers_suppression: 'smooth'
        modules_to_not_convert: ['lm_head', 'w2']
        algorithm_args: {alpha: 0.7}
    """,
    "ptq": """
        quant_method: 'ptq'
        weight_dtype: 'int8'
        activation_dtype: 'int8'
        kvcache_dtype: 'int8'
        outliers_suppression: 'smooth'
        modules_to_not_convert: ['lm_head', 'w2']
        algorithm_args: {}
    """,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_blocks(name):
    values = yaml.safe_load(SHIPPED[name])
    config = QuantizationConfig.from_dict(values)
    assert config.quant_method == values["quant_method"]
    assert config.scheme_of("lm_head").is_float
    expected = {"rtn": "w8a16", "smooth_quant": "w8a8", "ptq": "w8a8"}[config.quant_method]
    assert str(config.scheme_of("model.layers.0.attention.wq")) == expected
    if expected == "w8a8":
        assert config.scheme_of("model.layers.0.feed_forward.w2").is_float
        assert config.smooth_args() == SmoothArgs(alpha=0.7 if "alpha" in name else 0.5)


def test_none_null_and_absent_are_the_same():
    base = {"quant_method": "rtn", "weight_dtype": "int8"}
    keys = (
        "activation_dtype",
        "kvcache_dtype",
        "outliers_suppression",
        "precision_recovery",
        "modules_to_not_convert",
        "algorithm_args",
        "layer_policies",
        "weight_quant_granularity",
        "group_size",
    )
    absent = QuantizationConfig.from_dict(base)
    for value in (None, "None", "none"):
        assert QuantizationConfig.from_dict(base | dict.fromkeys(keys, value)) == absent


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "quant_method: Field required"),
        ({"quant_method": "hqq"}, "quant_method: .*'rtn', 'smooth_quant' or 'ptq', not 'hqq'"),
        ({"weight_dtype": "int3"}, "weight_dtype: .*'int8' or 'int4', not 'int3'"),
        ({"bits": 8}, "bits: unknown key; known are weight_dtype, activation_dtype"),
        ({"weight_dtype": None}, "weight_dtype and kvcache_dtype are both None"),
        ({"activation_dtype": "int8"}, "quant_method rtn .*activation_dtype"),
        ({"outliers_suppression": "smooth"}, "quant_method rtn .*outliers_suppression"),
        ({"quant_method": "ptq", "weight_dtype": None, "activation_dtype": "int8"}, "weight_dtype"),
        (
            {"quant_method": "ptq", "weight_dtype": "int4", "activation_dtype": "int8"},
            "activation_dtype int8 needs weight_dtype int8",
        ),
        (
            {
                "quant_method": "smooth_quant",
                "activation_dtype": "int8",
                "outliers_suppression": "smooth",
                "kvcache_dtype": "int8",
            },
            "quant_method smooth_quant .*kvcache_dtype",
        ),
        ({"group_size": 64}, "group_size must be .*not 64"),
        (
            {"weight_quant_granularity": "per_group", "group_size": 48},
            "group_size must be .*not 48",
        ),
        ({"act_quant_granularity": "per_token"}, "per_token needs activation_dtype int8"),
        ({"kvcache_quant_granularity": "per_token"}, "per_token needs kvcache_dtype int8"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [""]}, "modules_to_not_convert"),
        ({"algorithm_args": {"alpha": 0.5}}, "algorithm_args must be empty"),
        ({"quant_method": "ptq", "layer_policies": {"(": {}}}, "'\\(' is no regular expression"),
        (
            {"quant_method": "ptq", "layer_policies": {"w2": {"dtype": "int8"}}},
            "layer_policies.w2.dtype",
        ),
        (
            {"quant_method": "ptq", "outliers_suppression": "smooth", "algorithm_args": {"a": 1}},
            r"algorithm_args\.a: Extra inputs are not permitted, found 1",
        ),
        (
            {
                "quant_method": "ptq",
                "precision_recovery": "gptq",
                "algorithm_args": {"damp_percent": 2},
            },
            r"algorithm_args\.damp_percent: Input should be less than or equal to 1, found 2",
        ),
        (
            {
                "quant_method": "ptq",
                "activation_dtype": "int8",
                "precision_recovery": "gptq",
            },
            "precision_recovery gptq needs activation_dtype None",
        ),
        (
            {
                "quant_method": "ptq",
                "outliers_suppression": "awq",
                "precision_recovery": "gptq",
            },
            "outliers_suppression awq and precision_recovery gptq clash",
        ),
    ],
)
def test_bad_values(values, message):
    base = {"quant_method": "rtn", "weight_dtype": "int8"} if values else {}
    with pytest.raises(RecipeError, match=message):
        QuantizationConfig.from_dict(base | values)
    with pytest.raises(ValueError, match="quantization_config is not valid"):
        QuantizationConfig.from_dict(base | values)


def test_not_a_mapping():
    with pytest.raises(RecipeError, match="must be a mapping, not str"):
        QuantizationConfig.from_dict("rtn")


def test_layer_policies():
    config = QuantizationConfig.build(
        quant_method="ptq",
        weight_dtype="int4",
        weight_quant_granularity="per_group",
        group_size=64,
        layer_policies={
            r"w2$": {"weight_dtype": "int8"},
            r"layers\.0\.": {"weight_dtype": "int8", "activation_dtype": "int8"},
            "wo": {},
        },
    )
    found = [
        str(config.scheme_of(f"model.layers.{name}"))
        for name in ("1.attention.wq", "0.feed_forward.w2", "0.attention.wo", "1.attention.wo")
    ]
    assert found == ["w4a16_g64", "w8a16", "w8a8", "float"]


def test_options_of_the_algorithms():
    config = QuantizationConfig.build(
        quant_method="ptq",
        weight_dtype="int4",
        precision_recovery="gptq",
        algorithm_args={"damp_percent": 0.05, "desc_act": True},
    )
    assert config.gptq_args() == GptqArgs(damp_percent=0.05, desc_act=True)
    assert config.awq_args() is None
    config = QuantizationConfig.build(
        quant_method="ptq",
        weight_dtype="int4",
        outliers_suppression="awq",
        algorithm_args={"smooth_alpha": 0.5, "weight_clip_ratio": 1.0},
    )
    assert config.awq_args() == AwqArgs(smooth_alpha=0.5, weight_clip_ratio=1.0)
    assert not config.scheme_of("w").weight.symmetric
    assert len(AwqArgs().alphas) == 20


def test_approaches():
    assert APPROACHES == ("rtn-a16w8", "rtn-c8", "smooth_quant", "ptq")
    assert from_approach("rtn-c8", {}).kvcache_dtype == "int8"
    assert from_approach("smooth_quant", {}).modules_to_not_convert == ("lm_head", "w2")
    assert from_approach("ptq", {"weight_dtype": "int4"}).weight_dtype == "int4"
    with pytest.raises(ValueError, match="rtn-a16w8 fixes weight_dtype to 'int8'"):
        from_approach("rtn-a16w8", {"weight_dtype": "int4"})
    with pytest.raises(ValueError, match="approach must be one of"):
        from_approach("rtn", {})
    with pytest.raises(RecipeError, match="approach ptq is not valid"):
        from_approach("ptq", {})
