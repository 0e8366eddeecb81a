"""The search for the fewest fallback layers: targets, bisection, resumption, and real models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from slim_core.errors import InvalidTypeError, InvalidValueError, OutputExistsError
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import evaluate_text, quantize, tune
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.cli import app
from slim_ptq.tuning import Target
from slim_ptq.tuning import run as tuning
from slim_ptq.tuning.candidates import Candidates
from slim_ptq.tuning.search import smallest_prefix, spare


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "reference", "bound", "good", "bad"),
        [
            ("ppl+1%", 20.0, 20.2, 20.1, 20.3),
            ("ppl+0.5", 20.0, 20.5, 20.5, 20.6),
            ("ppl<=24.5", 20.0, 24.5, 24.0, 25.0),
            ("perplexity + 2 %", 20.0, 20.4, 20.4, 20.5),
            ("accuracy-1%", 0.8, 0.792, 0.8, 0.79),
            ("acc-0.01", 0.8, 0.79, 0.79, 0.78),
            ("accuracy>=.5", 0.8, 0.5, 0.6, 0.4),
        ],
    )
    def test_bounds(
        self, text: str, reference: float, bound: float, good: float, bad: float
    ) -> None:
        target = Target.parse(text)
        assert target.bound(reference) == pytest.approx(bound)
        assert target.met(good, reference)
        assert not target.met(bad, reference)
        assert Target.parse(str(target)) == target

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ppl", "must look like"),
            ("loss+1%", "must look like"),
            ("ppl-1%", "a lower perplexity is better"),
            ("accuracy+1%", "a higher accuracy is better"),
            ("ppl<=24%", "a bound has no %"),
            ("ppl+-1", "must look like"),
        ],
    )
    def test_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(InvalidValueError, match=message):
            Target.parse(text)

    def test_type(self) -> None:
        with pytest.raises(InvalidTypeError, match="target must be str"):
            Target.parse(1.0)  # type: ignore[arg-type]


class TestSearch:
    @given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
    def test_bisection(self, sizes: tuple[int, int]) -> None:
        count, needed = sizes
        asked: list[int] = []

        def meets(k: int) -> bool:
            asked.append(k)
            return k >= needed

        assert smallest_prefix(count, meets) == needed
        assert len(asked) == len(set(asked)) <= max(count, 1).bit_length() + 1
        assert count not in asked or count == 0

    @given(st.lists(st.booleans(), max_size=40))
    def test_what_is_found_meets_and_one_less_does_not(self, holds: list[bool]) -> None:
        """Also where more is not always better."""

        def meets(k: int) -> bool:
            return k == len(holds) or holds[k]

        k = smallest_prefix(len(holds), meets)
        assert meets(k)
        assert k == 0 or not meets(k - 1)

    @given(st.sets(st.integers(0, 9)), st.integers(1, 10))
    def test_spare(self, needed: set[int], count: int) -> None:
        names = [str(n) for n in range(count)]
        must = {str(n) for n in needed if n < count} | {names[-1]}  # the last one was found needed

        def meets(rest: Sequence[str]) -> bool:
            return must <= set(rest)

        assert set(spare(names, meets)) == must


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def model(
    tiny_model: Callable[..., Any],
    plant_outliers: Callable[..., None],
    letter_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a model that two groups of layers make hard to quantize."""
    built = tiny_model("llama")
    first, second = built.model.layers
    plant_outliers(
        first.post_attention_layernorm, [first.mlp.gate_proj, first.mlp.up_proj], [3], 300.0
    )
    attention = second.self_attn
    readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    plant_outliers(second.input_layernorm, readers, [7], 900.0)
    path = tmp_path_factory.mktemp("hard") / "model"
    built.save_pretrained(path)
    letter_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., torch.Tensor]) -> TokenWindows:
    return TokenWindows((tiny_ids(32, seed=1, batch=4),), "random tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return file


HARD = {"model.layers.0.mlp.gate_up", "model.layers.1.self_attn.qkv"}


@pytest.fixture(scope="module")
def bound(model: Path, data: TokenWindows, text: Path, tmp_path_factory: Any) -> float:
    """Return a perplexity that is met with the two hard groups in float, and with no fewer."""
    target = tmp_path_factory.mktemp("best") / "out"
    exclude = ["*.0.mlp.gate_proj", "*.0.mlp.up_proj", "*.1.self_attn.[qkv]_proj"]
    quantize(model, target, recipe=Recipe.build(exclude=exclude), calibration=data)
    return evaluate_text(target, text).value * 1.0001


def test_the_hard_layers_are_found(
    model: Path, data: TokenWindows, text: Path, bound: float, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = tune(model, out, target=f"ppl<={bound}", calibration=data, data=text)
    assert set(found.groups) == HARD
    assert found.value == evaluate_text(out, text).value <= bound
    assert len(found.trials) <= 5
    assert all(t.value > bound for t in found.trials if len(t.groups) < 2)
    assert verify_checkpoint(out).sound
    report = json.loads((out / "slim_report.json").read_text())
    floats = {layer["name"] for layer in report["layers"] if layer["scheme"] == "float"}
    assert floats == set(found.layers)
    assert report["perplexity_after"] == found.value
    assert {file.name for file in tmp_path.iterdir()} == {"out", "out.tune.json"}


def test_smoothed_recipes_are_ranked_by_the_error_of_layers(
    model: Path, data: TokenWindows, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe.build(scheme="w8a8", smooth="smoothquant")
    given: dict[str, Any] = {"target": "ppl+900%", "calibration": data, "data": text}
    assert tune(model, tmp_path / "a", recipe=recipe, **given).metric == "layer_error"
    assert tune(model, tmp_path / "b", scheme="w8a8", **given).metric == "model_error"


def test_nothing_falls_back_if_the_target_is_met(
    model: Path, data: TokenWindows, text: Path, tmp_path: Path
) -> None:
    found = tune(model, tmp_path / "out", target="ppl+900%", calibration=data, data=text)
    assert (found.groups, len(found.trials)) == ((), 1)


@pytest.mark.parametrize("fallback", ["w8a16", "w8a8_dynamic"])
def test_fallback_to_another_scheme(
    model: Path,
    data: TokenWindows,
    text: Path,
    tmp_path: Path,
    fallback: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written; the quality of a random model says little, so its values are made up."""
    hard = {"model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"}
    monkeypatch.setattr(Candidates, "measure_float", lambda _: 10.0)
    monkeypatch.setattr(Candidates, "measure", lambda _, layers: 13.0 - len(hard & {*layers}))
    found = tune(
        model, tmp_path / "out", target="ppl+1", calibration=data, data=text, fallback=fallback
    )
    assert (set(found.groups), found.value) == (HARD, 11.0)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    types = {
        name.removesuffix(".weight"): kind
        for name, kind in description.items()
        if name.endswith("_proj.weight")
    }
    assert set(types.values()) <= {fallback.upper(), "W8A8"}
    assert {name for name, kind in types.items() if kind != "W8A8"} == set(found.layers)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a16_g32"])
def test_other_schemes(
    model: Path, data: TokenWindows, text: Path, tmp_path: Path, scheme: str
) -> None:
    whole = tmp_path / "whole"
    quantize(model, whole, scheme=scheme)
    reference, worst = (evaluate_text(path, text).value for path in (model, whole))
    if worst <= reference:
        pytest.skip("the quantized model is no worse here")
    target = f"ppl<={(reference + worst) / 2}"
    found = tune(model, tmp_path / "out", target=target, calibration=data, data=text, scheme=scheme)
    assert found.groups
    assert found.value <= found.bound < worst


def test_prune_drops_what_is_not_needed(
    model: Path, data: TokenWindows, text: Path, bound: float, tmp_path: Path, monkeypatch: Any
) -> None:
    """With a ranking that puts easy layers first, the prefix is long and pruning cuts it."""
    rank = tuning._rank

    def poor_ranking(*args: Any) -> dict[str, list[str]]:
        easy_first = sorted(rank(*args).items(), key=lambda item: item[0] in HARD)
        return dict([*easy_first[:4], *easy_first[6:], *easy_first[4:6]])

    monkeypatch.setattr(tuning, "_rank", poor_ranking)
    given: dict[str, Any] = {"target": f"ppl<={bound * 1.0005}", "calibration": data, "data": text}
    plain = tune(model, tmp_path / "plain", **given)
    pruned = tune(model, tmp_path / "pruned", prune=True, **given)
    assert len(plain.groups) >= 6
    assert set(pruned.groups) >= HARD
    assert len(pruned.groups) < len(plain.groups)
    assert pruned.value <= pruned.bound


def test_accuracy(model: Path, data: TokenWindows, tmp_path: Path) -> None:
    lines = [{"passage": "abc" * n, "question": "is it", "answer": n % 2 == 0} for n in range(1, 7)]
    file = tmp_path / "boolq.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    found = tune(
        model, tmp_path / "out", target="accuracy-0%", calibration=data, data=file, task="boolq"
    )
    assert found.reference == 0.5
    assert found.value >= 0.5


class TestResumption:
    def test_values_are_not_measured_twice(
        self,
        model: Path,
        data: TokenWindows,
        text: Path,
        bound: float,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        given: dict[str, Any] = {"target": f"ppl<={bound}", "calibration": data, "data": text}
        whole = tune(model, tmp_path / "whole", **given)
        measured: list[int] = []
        measure = Candidates.measure

        def interrupted(self: Candidates, layers: Sequence[str]) -> float:
            if len(measured) == 2:
                raise KeyboardInterrupt
            measured.append(len(layers))
            return measure(self, layers)

        monkeypatch.setattr(Candidates, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(model, tmp_path / "out", **given)
        assert {file.name for file in tmp_path.iterdir()} == {
            "whole",
            "whole.tune.json",
            "out.tune.json",
        }
        monkeypatch.setattr(Candidates, "measure_float", lambda _: pytest.fail("measured again"))
        monkeypatch.setattr(tuning, "_rank", lambda *_: pytest.fail("ranked again"))
        measured.clear()
        measured.append(0)  # one more is allowed before the next interruption
        with pytest.raises(KeyboardInterrupt):
            tune(model, tmp_path / "out", **given)
        monkeypatch.setattr(Candidates, "measure", measure)
        again = tune(model, tmp_path / "out", **given)
        assert (again.groups, again.value, again.trials) == (
            whole.groups,
            whole.value,
            whole.trials,
        )

    def test_another_job_begins_anew(
        self,
        model: Path,
        data: TokenWindows,
        text: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        cache = tmp_path / "cache.json"
        given: dict[str, Any] = {"target": "ppl+900%", "calibration": data, "data": text}
        tune(model, tmp_path / "a", cache=cache, **given)
        key = json.loads(cache.read_text())["key"]
        tune(model, tmp_path / "b", cache=cache, scheme="w8a16", **given)
        assert "belongs to another job" in caplog.text
        assert json.loads(cache.read_text())["key"] != key
        cache.chmod(0o600)
        cache.write_text("{broken")
        tune(model, tmp_path / "c", cache=cache, **given)
        assert json.loads(cache.read_text())["key"] == key


class TestMistakes:
    def test_before_any_work(
        self, model: Path, data: TokenWindows, text: Path, tmp_path: Path
    ) -> None:
        given: dict[str, Any] = {"target": "ppl+1%", "calibration": data, "data": text}
        out = tmp_path / "out"
        with pytest.raises(InvalidValueError, match="one of accuracy, and the task 'perplexity'"):
            tune(model, out, **{**given, "target": "accuracy-1%"})
        with pytest.raises(InvalidValueError, match="metric must be one of"):
            tune(model, out, metric="mse", **given)
        with pytest.raises(InvalidValueError, match="leave fallback at 0"):
            tune(model, out, recipe=Recipe.build(fallback=2), **given)
        with pytest.raises(InvalidValueError, match="layers are ranked on calibration data"):
            tune(model, out, **{**given, "calibration": None}, scheme="w8a16")
        with pytest.raises(InvalidValueError):
            tune(model, out, fallback="w9", **given)
        with pytest.raises(FileNotFoundError):
            tune(model, out, **{**given, "data": tmp_path / "none.txt"})
        assert list(tmp_path.iterdir()) == []
        out.mkdir()
        (out / "file").touch()
        with pytest.raises(OutputExistsError):
            tune(model, out, **given)

    def test_targets_that_cannot_be_met(
        self, model: Path, data: TokenWindows, text: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        given: dict[str, Any] = {"calibration": data, "data": text}
        with pytest.raises(InvalidValueError, match="the float model itself does not meet ppl<=1"):
            tune(model, tmp_path / "out", target="ppl<=1", **given)
        monkeypatch.setattr(Candidates, "measure", lambda *_: 1e9)
        with pytest.raises(InvalidValueError, match="is met by the float model alone"):
            tune(model, tmp_path / "out", target="ppl+1%", **given)
        with pytest.raises(
            InvalidValueError, match="not met even with every layer in w8a8_dynamic"
        ):
            tune(
                model,
                tmp_path / "out",
                target="ppl+1%",
                fallback="w8a8_dynamic",
                **given,
            )
        assert not (tmp_path / "out").exists()


class TestCommand:
    def test_text_and_json(
        self, model: Path, data: TokenWindows, text: Path, bound: float, tmp_path: Path
    ) -> None:
        calib = tmp_path / "calib.jsonl"
        rows = [row.tolist() for batch in data.batches for row in batch]
        calib.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
        out = tmp_path / "out"
        args = ("--target", f"ppl<={bound}", "--eval", text, "--calib", calib, "--length", 32)
        shown = run("tune", model, out, *args)
        assert shown.exit_code == 0, shown.output
        assert "2 of 8 groups fall back" in shown.stdout
        assert "  model.layers.0.mlp.gate_proj\n" in shown.stdout
        assert shown.stdout.endswith(f"written to {out}\n")
        again = run("tune", model, out, *args, "--overwrite", "--json")
        values = json.loads(again.stdout)
        assert set(values["groups"]) == HARD
        assert values["value"] <= values["bound"]
        refused = run("tune", model, out, *args)
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr

    def test_without_data(self, model: Path, text: Path, tmp_path: Path) -> None:
        shown = run("tune", model, tmp_path / "out", "--target", "ppl+1%", "--eval", text)
        assert shown.exit_code == 2
        assert "tune needs calibration data" in shown.stderr
