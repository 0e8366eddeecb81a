"""Tests of QuantConfig: order and defaults of parameters, rules between them, types, builders."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from slim_core.errors import InvalidTypeError, InvalidValueError, MissingDependencyError, SlimError
from slim_ptq import QuantConfig

ORDER = {
    "w_bit": 8,
    "a_bit": 8,
    "act_method": 1,
    "w_method": "MinMax",
    "disable_names": None,
    "pr": 1.0,
    "mm_tensor": True,
    "dev_type": "cpu",
    "dev_id": None,
    "fraction": 0.01,
    "nonuniform": False,
    "co_sparse": False,
    "w_sym": True,
    "is_lowbit": False,
    "do_smooth": False,
    "use_sigma": False,
    "sigma_factor": 3.0,
    "disable_last_linear": True,
    "use_kvcache_quant": False,
    "open_outlier": True,
    "is_dynamic": False,
    "group_size": 64,
    "percdamp": 0.01,
    "pdmix": False,
}


def test_parameters_stand_in_the_classic_order_with_the_classic_defaults() -> None:
    parameters = inspect.signature(QuantConfig).parameters
    assert {name: item.default for name, item in parameters.items()} == ORDER
    assert list(parameters) == list(ORDER)


def test_the_first_two_positions_are_weight_and_activation_bits() -> None:
    config = QuantConfig(8, 16)
    assert (config.w_bit, config.a_bit) == (8, 16)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, "W8A8"),
        ({"is_dynamic": True}, "W8A8_DYNAMIC"),
        ({"is_dynamic": True, "is_lowbit": True}, "W8A8_DYNAMIC"),
        ({"a_bit": 16}, "W8A16"),
        ({"w_bit": 4, "a_bit": 16}, "W4A16"),
        ({"w_bit": 4, "a_bit": 16, "w_method": "NF"}, "NF4"),
        ({"w_bit": 16, "a_bit": 16}, "FLOAT"),
        ({"co_sparse": True}, "W8A8S"),
        ({"w_bit": 4, "is_lowbit": True}, "W8A8S"),
        (
            {"w_bit": 4, "is_lowbit": True, "open_outlier": False, "is_dynamic": True},
            "W4A8_DYNAMIC",
        ),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, "W4A4_FLATQUANT_DYNAMIC"),
    ],
)
def test_type_of_bits_and_flags(given: dict[str, Any], kind: str) -> None:
    assert QuantConfig(**given).model_quant_type == kind


TYPE = InvalidTypeError
VALUE = InvalidValueError


@pytest.mark.parametrize(
    ("given", "error", "names"),
    [
        ({"w_bit": 4}, TYPE, "w_bit"),
        ({"w_bit": 8.0}, TYPE, "w_bit"),
        ({"w_bit": True}, TYPE, "w_bit"),
        ({"a_bit": "8"}, TYPE, "a_bit"),
        ({"w_bit": 3}, VALUE, "w_bit"),
        ({"a_bit": 4}, VALUE, "a_bit"),
        ({"act_method": 4}, VALUE, "act_method"),
        ({"act_method": 0}, VALUE, "act_method"),
        ({"act_method": "1"}, TYPE, "act_method"),
        ({"act_method": True}, TYPE, "act_method"),
        ({"w_method": 1}, TYPE, "w_method"),
        ({"w_method": "minmax"}, VALUE, "w_method"),
        ({"w_method": "AWQ", "a_bit": 16}, VALUE, "w_method"),
        ({"w_method": "GPTQ"}, VALUE, "w_method"),
        ({"disable_names": "lm_head"}, TYPE, "disable_names"),
        ({"disable_names": ("lm_head",)}, TYPE, "disable_names"),
        ({"disable_names": [1]}, TYPE, r"disable_names\[0\]"),
        ({"pr": 1.5}, VALUE, "pr"),
        ({"pr": -0.1}, VALUE, "pr"),
        ({"pr": "half"}, TYPE, "pr"),
        ({"pr": float("nan")}, VALUE, "pr"),
        ({"mm_tensor": 1}, TYPE, "mm_tensor"),
        ({"dev_type": "cuda"}, VALUE, "dev_type"),
        ({"dev_type": 3}, VALUE, "dev_type"),
        ({"dev_type": "gpu", "dev_id": "0"}, TYPE, "dev_id"),
        ({"dev_type": "gpu", "dev_id": -1}, VALUE, "dev_id"),
        ({"fraction": 0.2}, VALUE, "fraction"),
        ({"fraction": 0.001}, VALUE, "fraction"),
        ({"fraction": "0.01"}, TYPE, "fraction"),
        ({"nonuniform": 0}, TYPE, "nonuniform"),
        ({"co_sparse": None}, TYPE, "co_sparse"),
        ({"w_sym": False}, TYPE, "w_sym"),
        ({"w_sym": "no", "a_bit": 16}, TYPE, "w_sym"),
        ({"sigma_factor": 5.0}, VALUE, "sigma_factor"),
        ({"sigma_factor": 2.9}, VALUE, "sigma_factor"),
        ({"percdamp": 1.5}, VALUE, "percdamp"),
        ({"percdamp": []}, TYPE, "percdamp"),
        ({"is_lowbit": True, "act_method": 3}, VALUE, "act_method"),
        ({"is_dynamic": True, "a_bit": 16}, VALUE, "is_dynamic"),
        ({"is_dynamic": True, "w_bit": 16}, VALUE, "is_dynamic"),
        ({"is_lowbit": True, "open_outlier": False, "a_bit": 16, "group_size": 48}, VALUE, "group"),
        ({"is_lowbit": True, "a_bit": 16, "w_method": "HQQ"}, VALUE, "HQQ"),
        ({"w_method": "NF", "a_bit": 16}, VALUE, "NF"),
        ({"w_method": "NF", "w_bit": 4, "a_bit": 16, "use_kvcache_quant": True}, VALUE, "NF"),
        ({"w_bit": 4, "a_bit": 4}, VALUE, "is_dynamic"),
        (
            {"w_bit": 4, "a_bit": 4, "is_dynamic": True, "disable_last_linear": False},
            VALUE,
            "disable_last_linear",
        ),
        ({"pdmix": True, "is_dynamic": True}, VALUE, "pdmix"),
        ({"pdmix": "yes"}, TYPE, "pdmix"),
    ],
)
def test_wrong_parameters_are_named(
    given: dict[str, Any], error: type[SlimError], names: str
) -> None:
    with pytest.raises(error, match=names):
        QuantConfig(**given)


def test_errors_are_those_that_python_users_expect() -> None:
    with pytest.raises(TypeError, match="w_bit = 4 with a_bit = 8"):
        QuantConfig(w_bit=4)
    with pytest.raises(ValueError, match=r"act_method must be in \[1, 3\], not 4"):
        QuantConfig(act_method=4)


def test_integers_stand_for_floats() -> None:
    config = QuantConfig(pr=1, sigma_factor=3, percdamp=0)
    assert (config.pr, config.sigma_factor, config.percdamp) == (1.0, 3.0, 0.0)
    assert isinstance(config.pr, float)


def test_an_npu_needs_its_package() -> None:
    with pytest.raises(MissingDependencyError, match="torch_npu"):
        QuantConfig(dev_type="npu")
    with pytest.raises(ModuleNotFoundError):
        QuantConfig(dev_type="npu", dev_id=0)


def test_dev_id_is_dropped_on_cpu(caplog: pytest.LogCaptureFixture) -> None:
    config = QuantConfig(dev_type="cpu", dev_id=3)
    assert config.dev_id is None
    assert config.device == "cpu"


def test_group_size_counts_only_for_per_group_weights() -> None:
    assert QuantConfig(a_bit=16, group_size=128).group_size == -1
    assert not QuantConfig(a_bit=16).is_per_group
    grouped = QuantConfig(a_bit=16, is_lowbit=True, open_outlier=False, group_size=128)
    assert grouped.group_size == 128
    assert grouped.is_per_group
    assert grouped.mm_tensor is False


def test_sparse_sets_its_bits_and_pr() -> None:
    config = QuantConfig(co_sparse=True, pr=0.5)
    assert (config.w_bit, config.a_bit, config.pr) == (4, 8, 1.0)


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ({"mm_tensor": False}, "w8a8"),
        ({}, "w8a8_tensor"),
        ({"mm_tensor": False, "is_dynamic": True}, "w8a8_dynamic"),
        ({"mm_tensor": False, "a_bit": 16}, "w8a16"),
        ({"mm_tensor": False, "a_bit": 16, "w_sym": False}, "w8a16_asym"),
        ({"a_bit": 16, "is_lowbit": True, "open_outlier": False, "group_size": 32}, "w8a16_g32"),
        (
            {"a_bit": 16, "is_lowbit": True, "open_outlier": False, "w_sym": False},
            "w8a16_g64_asym",
        ),
        ({"pdmix": True}, "w8a8_mix_tensor"),
        ({"pdmix": True, "mm_tensor": False}, "w8a8_mix"),
        ({"w_bit": 4, "a_bit": 16, "mm_tensor": False}, "w4a16"),
        ({"w_bit": 4, "a_bit": 16, "mm_tensor": False, "w_sym": False}, "w4a16_asym"),
        (
            {
                "w_bit": 4,
                "a_bit": 16,
                "is_lowbit": True,
                "open_outlier": False,
                "group_size": 32,
                "w_sym": False,
            },
            "w4a16_g32_asym",
        ),
        (
            {
                "w_bit": 4,
                "is_lowbit": True,
                "open_outlier": False,
                "is_dynamic": True,
                "group_size": 128,
            },
            "w4a8_dynamic_g128",
        ),
        ({"w_bit": 4, "a_bit": 16, "w_method": "NF"}, "nf4"),
        ({"w_bit": 16, "a_bit": 16}, "float"),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, "w4a4_flatquant_dynamic"),
    ],
)
def test_scheme_of_a_configuration(given: dict[str, Any], scheme: str) -> None:
    assert str(QuantConfig(**given).scheme()) == scheme


class TestBuilders:
    def test_each_returns_the_configuration_itself(self) -> None:
        config = QuantConfig()
        assert config.weight_activation_quant(act_method=2, pr=0.5) is config
        assert (config.act_method, config.pr) == (2, 0.5)

    def test_everything_is_derived_again(self) -> None:
        config = QuantConfig().weight_activation_quant(is_dynamic=True)
        assert config.model_quant_type == "W8A8_DYNAMIC"
        config.weight_activation_quant()
        assert config.model_quant_type == "W8A8"

    def test_weight_quant(self) -> None:
        config = QuantConfig(a_bit=16).weight_quant(mm_tensor=False, w_sym=False)
        assert str(config.scheme()) == "w8a16_asym"

    @pytest.mark.parametrize("size", [32, 100, "64"])
    def test_block_size(self, size: Any) -> None:
        with pytest.raises(InvalidValueError, match="block_size"):
            QuantConfig(a_bit=16).weight_quant(block_size=size)

    def test_sparse_quant_turns_sparsity_on(self) -> None:
        assert QuantConfig().sparse_quant().model_quant_type == "W8A8S"
        assert QuantConfig().sparse_quant(is_lowbit=True).model_quant_type == "W8A8"

    def test_attention_and_cache_exclude_each_other(self) -> None:
        with pytest.raises(InvalidValueError, match="exclude each other"):
            QuantConfig().kv_quant().fa_quant()
        with pytest.raises(InvalidTypeError, match="kv_sym"):
            QuantConfig().kv_quant(kv_sym=1)  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="fa_amp"):
            QuantConfig().fa_quant(fa_amp=-1)

    @pytest.mark.parametrize("size", [3, 1, 32, "2"])
    def test_tp_size(self, size: Any) -> None:
        with pytest.raises(InvalidValueError, match="tp_size"):
            QuantConfig().simulate_tp(size)

    @pytest.mark.parametrize("given", [{"a_bit": 16}, {"is_dynamic": True}, {"pdmix": True}])
    def test_tp_size_goes_with_w8a8_alone(self, given: dict[str, Any]) -> None:
        with pytest.raises(InvalidValueError, match="tp_size"):
            QuantConfig(**given).simulate_tp(2)
        with pytest.raises(InvalidTypeError, match="enable_per_device_quant"):
            QuantConfig().simulate_tp(2, enable_per_device_quant=1)  # type: ignore[arg-type]

    def test_a_refused_change_leaves_the_configuration_as_it_was(self) -> None:
        config = QuantConfig(act_method=2)
        with pytest.raises(InvalidValueError):
            config.weight_activation_quant(act_method=7)
        assert config.act_method == 2
        assert config.weight_activation_quant(act_method=2).model_quant_type == "W8A8"

    def test_derive_leaves_the_original_alone(self) -> None:
        config = QuantConfig(mm_tensor=False)
        twin = config.derive(is_dynamic=True)
        assert (config.model_quant_type, twin.model_quant_type) == ("W8A8", "W8A8_DYNAMIC")
        twin.disable_names.append("x")
        assert config.disable_names == []
