"""Tests of the quantized layer, of tensors between numpy and torch, of methods and of devices."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from slim_core.errors import (
    DeviceError,
    FormatError,
    InvalidValueError,
    MissingDependencyError,
    NumericalError,
)
from slim_core.layers import QuantizedLinear
from slim_core.microscaling import round_groups
from slim_core.scheme import QuantScheme
from slim_core.two_stage import SECOND_SCALE
from slim_ptq.devices import torch_device
from slim_ptq.methods import MinMax, quantize_minmax, relative_error
from slim_ptq.modules import FakeQuantLinear, on_device
from slim_ptq.tensors import from_numpy, to_numpy


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(scheme: str, *, bias: bool = True, dtype: str = "float32") -> QuantizedLinear:
    parsed = QuantScheme.parse(scheme)
    assert parsed.weight is not None
    parts = quantize_minmax("a.b", randn(6, 64), parsed.weight)
    given = {"bias": randn(6, seed=1)} if bias else {}
    if parsed.is_static:
        given["input_scale"], given["input_offset"] = torch.tensor([0.03]), torch.tensor([-5.0])
    return QuantizedLinear("a.b", parsed, *parts, **given, model_dtype=dtype)


def quantized(scheme: str) -> QuantizedLinear:
    parsed = QuantScheme.parse(scheme)
    assert parsed.weight is not None
    parts = MinMax().quantize("a.b", randn(6, 64), parsed.weight)
    return parts.layer("a.b", parsed, randn(6, seed=1), "float32")


class TestFakeQuantLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scheme", ["w8a16", "w8a16_asym", "w8a16_g32", "w8a16_g32_asym"])
    def test_float_activations(self, scheme: str, bias: bool) -> None:
        given = layer(scheme, bias=bias)
        x = randn(2, 3, 64, seed=2)
        groups = given.weight_scale.shape[1]
        codes = given.codes.double().reshape(6, groups, -1)
        weight = (codes - given.weight_offset[..., None]) * given.weight_scale.double()[..., None]
        expected = x.double() @ weight.reshape(6, 64).T + (given.bias if bias else 0)
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_tensor"])
    def test_static_activations_multiply_integers(self, scheme: str, bias: bool) -> None:
        given = layer(scheme, bias=bias)
        x = randn(2, 3, 64, seed=2)
        codes = np.clip(np.rint(x.numpy() / np.float32(0.03) - 5), -128, 127).astype(np.int64)
        deq = (0.03 * given.weight_scale.double().ravel()).numpy()
        weight = given.codes.numpy().astype(np.int64)
        bias_code = np.rint((given.bias.double().numpy() if bias else 0) / deq + 5 * weight.sum(1))
        expected = (codes @ weight.T + bias_code) * deq
        found = FakeQuantLinear(given, torch.float32)(x)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)

    def test_activations_beyond_the_range_are_clipped(self) -> None:
        module = FakeQuantLinear(layer("w8a8"), torch.float32)
        huge, edge = torch.full((1, 64), 1e6), torch.full((1, 64), (127 + 5) * 0.03)
        torch.testing.assert_close(module(huge), module(edge))

    def test_per_token_activations(self) -> None:
        given = layer("w8a8_dynamic")
        x = randn(2, 3, 64, seed=2) * torch.tensor([0.01, 1.0, 100.0]).reshape(3, 1)
        scale = np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(x.numpy() / scale).astype(np.int64)
        s_w = given.weight_scale.double().numpy().ravel()
        products = codes @ given.codes.numpy().astype(np.int64).T
        expected = products * scale.astype(np.float64) * s_w + given.bias.numpy()
        found = FakeQuantLinear(given, torch.float32)(x)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic", "w8a16"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_output_has_the_dtype_of_the_input(self, scheme: str, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        module = FakeQuantLinear(layer(scheme, dtype=name), dtype)
        assert module(randn(2, 64).to(dtype)).dtype == dtype
        assert module.weight.dtype == dtype

    def test_no_tokens(self) -> None:
        for scheme in ("w8a8", "w8a8_dynamic", "w8a16"):
            assert FakeQuantLinear(layer(scheme), torch.float32)(torch.ones(0, 64)).shape == (0, 6)

    def test_it_gives_its_layer_back(self) -> None:
        given = layer("w8a8")
        back = FakeQuantLinear(given, torch.float32).layer("c.d")
        assert back.name == "c.d"
        for field in ("codes", "weight_scale", "input_scale", "input_offset", "bias"):
            assert torch.equal(getattr(back, field), getattr(given, field))

    def test_four_bit_activations(self) -> None:
        given = quantized("w4a4_dynamic")
        x = randn(2, 3, 64, seed=2)
        scale = x.double().abs().amax(dim=-1, keepdim=True) / 7
        codes = torch.round(x.double() / scale)
        expected = (codes @ given.codes.double().T) * scale * given.weight_scale.double().ravel()
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected + given.bias, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32", "w4a4_dynamic", "w4a8_dynamic"])
    def test_every_code_of_four_bits(self, scheme: str) -> None:
        given = quantized(scheme)
        codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(3))
        codes[:, :16] = torch.arange(-8, 8)
        given = replace(given, codes=codes.to(torch.int8))
        groups = given.weight_scale.shape[1]
        weight = codes.double().reshape(6, groups, -1) * given.weight_scale.double()[..., None]
        x = randn(2, 3, 64, seed=2)
        steps = {"w4a4_dynamic": 7, "w4a8_dynamic": 127}.get(scheme)
        inputs = x.double()
        if steps is not None:
            scale = inputs.abs().amax(dim=-1, keepdim=True) / steps
            inputs = torch.round(inputs / scale) * scale
        expected = inputs @ weight.reshape(6, 64).T + given.bias
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    def test_flatquant_with_identities_is_plain(self) -> None:
        plain, given = quantized("w4a4_dynamic"), quantized("w4a4_flatquant_dynamic")
        x = randn(2, 3, 64, seed=2)
        found = FakeQuantLinear(given, torch.float32)(x)
        assert torch.equal(found, FakeQuantLinear(plain, torch.float32)(x))
        assert any("identities" in note for note in given.notes)

    def test_flatquant_transforms_and_clips_its_input(self) -> None:
        extras = {
            "left_trans": randn(8, 8, seed=3),
            "right_trans": randn(8, 8, seed=4),
            "clip_ratio": torch.tensor([0.5]),
        }
        given = replace(quantized("w4a4_flatquant_dynamic"), extras=extras)
        x = randn(5, 64, seed=2)
        inside = x.double() @ torch.kron(extras["left_trans"], extras["right_trans"]).double()
        scale = 0.5 * inside.abs().amax(dim=-1, keepdim=True) / 7
        codes = torch.round(inside / scale).clamp(-8, 7)
        expected = (codes @ given.codes.double().T) * scale * given.weight_scale.double().ravel()
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected + given.bias, rtol=1e-4, atol=1e-4)

    def test_two_stages_multiply_integers(self) -> None:
        given = quantized("w4a8_dynamic_g32")
        x = randn(2, 3, 64, seed=2)
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        codes = torch.round(x / scale).double()
        integers = given.codes.double().reshape(6, 2, 32) * given.extras[SECOND_SCALE][..., None]
        products = codes @ integers.reshape(6, 64).T
        expected = products * scale * given.weight_scale.double().ravel() + given.bias
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    def test_mixed_activations_are_per_token_in_prefill_and_static_in_decode(self) -> None:
        given = layer("w8a8_mix")
        static = FakeQuantLinear(layer("w8a8"), torch.float32)
        per_token = FakeQuantLinear(layer("w8a8_dynamic"), torch.float32)
        found = FakeQuantLinear(given, torch.float32)
        x = randn(2, 3, 64, seed=2)
        assert torch.equal(found(x), per_token(x))
        assert torch.equal(found(x[:, :1]), static(x[:, :1]))
        assert torch.equal(found(x[0, 0]), static(x[0, 0]))

    @pytest.mark.parametrize("text", ["w8a8_mxfp8", "w4a8_mxfp", "w4a4_mxfp4"])
    def test_activations_in_groups(self, text: str) -> None:
        given = quantized(text)
        x = randn(2, 3, 64, seed=2)
        rounded = round_groups(x, given.scheme.activation)
        expected = rounded.double() @ given.dequantized().double().T + given.bias
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(rounded, x)

    def test_groups_after_a_transform(self) -> None:
        extras = {
            "left_trans": randn(8, 8, seed=3),
            "right_trans": randn(8, 8, seed=4),
            "clip_ratio": torch.ones(1),
        }
        given = replace(quantized("w4a4_mxfp4_flatquant"), extras=extras)
        assert given.scheme.activation is not None
        x = randn(5, 64, seed=2)
        inside = x @ torch.kron(extras["left_trans"], extras["right_trans"])
        rounded = round_groups(inside, given.scheme.activation)
        expected = rounded.double() @ given.multiplied().double().T + given.bias
        found = FakeQuantLinear(given, torch.float32)(x)
        assert float((found - expected).norm() / expected.norm()) < 0.01  # a level may flip
        plain = quantized("w4a4_mxfp4")
        assert torch.equal(given.codes, plain.codes)
        assert not torch.allclose(found, FakeQuantLinear(plain, torch.float32)(x), rtol=0.1)

    def test_fp8_of_each_token_and_channel(self) -> None:
        given = quantized("w8a8fp8_dynamic")
        x = randn(2, 3, 64, seed=2)
        fp8 = ml_dtypes.float8_e4m3fn

        def rounded(values: np.ndarray) -> np.ndarray:
            scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(448)
            return (values / scale).astype(fp8).astype(np.float64) * scale

        expected = rounded(x.numpy()) @ rounded(randn(6, 64).numpy()).T
        found = FakeQuantLinear(given, torch.float32)(x)
        torch.testing.assert_close(
            found.double(), torch.from_numpy(expected) + given.bias, rtol=1e-5, atol=1e-5
        )

    def test_it_shows_what_it_is(self) -> None:
        shown = repr(FakeQuantLinear(layer("w8a16_g32", bias=False), torch.float32))
        assert shown == (
            "FakeQuantLinear(in_features=64, out_features=6, scheme=w8a16_g32, bias=False)"
        )

    def test_moving_keeps_what_is_not_a_tensor(self) -> None:
        moved = on_device(layer("w8a16"), torch.device("meta"))
        assert moved.codes.is_meta
        assert moved.input_scale is None
        assert moved.name == "a.b"


class TestMinMax:
    def test_relative_error(self) -> None:
        weight = randn(6, 64)
        scheme = QuantScheme.parse("w8a16")
        assert scheme.weight is not None

        def quantized(weight: torch.Tensor) -> QuantizedLinear:
            return QuantizedLinear("a", scheme, *quantize_minmax("a", weight, scheme.weight))

        given = quantized(weight)
        back = (given.codes.double() - given.weight_offset) * given.weight_scale.double()
        expected = float((weight.double() - back).norm() / weight.double().norm())
        assert relative_error(weight, given) == pytest.approx(expected, rel=1e-4)
        zeros = torch.zeros(2, 64)
        assert relative_error(zeros, quantized(zeros)) == 0.0

    def test_half_precision_weights_are_quantized_as_their_float32_values(self) -> None:
        scheme = QuantScheme.parse("w8a16").weight
        assert scheme is not None
        for dtype in (torch.float16, torch.bfloat16):
            weight = randn(6, 64).to(dtype)
            one = quantize_minmax("a", weight, scheme)
            other = quantize_minmax("a", weight.float(), scheme)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_errors_name_the_layer(self) -> None:
        scheme = QuantScheme.parse("w8a16_g32").weight
        assert scheme is not None
        with pytest.raises(NumericalError, match=r"the weight of a\.b has 1 NaN or infinite"):
            quantize_minmax("a.b", torch.tensor([[1.0, float("nan")]]), scheme)
        with pytest.raises(FormatError, match="group size 32 does not divide 48"):
            quantize_minmax("a.b", randn(2, 48), scheme)


class TestTensors:
    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64),
            *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
        ],
    )
    def test_there_and_back(self, dtype: torch.dtype) -> None:
        tensor = (randn(3, 4) * 4).to(dtype)
        array = to_numpy(tensor)
        assert array.dtype.itemsize == tensor.element_size()
        back = from_numpy(array)
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))

    def test_values_of_bfloat16(self) -> None:
        array = to_numpy(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
        assert array.dtype == ml_dtypes.bfloat16
        assert array.astype(np.float32).tolist() == [1.5, -2.0]

    def test_memory_is_shared_where_that_is_possible(self) -> None:
        tensor = torch.zeros(4, dtype=torch.bfloat16)
        tensor[1] = 1.0
        array = to_numpy(tensor)
        tensor[2] = 2.0
        assert float(array[2]) == 2.0
        assert to_numpy(torch.zeros(3, 4).T).flags.c_contiguous


class TestDevices:
    def test_cpu(self) -> None:
        assert torch_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["tpu", "", "CPU", "cuda0"])
    def test_unknown_kinds(self, name: str) -> None:
        with pytest.raises(InvalidValueError, match="device must be one of 'cpu', 'npu', 'cuda'"):
            torch_device(name)

    def test_an_npu_without_its_package(self) -> None:
        with pytest.raises(MissingDependencyError, match="torch_npu"):
            torch_device("npu:0")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
    def test_no_such_device(self) -> None:
        with pytest.raises(DeviceError, match="no cuda device is available") as caught:
            torch_device("cuda")
        assert isinstance(caught.value, RuntimeError)

    def test_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert torch_device("cuda:1") == torch.device("cuda:1")
        for name in ("cuda:2", "cuda:x", "cuda:-1"):
            with pytest.raises(DeviceError, match="does not exist, there are 2"):
                torch_device(name)
