"""Calibration sets mixed from several data sets."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError
from slim_ptq import CalibrationData, DatasetProcessorBase, quantize
from slim_ptq.calibration.text import read_calibration


def config(path: Path, **datasets: Any) -> Path:
    entries = [{"dataset_name": name, "dataset_path": str(p)} for name, p in datasets.items()]
    path.write_text(json.dumps({"configurations": entries}))
    return path


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    file = tmp_path / "boolq.jsonl"
    lines = [
        {"passage": f"Fact {n}.", "question": f"is it {n}", "answer": n % 3 == 0} for n in range(12)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    file = tmp_path / "gsm8k.jsonl"
    lines = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


class AlwaysYes(nn.Module):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.yes = tokenizer(" yes")["input_ids"]
        self.batches: list[int] = []

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.batches.append(len(ids))
        logits = torch.zeros(*ids.shape, 128)
        logits[..., self.yes] = 5.0
        return SimpleNamespace(logits=logits)


class Poems(DatasetProcessorBase):
    def __init__(self, dataset_path: str = "", tokenizer: Any = None, model: Any = None) -> None:
        super().__init__(dataset_path, tokenizer, model)
        self.ori_prompts = [f"Write poem {n}" for n in range(5)]
        self.ori_answers = [f"Poem {n}" for n in range(5)]

    def process_data(self, indexs: list[int]) -> tuple[list[str], list[str]]:
        return [self.ori_prompts[i] for i in indexs], [self.ori_answers[i] for i in indexs]

    def verify_positive_prompt(self, prompts: list[str], labels: list[str]) -> list[dict[str, str]]:
        pairs = zip(prompts, labels, strict=True)
        return [{"prompt": p, "ans": a} for p, a in pairs if p.endswith(("2", "4"))]


def test_the_script_of_the_documents(boolq: Path, gsm8k: Path, tmp_path: Path) -> None:
    saved = tmp_path / "mix.json"
    data = CalibrationData(str(config(tmp_path / "c.json", boolq=boolq, gsm8k=gsm8k)), str(saved))
    data.add_custormized_dataset_processor("poems", Poems())
    data.set_sample_size({"boolq": 4, "gsm8k": 3, "poems": 2})
    data.set_batch_size(2)
    data.set_shuffle_seed(7)
    samples = data.process()
    kinds = Counter(s["prompt"].split(" ")[0] for s in samples)
    assert kinds == {"Fact": 4, "Question:": 3, "Write": 2}
    assert all(set(sample) == {"prompt", "ans"} for sample in samples)
    assert len({sample["prompt"] for sample in samples}) == 9
    assert json.loads(saved.read_text()) == samples
    assert stat.S_IMODE(saved.stat().st_mode) == 0o400


def test_the_seed_decides_choice_and_order(boolq: Path, gsm8k: Path, tmp_path: Path) -> None:
    def mix(seed: int) -> list[dict[str, str]]:
        data = CalibrationData(config(tmp_path / "c.json", boolq=boolq, gsm8k=gsm8k))
        data.set_sample_size({"boolq": 5, "gsm8k": 5})
        data.set_shuffle_seed(seed)
        return data.process()

    assert mix(1) == mix(1)
    first, second = ([sample["prompt"] for sample in mix(seed)] for seed in (3, 2))
    assert set(first) != set(second)
    kinds = [prompt.startswith("Fact") for prompt in first]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)


def test_without_sizes_all_samples_are_taken(boolq: Path, tmp_path: Path) -> None:
    assert len(CalibrationData(config(tmp_path / "c.json", boolq=boolq)).process()) == 12


def test_sizes_in_the_configuration(boolq: Path, tmp_path: Path) -> None:
    entry = {"dataset_name": "boolq", "dataset_path": boolq.name, "sample_size": 3}
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"configurations": [entry]}))
    assert len(CalibrationData(file).process()) == 3  # the path is relative to the file


def test_with_a_model_only_right_answers_are_taken(
    boolq: Path, tmp_path: Path, letter_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = AlwaysYes(letter_tokenizer)
    data = CalibrationData(config(tmp_path / "c.json", boolq=boolq), "", letter_tokenizer, model)
    data.set_batch_size(3)  # set after construction, and reaches the data set all the same
    data.set_sample_size({"boolq": 2})
    samples = data.process()
    assert len(samples) == 2
    assert {sample["ans"] for sample in samples} == {"yes"}
    assert max(model.batches) == 3
    data.set_sample_size({"boolq": 10})
    assert len(data.process()) == 4  # there are no more
    assert "boolq gives 4 samples, fewer than 10" in caplog.text


def test_a_processor_of_ones_own_verifies(boolq: Path, tmp_path: Path) -> None:
    data = CalibrationData(config(tmp_path / "c.json"), "", object(), object())
    data.add_custormized_dataset_processor("poems", Poems())
    assert {sample["ans"] for sample in data.process()} == {"Poem 2", "Poem 4"}


@pytest.mark.parametrize("saved", [False, True])
def test_as_calibration_file(
    spelling_model: Path, boolq: Path, gsm8k: Path, tmp_path: Path, saved: bool
) -> None:
    file = config(tmp_path / "c.json", boolq=boolq, gsm8k=gsm8k)
    if saved:
        data = CalibrationData(file, tmp_path / "saved.json")
        texts = [sample["prompt"] for sample in data.process()]
        file = tmp_path / "saved.json"
    else:
        texts = [sample["prompt"] for sample in CalibrationData(file).process()]
    windows = read_calibration(file, spelling_model, samples=4, length=64)
    assert windows.rows == 4
    report = quantize(spelling_model, tmp_path / "out", calibration=file, samples=4, length=64)
    assert report.calibration == {"source": file.name, "samples": 4, "tokens": 256}
    errors = [layer.output_error for layer in report.layers]
    mixture = CalibrationData(config(tmp_path / "d.json", boolq=boolq, gsm8k=gsm8k))
    for number, calibration in enumerate((texts, mixture)):
        out = tmp_path / str(number)
        same = quantize(spelling_model, out, calibration=calibration, samples=4, length=64)
        assert [layer.output_error for layer in same.layers] == errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must hold a list under the key configurations"),
        ('{"configurations": [{"dataset_name": "boolq"}]}', "dataset_path must be a non-empty str"),
        ('{"configurations": [{"name": "boolq"}]}', "must be a mapping with the keys"),
        (
            '{"configurations": [{"dataset_name": "a", "dataset_path": "b", "sample_size": -1}]}',
            "sample_size must be an int of at least 0",
        ),
        (
            '{"configurations": [{"dataset_name": "a", "dataset_path": "b"},'
            '{"dataset_name": "a", "dataset_path": "c"}]}',
            "names the data set 'a' twice",
        ),
    ],
)
def test_bad_configurations(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        CalibrationData(tmp_path / "c.json")


def test_bad_use(boolq: Path, tmp_path: Path, letter_tokenizer: Any) -> None:
    file = config(tmp_path / "c.json", boolq=boolq)
    data = CalibrationData(file)
    with pytest.raises(InvalidTypeError, match="sample_size must be dict, not list"):
        data.set_sample_size([3])  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"sample_size\['boolq'\] must be int, not float"):
        data.set_sample_size({"boolq": 1.0})  # type: ignore[dict-item]
    with pytest.raises(InvalidValueError, match="must be one of 'boolq', not 'bolq'"):
        data.set_sample_size({"bolq": 1})
    with pytest.raises(InvalidValueError, match="batch_size must be at least 1, not 0"):
        data.set_batch_size(0)
    with pytest.raises(InvalidTypeError, match="seed must be int, not str"):
        data.set_shuffle_seed("1")  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="processor must be DatasetProcessorBase"):
        data.add_custormized_dataset_processor("x", object())  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="tokenizer is None"):
        CalibrationData(file, "", None, nn.Identity())
    with pytest.raises(CalibrationError, match="no processor for the data set 'poems'"):
        CalibrationData(config(tmp_path / "d.json", poems=boolq)).process()
    with pytest.raises(FileNotFoundError):
        CalibrationData(tmp_path / "none.json")
    data.set_sample_size({"boolq": 0})
    with pytest.raises(CalibrationError, match="the mixture has no sample"):
        data.process()


def test_a_processor_that_gives_something_else_is_named(tmp_path: Path) -> None:
    class Wrong(Poems):
        process_data: Callable[..., Any] = lambda *_: [1, 2]

    data = CalibrationData(config(tmp_path / "c.json"))
    data.add_custormized_dataset_processor("wrong", Wrong())
    with pytest.raises(CalibrationError, match="processor of 'wrong' must give"):
        data.process()
