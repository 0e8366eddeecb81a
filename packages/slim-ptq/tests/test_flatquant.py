"""FlatQuant: what is trained, what stays as it was, files and back, both interfaces."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slim_core.dtypes import INT4
from slim_core.errors import InvalidValueError, PlanError
from slim_core.kronecker import kronecker_pair, restore_weight, transform_input
from slim_core.progress import writing_events
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig, load_model, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.flatquant import linear as training
from slim_ptq.flatquant import train_block, train_model
from slim_ptq.flatquant.linear import SharedInput, TrainedLinear
from slim_ptq.flatquant.transform import Factor, cayley
from slim_ptq.methods import FlatQuant, LayerInputs
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.parallel import Team
from slim_ptq.pipeline import check_alone
from slim_ptq.prepare import prepare

SCHEME, MX = "w4a4_flatquant_dynamic", "w4a4_mxfp4_flatquant"
WEIGHT, INPUT = (
    TensorScheme(INT4, Granularity.PER_CHANNEL),
    TensorScheme(INT4, Granularity.PER_TOKEN),
)
SHORT = {"name": "flatquant", "epochs": 2}
GROUP = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def windows(rows: int = 4, length: int = 16) -> TokenWindows:
    ids = torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(3))
    return TokenWindows(tuple(ids.split(1)), "random ids")


def samples() -> list[list[torch.Tensor]]:
    return [[ids] for ids in windows().batches]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.cat(windows().batches)).logits
    return found


def linears(model: nn.Module) -> dict[str, FlatQuant]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: FlatQuant(epochs=2) for name in names if ".layers." in name}


# --- transforms -----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 99), st.floats(0.01, 3))
def test_a_factor_stays_invertible(size: int, seed: int, spread: float) -> None:
    factor = Factor(size, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
        matrix, inverse = factor()
        rotation = cayley(factor.outer)
    one = torch.eye(size)
    torch.testing.assert_close(rotation @ rotation.T, one, atol=1e-4, rtol=0)
    scale = float(matrix.abs().max() * inverse.abs().max())
    torch.testing.assert_close(matrix @ inverse.T, one, atol=1e-4 * max(1, scale), rtol=0)


def disturbed(channels: int = 24, out: int = 8) -> tuple[nn.Linear, SharedInput, TrainedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(channels, out)
    index = torch.arange(channels) // 2
    shared = SharedInput(channels, INPUT, 0, torch.ones(channels // 2), index)
    trained = TrainedLinear(layer, WEIGHT, shared)
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    shared.refresh()
    return layer, shared, trained


def test_transforms_and_scales_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, trained = disturbed()
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        assert float((trained(x) - layer(x)).abs().max()) > 0.05  # rounding is there ...
        monkeypatch.setattr(training, "fake_round", lambda x, ratio, scheme: x)
        layer, _, trained = disturbed()
        torch.testing.assert_close(trained(x), layer(x), atol=1e-5, rtol=1e-5)  # ... alone


def test_a_layer_in_training_is_the_layer_that_is_stored(saved_model: Callable[..., Path]) -> None:
    model = load_model(saved_model("llama"))
    learned = {name: seen.learned for name, seen in train(model).items()}
    name = "model.layers.1.mlp.down_proj"
    what = learned[name]
    assert what is not None
    linear = model.get_submodule(name)
    x = torch.randn(2, 7, linear.in_features)
    scheme = QuantScheme.parse(SCHEME)
    assert scheme.weight is not None
    parts = FlatQuant().quantize(name, linear.weight, scheme.weight, LayerInputs(1, learned=what))
    layer = parts.layer(name, scheme, None, "float32")
    shown = restore_weight(layer.multiplied(), what.left, what.right)
    torch.testing.assert_close(layer.dequantized(), shown)
    moved = transform_input(x, what.left, what.right)
    exact = moved @ what.weight(linear.weight.detach()).T
    torch.testing.assert_close(exact, linear(x).detach(), atol=1e-4, rtol=1e-4)
    weight = training.fake_round(what.weight(linear.weight.detach()), what.row_clip, WEIGHT)
    expected = training.fake_round(moved, what.clip_ratio, INPUT) @ weight.T
    with torch.no_grad():
        found = FakeQuantLinear(layer, torch.float32)(x)
    error = (found - expected).norm() / expected.norm()
    assert float(error) < 0.02  # a code may fall to the other side


def train(model: Any) -> dict[str, LayerInputs]:
    methods = linears(model)
    return train_model(model, samples(), methods, dict.fromkeys(methods, QuantScheme.parse(SCHEME)))


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_training_lowers_the_error_and_keeps_the_float_model(
    saved_model: Callable[..., Path], family: str
) -> None:
    model = load_model(saved_model(family))
    before = logits(model)
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    learned = train(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)  # scales went there
    assert learned.keys() == linears(model).keys()
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in learned)
    assert all(p.requires_grad for p in model.parameters())
    for seen in learned.values():
        assert seen.learned is not None
        assert seen.learned.loss_after < 0.95 * seen.learned.loss_before
        assert 0 < float(seen.learned.clip_ratio) <= 1
    first = [learned[name].learned for name in GROUP]
    assert all(torch.equal(one.left, first[0].left) for one in first if one and first[0])
    assert [len(first[0].left), len(first[0].right)] == list(kronecker_pair(64))  # type: ignore[union-attr]


def test_identities_are_plain_w4a4(saved_model: Callable[..., Path], tmp_path: Path) -> None:
    quantize(saved_model("llama"), tmp_path / "flat", scheme=SCHEME, method="minmax")
    quantize(saved_model("llama"), tmp_path / "plain", scheme="w4a4_dynamic")
    assert torch.equal(
        logits(load_model(tmp_path / "flat")), logits(load_model(tmp_path / "plain"))
    )


@pytest.mark.parametrize("scheme", [SCHEME, MX])
def test_training_stops_early_and_is_never_worse_than_plain(
    saved_model: Callable[..., Path], scheme: str
) -> None:
    model = load_model(saved_model("llama"))
    names = linears(model)
    kinds = dict.fromkeys(names, QuantScheme.parse(scheme))
    for lr, most in ((1e-8, 4), (1.0, 12)):  # nothing to gain; far too much
        learned = train_model(
            model, samples(), dict.fromkeys(names, FlatQuant(epochs=12, lr=lr)), kinds
        )
        for seen in learned.values():
            assert seen.learned is not None
            assert seen.learned.epochs <= most
            assert seen.learned.loss_after <= seen.learned.loss_before


def test_the_progress_of_blocks_and_epochs_is_shown(
    saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_model(saved_model("llama"))
    with writing_events(tmp_path / "events.jsonl"):
        train(model)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    stages = [(event["stage"], event["done"], event["total"]) for event in events]
    assert stages == [
        *(("Training model.layers.0", done, 2) for done in (1, 2)),
        ("Training blocks", 1, 2),
        *(("Training model.layers.1", done, 2) for done in (1, 2)),
        ("Training blocks", 2, 2),
    ]


def test_one_block_is_in_memory(
    saved_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a block is trained, the other blocks have no weights."""
    seen: list[tuple[str, float]] = []

    def measured(name: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = {id(parameter) for parameter in block.parameters()}
        parameters = [found for found in gc.get_objects() if type(found) is nn.Parameter]
        others = [p for p in parameters if id(p) not in own and not p.is_meta and p.ndim == 2]
        seen.append((name, sum(p.numel() for p in others)))
        return train_block(name, block, *args, **kwargs)

    monkeypatch.setattr("slim_ptq.pipeline.blockwise.train_block", measured)
    gc.collect()
    before = sum(p.numel() for p in gc.get_objects() if type(p) is nn.Parameter and p.ndim == 2)
    run(saved_model("llama"), tmp_path / "out")
    assert [name for name, _ in seen] == ["model.layers.0", "model.layers.1"]
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert all(size < before + block / 2 for _, size in seen)


def test_experts_are_trained(saved_model: Callable[..., Path], tmp_path: Path) -> None:
    source = saved_model("qwen3_moe")
    report = run(source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").sound
    experts = [layer for layer in report.quantized if ".experts." in layer.name]
    assert len(experts) == 2 * 8 * 3
    assert all("block error" in layer.notes[-1] for layer in experts)
    stored = QuantizedCheckpoint(tmp_path / "out")
    inside = "model.layers.1.mlp.experts"
    gate, up, other = (
        stored.layer(f"{inside}.{name}").extras["left_trans"]
        for name in ("0.gate_proj", "0.up_proj", "1.gate_proj")
    )
    assert (gate == up).all()  # they read one tensor
    assert (gate != other).any()
    for layer in experts:  # logits of a random model say little: routers choose other experts
        before, after = (float(x) for x in re.findall(r"\d\.\d+e[+-]\d+", layer.notes[-1]))
        assert after < 0.95 * before


def test_experts_without_tokens_keep_identities(
    saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe.build(scheme=SCHEME, method=SHORT)
    few = TokenWindows((torch.tensor([[5, 6]]),), "two tokens")
    quantize(saved_model("qwen3_moe"), tmp_path / "out", recipe=recipe, calibration=few)
    stored = QuantizedCheckpoint(tmp_path / "out")
    left = [
        stored.layer(name).extras["left_trans"] for name in stored.layers if ".experts." in name
    ]
    plain = [bool((matrix == torch.eye(len(matrix)).numpy()).all()) for matrix in left]
    assert any(plain)
    assert not all(plain)
    assert verify_checkpoint(tmp_path / "out").sound


def test_models_in_bfloat16(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slim_ptq.calibrator.make_method", lambda spec: FlatQuant(epochs=2))

    def made() -> Any:
        return tiny_model("llama", dtype=torch.bfloat16)

    made().save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out")
    quantize(tmp_path / "in", tmp_path / "plain", scheme="w4a4_dynamic")
    assert verify_checkpoint(tmp_path / "out").sound
    assert error_of(tmp_path / "out", tmp_path / "in") < 0.95 * error_of(
        tmp_path / "plain", tmp_path / "in"
    )
    exact = logits(made()).float()
    distances = []
    for data in (samples(), None):  # in memory, trained and with identities
        model = made()
        config = QuantConfig(w_bit=4, a_bit=4, is_dynamic=True, mm_tensor=False)
        Calibrator(model, config, calib_data=data).run()
        assert model.lm_head.weight.dtype == torch.bfloat16
        distances.append(float(torch.dist(logits(model).float(), exact)))
    assert distances[0] < 0.95 * distances[1]


# --- whole runs -----------------------------------------------------------------------------------


def run(model: Path, out: Path, method: Any = SHORT, **given: Any) -> Any:
    recipe = Recipe.build(scheme=SCHEME, method=method, **given)
    return quantize(model, out, recipe=recipe, calibration=windows())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_better_than_plain_through_files(
    saved_model: Callable[..., Path], tmp_path: Path, rounding: str
) -> None:
    source = saved_model("llama")
    report = run(source, tmp_path / "out", {"name": "flatquant", "rounding": rounding})
    assert verify_checkpoint(tmp_path / "out").sound
    assert all("block error" in layer.notes[-1] for layer in report.quantized)
    quantize(source, tmp_path / "plain", scheme="w4a4_dynamic")
    exact = logits(load_model(source))
    error = torch.dist(logits(load_model(tmp_path / "out")), exact)
    assert error < 0.9 * torch.dist(logits(load_model(tmp_path / "plain")), exact)
    stored = QuantizedCheckpoint(tmp_path / "out")
    q, k, v = (stored.layer(name).extras for name in GROUP)
    for name, tensor in q.items():  # engines keep one of each for the matrix of all three
        assert (tensor == k[name]).all(), name
        assert (tensor == v[name]).all(), name


def test_both_interfaces_make_the_same_layers(
    saved_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved_model("llama")
    run(source, tmp_path / "modern")
    stored = QuantizedCheckpoint(tmp_path / "modern")
    config = QuantConfig(
        w_bit=4, a_bit=4, is_dynamic=True, mm_tensor=False, disable_last_linear=True
    )
    monkeypatch.setattr("slim_ptq.calibrator.make_method", lambda spec: FlatQuant(epochs=2))
    model = load_model(source)
    calibrator = Calibrator(model, config, calib_data=samples())
    calibrator.run()
    calibrator.save(str(tmp_path / "classic"), save_type=["ascendV1"])
    classic = QuantizedCheckpoint(tmp_path / "classic")
    assert stored.layers.keys() == classic.layers.keys()
    for name in stored.layers:
        ours, theirs = stored.layer(name), classic.layer(name)
        assert (ours.codes == theirs.codes).all(), name
        assert (ours.extras["left_trans"] == theirs.extras["left_trans"]).all(), name
    torch.testing.assert_close(logits(model), logits(load_model(tmp_path / "modern")))


def test_classic_without_samples_has_identities(saved_model: Callable[..., Path]) -> None:
    model = load_model(saved_model("llama"))
    config = QuantConfig(w_bit=4, a_bit=4, is_dynamic=True, mm_tensor=False)
    Calibrator(model, config).run()
    left = model.get_submodule(GROUP[0]).get_buffer("left_trans")
    assert torch.equal(left, torch.eye(len(left)))


def error_of(quantized: Path, source: Path) -> float:
    return float(torch.dist(logits(load_model(quantized)), logits(load_model(source))))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"epochs": 0}, {"lr": 0.0}, {"alpha": 1.5}, {"rounding": "up"}, {"seed": -1}]
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(option))):
        FlatQuant(**option)


def test_other_schemes_and_no_data_are_refused(
    saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="method flatquant needs calibration data"):
        quantize(saved_model("llama"), tmp_path / "out", scheme=SCHEME)
    with pytest.raises(PlanError, match="only the schemes with flatquant"):
        quantize(saved_model("llama"), tmp_path / "out", scheme="w4a16", method="flatquant")


def test_several_processes_are_refused(saved_model: Callable[..., Path]) -> None:
    job = prepare(saved_model("llama"), scheme=SCHEME, plan_only=True)
    with pytest.raises(InvalidValueError, match="in one process, not in 2"):
        check_alone(job.plan, Team(0, 2))
    check_alone(job.plan, Team())
    check_alone(prepare(saved_model("llama"), scheme="w4a4_dynamic").plan, Team(0, 2))
