"""Methods in whole runs: both interfaces, files and back, what the report says, interruptions."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import CalibrationError, PlanError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig, load_model, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.methods import BatchInputs
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.pipeline import batches

VOCAB = 128
Q_PROJ = "model.layers.0.self_attn.q_proj"


def windows(rows: int = 8, length: int = 24) -> TokenWindows:
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    return TokenWindows(tuple(ids.split(1)), "random ids")


def run(model: Path, out: Path, **given: Any) -> Any:
    return quantize(model, out, calibration=windows(), **given)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w4a16", "gptq"),
        ("w4a16_g32_asym", "gptq"),
        ("w4a8_dynamic_g32", "gptq"),
        ("w8a16", "gptq"),
        ("w8a8", "gptq"),
        ("w4a16_g32", "hqq"),
        ("w4a16", "ssz"),
        ("w4a16", "clip"),
        ("w4a16", "signround"),
        ("nf4", "gptq"),
    ],
)
def test_files_hold_what_was_quantized(
    saved_model: Callable[..., Path], tmp_path: Path, scheme: str, method: str
) -> None:
    report = run(saved_model("llama"), tmp_path / "out", scheme=scheme, method=method)
    assert {layer.method for layer in report.quantized} == {method}
    assert verify_checkpoint(tmp_path / "out").sound
    assert all(layer.weight_error < 0.5 for layer in report.quantized)
    run(saved_model("llama"), tmp_path / "plain", scheme=scheme)
    ids = torch.cat(windows().batches)
    with torch.no_grad():
        exact, plain, made = (
            load_model(path)(ids).logits
            for path in (saved_model("llama"), tmp_path / "plain", tmp_path / "out")
        )
    share = float(torch.dist(made, exact) / torch.dist(plain, exact))
    assert share < (1.05 if method == "hqq" or scheme.startswith("w8") else 1.0)


def test_rules_have_their_own_methods(saved_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.build(
        scheme="w4a16",
        method={"name": "gptq", "sweeps": 0},
        rules=[{"match": "*down_proj", "method": "hqq"}, {"match": "*o_proj", "scheme": "w8a16"}],
    )
    report = run(saved_model("llama"), tmp_path / "out", recipe=recipe)
    found = {layer.name: (layer.scheme, layer.method) for layer in report.layers}
    assert found["model.layers.0.mlp.down_proj"] == ("w4a16", "hqq")
    assert found["model.layers.0.self_attn.o_proj"] == ("w8a16", "gptq(sweeps=0)")
    assert found[Q_PROJ] == ("w4a16", "gptq(sweeps=0)")
    assert Recipe.load(tmp_path / "out" / "slim_recipe.yaml") == recipe


class TestProblemsAreFoundBeforehand:
    def test_no_data(self, saved_model: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="method gptq needs calibration data"):
            quantize(saved_model("llama"), tmp_path / "out", scheme="w4a16", method="gptq")
        assert not (tmp_path / "out").exists()

    def test_none_is_needed_without_moments(
        self, saved_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        for method in ("hqq", "ssz", "clip"):
            quantize(saved_model("llama"), tmp_path / method, scheme="w4a16", method=method)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"method": "gtpq"}, "did you mean 'gptq'"),
            ({"method": {"name": "gptq", "damp": 3}}, r"damp must be in \[0, 1\]"),
            ({"method": "signround", "scheme": "nf4"}, "signround cannot quantize to nf4"),
            ({"method": "gptq", "scheme": "w8a8s"}, "its outliers need method sparse"),
        ],
    )
    def test_wrong_methods(
        self, saved_model: Callable[..., Path], tmp_path: Path, given: Any, says: str
    ) -> None:
        recipe = Recipe.build(**{"scheme": "w4a16", **given})
        with pytest.raises(PlanError, match=says):
            run(saved_model("llama"), tmp_path / "out", recipe=recipe)


def test_an_expert_without_tokens_is_rounded_and_that_is_said(
    saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = TokenWindows((torch.full((1, 2), 5),), "one token")  # cannot reach all experts
    report = quantize(
        saved_model("qwen3_moe"),
        tmp_path / "out",
        scheme="w8a16",
        method="gptq",
        calibration=data,
    )
    said = [layer for layer in report.layers if "no calibration token reached it" in str(layer)]
    assert said
    assert all(".experts." in layer.name for layer in said)
    assert verify_checkpoint(tmp_path / "out").sound


@pytest.mark.parametrize(("rows", "length"), [(8, 24), (1, 2)])  # 2 tokens: not for all experts
def test_layers_quantized_together_are_written_as_if_one_by_one(
    saved_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    length: int,
) -> None:
    sizes: list[int] = []
    quantize_batch = GPTQ.quantize_batch

    def counted(self: GPTQ, names: Any, *args: Any) -> Any:
        sizes.append(len(names))
        return quantize_batch(self, names, *args)

    monkeypatch.setattr(GPTQ, "quantize_batch", counted)
    recipe = Recipe.build(
        scheme="w4a16_g32",
        method="gptq",
        rules=[
            {"match": "*experts.1.up_proj", "method": {"name": "gptq", "sweeps": 0}},
            {"match": "*experts.2.down_proj", "method": "hqq"},
            {"match": "*o_proj", "scheme": "w4a16"},
        ],
    )
    reports = []
    for name, most in (("together", batches._MOST_BYTES), ("alone", 0)):
        monkeypatch.setattr(batches, "_MOST_BYTES", most)
        sizes.clear()
        reports.append(
            quantize(
                saved_model("qwen3_moe"),
                tmp_path / name,
                recipe=recipe,
                calibration=windows(rows, length),
            )
        )
        assert (max(sizes) > 1) == (name == "together")
    together, alone = reports
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert (one.name, one.scheme, one.method) == (other.name, other.scheme, other.method)
        assert one.notes == other.notes
        assert one.weight_error == pytest.approx(other.weight_error, rel=1e-2)
        assert (one.seconds > 0) == (other.seconds > 0)
    stored = [QuantizedCheckpoint(tmp_path / name) for name in ("together", "alone")]
    assert list(stored[0].layers) == list(stored[1].layers)
    for layer in stored[0].layers:
        codes = [torch.as_tensor(one.layer(layer).codes) for one in stored]
        assert (codes[0] != codes[1]).float().mean() <= 0.01, layer


def test_moments_are_freed_with_the_last_layer_that_needs_them(
    saved_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessians: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    quantize_batch = GPTQ.quantize_batch

    def watched(self: GPTQ, names: Any, weights: Any, scheme: Any, inputs: BatchInputs) -> Any:
        own = {id(layer.hessian) for layer in inputs.layers}
        kept = {id(seen()) for seen in hessians if seen() is not None}
        alive.append(len(kept - own))
        for layer in inputs.layers:
            assert layer.hessian is not None
            hessians.append(weakref.ref(layer.hessian))
        return quantize_batch(self, names, weights, scheme, inputs)

    monkeypatch.setattr(GPTQ, "quantize_batch", watched)
    monkeypatch.setattr(batches, "_MOST_BYTES", 0)
    run(saved_model("llama"), tmp_path / "out", scheme="w4a16", method="gptq")
    assert len(alive) == 14
    assert set(alive) == {0}


def test_rounding_is_learned_for_experts_that_some_batches_do_not_reach(
    saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    ids = torch.randint(VOCAB, (6, 3), generator=torch.Generator().manual_seed(3))
    data = TokenWindows(tuple(ids.split(1)), "3 tokens a batch, 2 of 8 experts for each")
    recipe = Recipe.build(scheme="w4a16", method={"name": "signround", "iterations": 12})
    report = quantize(saved_model("qwen3_moe"), tmp_path / "out", recipe=recipe, calibration=data)
    assert verify_checkpoint(tmp_path / "out").sound
    learned = [layer for layer in report.layers if ".experts." in layer.name and layer.notes]
    assert any("12 steps" in note for layer in learned for note in layer.notes)


@pytest.mark.parametrize("when", ["first", "later"])
def test_an_interrupted_run_leaves_no_output(
    saved_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    calls = {"count": 0}
    quantize_weight = GPTQ.quantize

    def interrupted(self: GPTQ, *args: Any) -> Any:
        calls["count"] += 1
        if when == "first" or calls["count"] == 9:
            raise KeyboardInterrupt
        return quantize_weight(self, *args)

    monkeypatch.setattr(GPTQ, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(saved_model("llama"), tmp_path / "out", scheme="w4a16", method="gptq")
    assert not (tmp_path / "out").exists()


class TestClassicInterface:
    def samples(self) -> list[list[torch.Tensor]]:
        return [[batch] for batch in windows().batches]

    def config(self, method: str, **given: Any) -> QuantConfig:
        values = {"w_bit": 4, "a_bit": 16, "mm_tensor": False, "w_sym": False, **given}
        return QuantConfig(w_method=method, **values)

    @pytest.mark.parametrize("group", [0, 32])
    def test_gptq_has_a_far_smaller_output_error(
        self, tiny_model: Callable[..., Any], group: int
    ) -> None:
        grouped = {"is_lowbit": True, "open_outlier": False, "group_size": 32} if group else {}
        seen: list[torch.Tensor] = []
        errors = {}
        for method in ("MinMax", "GPTQ"):
            model = tiny_model("llama")
            linear = model.get_submodule(Q_PROJ)
            weight = linear.weight.detach().clone()
            handle = linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            with torch.no_grad():
                model(self.samples()[0][0])
            handle.remove()
            Calibrator(model, self.config(method, **grouped), calib_data=self.samples()).run()
            made = model.get_submodule(Q_PROJ)
            assert isinstance(made, FakeQuantLinear)
            error = seen[-1] @ (made.weight - weight).T
            errors[method] = float(error.square().sum())
        assert errors["GPTQ"] < 0.75 * errors["MinMax"]

    @pytest.mark.parametrize("method", ["GPTQ", "HQQ"])
    def test_both_interfaces_give_the_same_integers(
        self,
        tiny_model: Callable[..., Any],
        saved_model: Callable[..., Path],
        tmp_path: Path,
        method: str,
    ) -> None:
        model = tiny_model("llama")
        Calibrator(model, self.config(method), calib_data=self.samples()).run()
        name = {"name": "gptq", "damp": 0.01} if method == "GPTQ" else "hqq"
        recipe = Recipe.build(scheme="w4a16_asym", method=name)
        run(saved_model("llama"), tmp_path / "out", recipe=recipe)
        stored = QuantizedCheckpoint(tmp_path / "out")
        for layer in stored.layers:
            classic = model.get_submodule(layer)
            assert torch.equal(classic.codes, torch.as_tensor(stored.layer(layer).codes)), layer

    def test_gptq_needs_samples_and_hqq_does_not(self, tiny_model: Callable[..., Any]) -> None:
        with pytest.raises(CalibrationError, match="w_method 'GPTQ' needs samples"):
            Calibrator(tiny_model("llama"), self.config("GPTQ"))
        Calibrator(tiny_model("llama"), self.config("HQQ")).run()

    def test_percdamp_reaches_the_method(self) -> None:
        config = self.config("GPTQ", percdamp=0.1)
        assert str(config.method(config.scheme())) == "gptq(damp=0.1)"

    def test_an_interrupted_run_leaves_the_float_model(
        self, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(self: GPTQ, *args: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(GPTQ, "quantize", interrupted)
        model = tiny_model("llama")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(KeyboardInterrupt):
            Calibrator(model, self.config("GPTQ"), calib_data=self.samples()).run()
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_searched_blocks_must_not_cross_rows(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model("llama", intermediate_size=96).save_pretrained(tmp_path / "in")
    with pytest.raises(PlanError, match=r"down_proj.*blocks of 64 cross the ends of rows of 96"):
        quantize(tmp_path / "in", tmp_path / "out", scheme="nf4", method="clip")
    quantize(tmp_path / "in", tmp_path / "out", scheme="nf4")
