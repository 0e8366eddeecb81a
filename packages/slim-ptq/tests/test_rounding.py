"""Tests of rounding that is learned block by block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from slim_core.dtypes import IntType
from slim_core.errors import InvalidValueError, NumericalError
from slim_core.method import MethodSpec
from slim_core.scheme import Granularity, TensorScheme
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.methods import LayerInputs, Parts
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.methods.grid import WeightGrid
from slim_ptq.methods.minmax import MinMax
from slim_ptq.pipeline import check_alone
from slim_ptq.rounding import Start, train_rounding
from slim_ptq.rounding.linear import RoundedLinear

SCHEMES = [
    TensorScheme(IntType(4), Granularity.PER_CHANNEL, True),
    TensorScheme(IntType(3), Granularity.PER_GROUP, False, 16),
    TensorScheme(IntType(4), Granularity.PER_TENSOR, False),
]


def values(parts: Parts, scheme: TensorScheme) -> torch.Tensor:
    whole = scheme.granularity is Granularity.PER_TENSOR
    shape = (1, 1) if whole else (len(parts.codes), -1)
    grid = WeightGrid(scheme, parts.scale.reshape(shape), parts.offset.reshape(shape))
    return grid.values(parts.codes)


def gptq(layer: nn.Linear, scheme: TensorScheme, x: torch.Tensor) -> Parts:
    x = x.reshape(-1, x.shape[-1])
    hessian = x.T @ x / len(x)
    inputs = LayerInputs(len(x), hessian, hessian.diagonal())
    return GPTQ().quantize("a", layer.weight, scheme, inputs)


class TwoLayers:
    """A block of two layers, and batches for it."""

    def __init__(self, batches: int = 4) -> None:
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32, bias=False))
        mixing = torch.randn(32, 32) * torch.linspace(0.1, 2, 32)
        self.inputs = [torch.randn(2, 64, 32) @ mixing for _ in range(batches)]
        with torch.no_grad():
            self.targets = [self.block(x) for x in self.inputs]

    def __len__(self) -> int:
        return len(self.inputs)

    def run(self, block: nn.Module, batch: int) -> torch.Tensor:
        output: torch.Tensor = block(self.inputs[batch])
        return output

    def target(self, batch: int) -> torch.Tensor:
        return self.targets[batch]

    def starts(self, scheme: TensorScheme, *, nearest: bool = False) -> dict[str, Start]:
        x, found = torch.cat(self.inputs), {}
        for name, module in self.block.named_children():
            if isinstance(module, nn.Linear):
                make = MinMax().quantize("a", module.weight, scheme) if nearest else None
                found[name] = Start(make or gptq(module, scheme, x), scheme)
            with torch.no_grad():
                x = module(x)
        return found

    def error(self, parts: dict[str, Parts], scheme: TensorScheme) -> float:
        weights = {name: self.block.get_submodule(name).weight for name in parts}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(values(parts[name], scheme))
            found = [self.run(self.block, batch) for batch in range(len(self))]
            for name, weight in weights.items():
                weight.copy_(kept[name])
        gaps = zip(found, self.targets, strict=True)
        return sum(float((a - b).square().mean() / b.square().mean()) for a, b in gaps)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_starts_with_the_codes_that_it_is_given(scheme: TensorScheme) -> None:
    two = TwoLayers()
    layer = two.block[0]
    start = two.starts(scheme)["0"]
    rounded = RoundedLinear(layer, start)
    nearest = WeightGrid(scheme, start.parts.scale, start.parts.offset)
    if scheme.granularity is not Granularity.PER_TENSOR:  # GPTQ does not round to nearest
        assert not torch.equal(nearest.codes(layer.weight), start.parts.codes)
    torch.testing.assert_close(rounded.weight, values(start.parts, scheme))
    expected = two.inputs[0] @ values(start.parts, scheme).T + layer.bias
    torch.testing.assert_close(rounded(two.inputs[0]), expected)
    again = rounded.parts("learned")
    assert torch.equal(again.codes, start.parts.codes)
    assert torch.equal(again.scale, start.parts.scale)
    assert again.notes[-1] == "learned"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_of_the_block_falls(scheme: TensorScheme) -> None:
    two = TwoLayers()
    weights = {name: value.clone() for name, value in two.block.state_dict().items()}
    starts = two.starts(scheme, nearest=True)
    made = train_rounding("a", two.block, starts, two, iterations=60, rate=5e-3)
    before = two.error({name: start.parts for name, start in starts.items()}, scheme)
    assert two.error(made, scheme) < 0.8 * before
    for name, value in two.block.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all("block error" in parts.notes[-1] for parts in made.values())
    again = train_rounding("a", two.block, starts, two, iterations=60, rate=5e-3)
    assert all(torch.equal(again[name].codes, made[name].codes) for name in made)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_factor_leaves_the_codes_and_a_shift_the_steps(scheme: TensorScheme) -> None:
    two = TwoLayers()
    start = two.starts(scheme)["0"]
    rounded = RoundedLinear(two.block[0], start)
    nothing = torch.zeros_like(rounded.shift), torch.zeros_like(rounded.factor)
    rounded.step(nothing[0], torch.full_like(rounded.factor, -0.2))
    made = rounded.parts("")
    assert torch.equal(made.codes, start.parts.codes)
    torch.testing.assert_close(made.scale, 1.2 * start.parts.scale)
    rounded.step(torch.full_like(rounded.shift, -9.0), nothing[1])
    made = rounded.parts("")
    steps = made.codes - start.parts.codes
    assert set(steps.unique().tolist()) == {0, 1}
    torch.testing.assert_close(made.scale, 1.2 * start.parts.scale)


def test_a_share_of_the_way_lies_between_the_start_and_the_end() -> None:
    two = TwoLayers()
    start = two.starts(SCHEMES[0])["0"]
    rounded = RoundedLinear(two.block[0], start)
    rounded.step(torch.randn_like(rounded.shift), torch.randn_like(rounded.factor))
    end = rounded.learned()
    assert float(end[0].abs().max()) == 0.5
    assert bool(((end[1] >= 0.5) & (end[1] <= 1.5)).all())
    rounded.go(0.5, end)
    torch.testing.assert_close(rounded.shift.data, end[0] / 2)
    torch.testing.assert_close(rounded.factor.data, (1 + end[1]) / 2)
    rounded.go(0.0, end)
    assert torch.equal(rounded.parts("").codes, start.parts.codes)
    rounded.go(1.0, end)
    torch.testing.assert_close(rounded.learned(), end)


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_of_the_block_never_rises(scheme: TensorScheme, rate: float) -> None:
    two = TwoLayers()
    starts = two.starts(scheme)
    made = train_rounding("a", two.block, starts, two, iterations=40, rate=rate)
    before = two.error({name: start.parts for name, start in starts.items()}, scheme)
    assert two.error(made, scheme) <= before * (1 + 1e-6)


def test_what_serves_the_block_worse_is_not_taken() -> None:
    two = TwoLayers()
    starts = two.starts(SCHEMES[0])
    made = train_rounding("a", two.block, starts, two, iterations=1, rate=0.5)
    for name, start in starts.items():
        assert torch.equal(made[name].codes, start.parts.codes)
        assert torch.equal(made[name].scale, start.parts.scale)
        assert made[name].notes == ("1 steps brought the block no closer: rounded as before them",)
    assert all(
        parts is starts[name].parts
        for name, parts in train_rounding(
            "a", two.block, starts, two, iterations=0, rate=0.5
        ).items()
    )


def test_a_block_that_overflows_is_named() -> None:
    two = TwoLayers()
    starts = two.starts(SCHEMES[0])
    two.inputs[1] = two.inputs[1] * torch.inf
    with pytest.raises(NumericalError, match=r"layers\.3: the error of its output is NaN"):
        train_rounding("layers.3", two.block, starts, two, iterations=1, rate=1e-3)


def windows() -> TokenWindows:
    ids = torch.randint(128, (8, 24), generator=torch.Generator().manual_seed(3))
    return TokenWindows(tuple(ids.split(2)), "random ids")


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_blocks_of_a_model_get_closer_than_with_gptq(
    saved_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = saved_model(family)
    recipe: dict[str, Any] = {"scheme": "w4a16_g32", "method": "signround"}
    report = quantize(model, tmp_path / "out", calibration=windows(), **recipe)
    notes = [note for layer in report.quantized for note in layer.notes]
    learned = [note for note in notes if note.startswith("block error")]
    assert len(learned) == len(report.quantized)
    before, after = (float(number) for number in learned[0].split()[2:5:2])
    assert after < before


def test_several_processes_are_refused() -> None:
    class Layer:
        method = MethodSpec("signround")

    class Plan:
        quantized: ClassVar[dict[str, Any]] = {"a": Layer()}

    class Two:
        size = 2

    plan: Any = Plan()
    team: Any = Two()
    with pytest.raises(InvalidValueError, match="method signround trains each block in one"):
        check_alone(plan, team)
