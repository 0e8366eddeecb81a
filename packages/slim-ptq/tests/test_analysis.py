"""Sensitivity of layers: measures against references, the ranking, and how it is shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from slim_core.errors import InvalidValueError
from slim_core.groups import type_group
from slim_core.recipe import Recipe
from slim_ptq import LayerSelector, QuantConfig, analyze, load_model, quantize
from slim_ptq.analysis import Analysis, Metric, Sensitivity
from slim_ptq.analysis.plot import save_plot
from slim_ptq.analysis.ranking import as_python, as_yaml
from slim_ptq.analysis.show import render_analysis
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.cli import app
from slim_ptq.structure import find_linears

METRICS = [metric.value for metric in Metric]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., torch.Tensor]) -> TokenWindows:
    batches = tuple(tiny_ids(24, seed=seed, batch=2) for seed in range(3))
    return TokenWindows(batches, "random tokens")


@pytest.fixture(scope="module")
def calib(data: TokenWindows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calib") / "calib.jsonl"
    rows = [row.tolist() for batch in data.batches for row in batch]
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return file


@pytest.mark.parametrize("metric", METRICS)
def test_groups_are_ranked_together(
    saved_model: Callable[..., Path], data: TokenWindows, metric: str
) -> None:
    found = analyze(saved_model("llama"), calibration=data, metric=metric)
    assert len(found.groups) == 8
    assert [len(group.layers) for group in found.groups].count(3) == 2  # q/k/v of two blocks
    scores = [group.score for group in found.groups]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < math.inf for score in scores)
    for group in found.groups:
        assert {type_group(name) for name in group.layers} == {group.group}
    assert found.data["tokens"] == 144


@pytest.mark.parametrize(("metric", "method"), [("std", "std"), ("quantile", "quantile")])
def test_block_by_block_is_the_same_as_in_memory(
    saved_model: Callable[..., Path], data: TokenWindows, metric: str, method: str
) -> None:
    path = saved_model("llama")
    selector = LayerSelector(load_model(path), range_method=method)
    selector.run([[row[None]] for batch in data.batches for row in batch])
    found = analyze(path, calibration=data, metric=metric)
    for group in found.groups:
        assert group.score == pytest.approx(selector.scores[group.modules[0]], rel=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic", "w8a16", "w8a16_g32"])
def test_layer_error_is_that_of_the_report(
    saved_model: Callable[..., Path], data: TokenWindows, scheme: str, tmp_path: Path
) -> None:
    path = saved_model("llama")
    found = analyze(path, calibration=data, metric="layer_error", scheme=scheme)
    assert {group.scheme for group in found.groups} == {scheme}
    if scheme == "w8a8":  # the other schemes run no model when they quantize
        report = quantize(path, tmp_path / "out", scheme=scheme, calibration=data)
        errors = {layer.name: layer.output_error for layer in report.layers}
        for group in found.groups:
            assert group.score == max(errors[name] for name in group.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_model_error_is_that_of_a_model_with_one_group_quantized(
    saved_model: Callable[..., Path],
    data: TokenWindows,
    family: str,
    scheme: str,
    tmp_path: Path,
) -> None:
    path = saved_model(family)
    found = analyze(path, calibration=data, metric="model_error", scheme=scheme)
    assert found.perplexity is not None
    chosen = found.groups[0]
    others = [name for group in found.groups[1:] for name in group.layers]
    recipe = Recipe.build(scheme=scheme, exclude=others)
    quantize(path, tmp_path / "one", recipe=recipe, calibration=data)
    models = load_model(path), load_model(tmp_path / "one")
    divergence, loss, tokens = 0.0, 0.0, 0
    for ids in data.batches:
        with torch.no_grad():
            expected, quantized = (
                torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1) for model in models
            )
        divergence += float((expected.exp() * (expected - quantized)).sum())
        loss -= float(quantized.gather(2, ids[:, 1:, None]).sum())
        tokens += ids[:, 1:].numel()
    assert chosen.score == pytest.approx(divergence / tokens, rel=1e-2)
    assert chosen.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_a_planted_outlier_is_found_by_every_metric(
    tiny_model: Callable[..., Any],
    plant_outliers: Callable[..., None],
    data: TokenWindows,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    readers = [layer.mlp.gate_proj, layer.mlp.up_proj]
    plant_outliers(layer.post_attention_layernorm, readers, [3], 300.0)
    model.save_pretrained(tmp_path)
    for metric in METRICS:
        found = analyze(tmp_path, calibration=data, metric=metric)
        assert found.groups[0].group == "model.layers.1.mlp.gate_up", metric


def test_layers_in_float_are_not_ranked(
    saved_model: Callable[..., Path], data: TokenWindows
) -> None:
    recipe = Recipe.build(scheme="w8a8", exclude=["*.mlp.*"])
    found = analyze(saved_model("llama"), calibration=data, recipe=recipe)
    assert {group.group.split(".")[3] for group in found.groups} == {"self_attn"}


def test_smoothed_layers(saved_model: Callable[..., Path], data: TokenWindows) -> None:
    recipe = Recipe.build(scheme="w8a8", smooth={"method": "smoothquant"})
    found = analyze(saved_model("llama"), calibration=data, recipe=recipe, metric="layer_error")
    assert len(found.groups) == 8
    with pytest.raises(InvalidValueError, match="smoothing and rotation join layers"):
        analyze(saved_model("llama"), calibration=data, recipe=recipe, metric="model_error")


def test_rotated_layers(
    saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
) -> None:
    path = saved_model("llama")
    recipe = Recipe.build(scheme="w8a8", rotate={})
    found = analyze(path, calibration=data, recipe=recipe, metric="layer_error")
    report = quantize(path, tmp_path / "out", recipe=recipe, calibration=data)
    errors = {layer.name: layer.output_error for layer in report.layers}
    for group in found.groups:
        assert group.score == max(errors[name] for name in group.layers)


def test_the_lists_can_be_pasted(
    saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
) -> None:
    path = saved_model("qwen2_moe")
    found = analyze(path, calibration=data, metric="kurtosis", scheme="w8a8_dynamic")
    count = next(n for n, g in enumerate(found.groups, 1) if g.group.endswith("experts"))
    exclude = yaml.safe_load(as_yaml(found.exclude(count)))["exclude"]
    assert f"{found.groups[count - 1].group}.*" in exclude
    recipe = Recipe.build(scheme="w8a8_dynamic", exclude=exclude)
    report = quantize(path, tmp_path / "out", recipe=recipe)
    floats = {layer.name for layer in report.layers if layer.is_float}
    assert floats == {name for group in found.top(count) for name in group.layers}
    values: dict[str, Any] = {}
    exec(as_python(found.disable_names(count)), values)
    assert QuantConfig(disable_names=values["disable_names"]).disable_names
    model = load_model(path)
    selected = LayerSelector(model, values["disable_names"])
    assert len(selected._linears) == len(floats)
    assert len(find_linears(model)) > len(floats)


class TestShown:
    analysis = Analysis(
        model="<model>",
        scheme="w8a8",
        metric=Metric.MODEL_ERROR,
        data={"source": "a&b", "samples": 1, "tokens": 1234},
        groups=tuple(
            Sensitivity(f"m.{n}.<x>", (f"m.{n}.x",), (f"n.{n}.x",), "w8a8", 1.0 / (n + 1), 10.5)
            for n in range(12)
        ),
        perplexity=10.0,
    )

    def test_page(self) -> None:
        page = render_analysis(self.analysis, 2)
        assert "<x>" not in page
        assert "a&amp;b" in page
        assert "<script" not in page
        assert len(re.findall(r'<rect class="k0"', page)) == 12
        assert "m.1.x" in page
        assert page.index("m.2.&lt;x&gt;: ") < page.index("m.10.&lt;x&gt;: ")
        assert "+5.000 %" in page

    def test_values(self) -> None:
        values = self.analysis.to_dict(2)
        assert values["exclude"] == ["m.0.x", "m.1.x"]
        assert values["disable_names"] == ["n.0.x", "n.1.x"]
        assert [group["rank"] for group in values["groups"]] == list(range(1, 13))
        assert json.loads(json.dumps(values)) == values

    @pytest.mark.parametrize("suffix", ["html", "png"])
    def test_infinite_scores(self, tmp_path: Path, suffix: str) -> None:
        """The input of a layer may be constant."""
        first, *rest = self.analysis.groups
        analysis = replace(self.analysis, groups=(replace(first, score=math.inf), *rest))
        assert analysis.to_dict(1)["groups"][0]["score"] is None
        if suffix == "png":
            pytest.importorskip("matplotlib")
        save_plot(analysis, 3, tmp_path / f"plot.{suffix}")
        assert (tmp_path / f"plot.{suffix}").stat().st_size > 1000


class TestCommand:
    def test_table_and_lists(
        self, saved_model: Callable[..., Path], calib: Path, tmp_path: Path
    ) -> None:
        plot = tmp_path / "plot.html"
        model = saved_model("llama")
        shown = run("analyze", model, "--calib", calib, "--top", 2, "--plot", plot)
        assert shown.exit_code == 0, shown.output
        assert all(len(line) <= 80 for line in shown.stdout.splitlines()[:-1])
        assert "... and 6 less sensitive ones" in shown.stdout
        pasted = shown.stdout.split("# for a recipe\n")[1].split("# for QuantConfig\n")[0]
        expected = analyze(model, calibration=calib)
        assert yaml.safe_load(pasted) == {"exclude": expected.exclude(2)}
        assert plot.read_text().startswith("<!doctype html>")

    def test_json(self, saved_model: Callable[..., Path], calib: Path) -> None:
        args = ("--calib", calib, "--metric", "layer_error", "--scheme", "w8a16", "--json")
        shown = run("analyze", saved_model("llama"), *args)
        values = json.loads(shown.stdout)
        assert values["metric"] == "layer_error"
        assert values["scheme"] == "w8a16"
        assert len(values["groups"]) == 8

    def test_model_error_on_a_text(self, spelling_model: Path, calib: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("some text to read. " * 30)
        args = ("--calib", calib, "--metric", "model_error", "--eval", text, "--json")
        values = json.loads(run("analyze", spelling_model, *args).stdout)
        assert values["data"]["source"] == "text.txt"

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_figure(
        self, saved_model: Callable[..., Path], calib: Path, tmp_path: Path, suffix: str
    ) -> None:
        pytest.importorskip("matplotlib")
        plot = tmp_path / f"plot{suffix}"
        shown = run("analyze", saved_model("llama"), "--calib", calib, "--plot", plot)
        assert shown.exit_code == 0, shown.output
        assert plot.read_bytes()[:4] in (b"\x89PNG", b"<?xm")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--metric", "mse"], "metric must be one of 'std'"),
            (["--top", "0"], "top must be at least 1"),
            (["--plot", "plot.pdf"], "plot must end in .html, .png, .svg"),
            (["--scheme", "w9a9"], "w9a9"),
        ],
    )
    def test_mistakes(
        self, saved_model: Callable[..., Path], calib: Path, change: list[str], message: str
    ) -> None:
        shown = run("analyze", saved_model("llama"), "--calib", calib, *change)
        assert shown.exit_code == 2
        assert message in shown.stderr

    def test_without_data(self, saved_model: Callable[..., Path]) -> None:
        shown = run("analyze", saved_model("llama"))
        assert shown.exit_code == 2
        assert "analyze needs calibration data" in shown.stderr
