"""Question sets: what is read, how answers are weighed, and what a model gets for them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError, NumericalError
from slim_ptq import PrecisionTest, evaluate_task, load_model
from slim_ptq.evaluate import encode_text, perplexity
from slim_ptq.precision import TaskData
from slim_ptq.tasks import BoolQ, CEval, Gsm8k, Mmlu, Scorer, TruthfulQA
from slim_ptq.tasks.gsm8k import last_integer

VOCAB = 128


class Fond(nn.Module):
    """Predicts the same at every place: some letters much more often than others."""

    def __init__(self, tokenizer: Any, letters: str) -> None:
        super().__init__()
        logits = torch.zeros(VOCAB)
        logits[tokenizer(letters)["input_ids"]] = 8.0
        self.logits = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, VOCAB))


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def write_csv(file: Path, *rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "dev.jsonl",
        {"title": "Ice", "passage": "Ice is cold.", "question": "is ice cold", "answer": True},
        {"passage": "Fire is hot.", "question": "is fire cold", "answer": False},
        {"passage": "Snow is white.", "question": "is snow white", "answer": True},
    )


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    for number in range(5):
        write_csv(tmp_path / "dev" / "sums_dev.csv", *[["1+1", 1, 2, 3, 4, "B"]] * (number + 1))
    write_csv(
        tmp_path / "test" / "sums_test.csv", ["2+2", 4, 5, 6, 7, "A"], ["0+3", 1, 2, 3, 4, "C"]
    )
    write_csv(tmp_path / "dev" / "great_rivers_dev.csv", *[["Nile?", "a", "b", "c", "d", "D"]] * 5)
    write_csv(tmp_path / "test" / "great_rivers_test.csv", ["Rhine, a river?", 1, 2, 3, 4, "A"])
    return tmp_path


@pytest.fixture
def ceval(tmp_path: Path) -> Path:
    head = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    rows = [[n, f"q{n}", "a", "b", "c", "d", "ABCD"[n % 4], "why"] for n in range(6)]
    write_csv(tmp_path / "dev" / "law_dev.csv", head, *rows)
    write_csv(tmp_path / "val" / "law_val.csv", head[:-1], *(row[:-1] for row in rows))
    (tmp_path / "subject_mapping.json").write_text(json.dumps({"law": ["Law", "法学", "Other"]}))
    return tmp_path


class TestReading:
    def test_boolq(self, boolq: Path) -> None:
        questions = BoolQ().load(boolq)
        assert questions[0].prompt == "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:"
        assert questions[1].prompt.startswith("Fire is hot.\n")
        assert [q.answer for q in questions] == ["yes", "no", "yes"]
        assert all(q.choices[q.truth[0]].strip() == q.answer for q in questions)

    def test_boolq_of_finished_prompts(self, tmp_path: Path) -> None:
        file = write_lines(
            tmp_path / "q.jsonl",
            {"id": 0, "inputs_pretokenized": "P\nAnswer:"},
            {"inputs_pretokenized": "Q\nAnswer:", "label": 1},
        )
        first, second = BoolQ().load(file)
        assert (first.prompt, first.answer, first.truth) == ("P\nAnswer:", "", ())
        assert second.answer == "yes"

    def test_mmlu(self, mmlu: Path) -> None:
        questions = Mmlu(shot=2).load(mmlu)
        assert [q.subject for q in questions] == ["great_rivers", "sums", "sums"]
        assert questions[0].prompt.startswith(
            "The following are multiple choice questions (with answers) about great rivers.\n\n"
        )
        example = "1+1\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        assert questions[1].prompt.count(example) == 2
        assert questions[1].prompt.endswith("2+2\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:")
        assert questions[2].truth == (2,)
        assert Mmlu(shot=0).load(mmlu)[1].prompt.count("Answer:") == 1

    def test_ceval(self, ceval: Path) -> None:
        questions = CEval().load(ceval)
        assert len(questions) == 6
        assert "法学" in questions[0].prompt
        assert questions[0].prompt.count("答案：") == 6  # noqa: RUF001
        assert questions[3].answer == "D"

    def test_gsm8k(self, tmp_path: Path) -> None:
        line = {"question": "How many?", "answer": "4 * 300 = 1,200\n#### 1,200"}
        (question,) = Gsm8k().load(write_lines(tmp_path / "q.jsonl", line))
        assert question.prompt == "Question: How many?\nAnswer:"
        assert last_integer(question.answer) == 1200
        assert last_integer("minus -7.") == -7
        assert last_integer("none") is None

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"passage": "p", "question": "q", "answer": "yes"}, "answer must be true or false"),
            ({"question": "q", "answer": True}, "passage must be a str"),
            ([1], "must be a JSON object"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: Any, message: str) -> None:
        good = {"passage": "p", "question": "q", "answer": True}
        with pytest.raises(CalibrationError, match=f"line 2: {message}"):
            BoolQ().load(write_lines(tmp_path / "q.jsonl", good, line))

    def test_bad_exams(self, mmlu: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidValueError, match=r"shot must be in \[0, 5\], not 6"):
            Mmlu(shot=6)
        write_csv(mmlu / "test" / "sums_test.csv", ["2+2", 4, 5, 6, 7, "E"])
        with pytest.raises(CalibrationError, match="row 1: the answer must be A, B, C or D"):
            Mmlu().load(mmlu)
        write_csv(mmlu / "test" / "sums_test.csv", ["2+2", 4])
        with pytest.raises(CalibrationError, match="row 1 has 2 columns"):
            Mmlu().load(mmlu)
        with pytest.raises(FileNotFoundError, match="val"):
            CEval().load(mmlu)

    def test_a_subject_cannot_lead_out_of_the_directory(self, ceval: Path) -> None:
        mapping = {"../dev/law": ["Law", "法学", "Other"]}
        (ceval / "subject_mapping.json").write_text(json.dumps(mapping))
        with pytest.raises(CalibrationError, match="must be mapped"):
            CEval().load(ceval)


class TestScorer:
    def reference(self, model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
        """Sum the log probabilities of the choice in a pass of its own."""
        start, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + choice))
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
        return sum(float(table[i - 1, whole[i]]) for i in range(len(start), len(whole)))

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_likelihoods(self, tiny_model: Any, letter_tokenizer: Any, batch_size: int) -> None:
        model = tiny_model("llama")
        questions = [("Is it?", (" yes", " no")), ("Which letter", "ABCD"), ("x", ("a", "bc"))]
        found = Scorer(model, letter_tokenizer, batch_size).choices(questions)
        for (prompt, choices), values in zip(questions, found, strict=True):
            expected = [self.reference(model, letter_tokenizer, prompt, c) for c in choices]
            assert values == pytest.approx(expected, abs=1e-4)

    def test_probabilities_of_all_letters_sum_to_one(
        self, tiny_model: Any, letter_tokenizer: Any
    ) -> None:
        letters = [chr(code) for code in range(32, 127)]
        model = tiny_model("llama", vocab_size=96)
        (values,) = Scorer(model, letter_tokenizer).choices([("abc", letters)])
        unknown = self.reference(model, letter_tokenizer, "abc", "\u20ac")
        assert sum(math.exp(value) for value in [*values, unknown]) == pytest.approx(1, abs=1e-5)

    def test_tokens_that_merge_at_the_seam(self) -> None:
        """The last token of the prompt may be another one before a continuation."""

        def tokenizer(text: str, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [5 if part == "ab" else ord(part[0]) - 90 for part in cut(text)]}

        def cut(text: str) -> list[str]:
            return ["ab" if part == "\0" else part for part in text.replace("ab", "\0")]

        seen: list[list[int]] = []

        class Counting(nn.Module):
            def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
                seen.extend(ids.tolist())
                return SimpleNamespace(logits=torch.zeros(*ids.shape, 50))

        (values,) = Scorer(Counting(), tokenizer).choices([("ca", ["b", "c"])])
        # "ca" + "b" is [c, ab]: one token is given and one is predicted; "cac" adds one to "ca".
        assert values == pytest.approx([-math.log(50)] * 2)
        assert sorted(seen) == [[9], [9, 7]]

    def test_long_prompts_lose_their_beginning(
        self, tiny_model: Any, letter_tokenizer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_model("llama", max_position_embeddings=16)
        scorer = Scorer(model, letter_tokenizer)
        end = "0123456789abcdef"
        found = scorer.choices([("x" * 40 + end, "AB"), (end, "AB")])
        assert found[0] == pytest.approx(found[1])
        assert "1 prompts have more tokens than the 16 positions" in caplog.text
        with pytest.raises(InvalidValueError, match="more tokens than the 16 positions"):
            scorer.choices([("a", ("x" * 30,))])

    def test_greedy_text(self, tiny_model: Any, letter_tokenizer: Any) -> None:
        model = tiny_model("llama")
        prompts = ["abc", "hello", "xyz"]
        found = Scorer(model, letter_tokenizer, 2).generate(prompts, 4)
        for prompt, text in zip(prompts, found, strict=True):
            ids = letter_tokenizer(prompt)["input_ids"]
            for _ in range(4):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == model.config.eos_token_id:
                    break
            expected = letter_tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            assert text == expected

    def test_nan_is_an_error(self, letter_tokenizer: Any) -> None:
        model = Fond(letter_tokenizer, "yes")
        with torch.no_grad():
            model.logits[3] = float("nan")
        with pytest.raises(NumericalError, match="NaN"):
            Scorer(model, letter_tokenizer).choices([("a", "AB")])


class TestPrecision:
    def test_boolq(self, boolq: Path, letter_tokenizer: Any) -> None:
        always_yes = PrecisionTest(
            Fond(letter_tokenizer, " yes"), letter_tokenizer, "boolq", 2, "cpu", path=boolq
        )
        found = always_yes.test()
        assert (found.metric, found.count, found.parts) == ("accuracy", 3, {})
        assert found.value == pytest.approx(2 / 3)
        always_no = Fond(letter_tokenizer, " no")
        test = PrecisionTest(always_no, letter_tokenizer, "boolq", 2, device="cpu", path=boolq)
        assert test.test().value == pytest.approx(1 / 3)

    @pytest.mark.parametrize(("letter", "right", "sums"), [("A", 2 / 3, 0.5), ("C", 1 / 3, 0.5)])
    def test_mmlu(
        self, mmlu: Path, letter_tokenizer: Any, letter: str, right: float, sums: float
    ) -> None:
        model = Fond(letter_tokenizer, letter)
        found = PrecisionTest(model, letter_tokenizer, "mmlu", 4, "cpu", False, 5, path=mmlu).test()
        assert found.value == pytest.approx(right)
        assert found.parts["sums"] == sums

    @pytest.mark.parametrize("name", ["ceval_0_shot", "ceval_5_shot", "ceval"])
    def test_ceval(self, ceval: Path, letter_tokenizer: Any, name: str) -> None:
        model = Fond(letter_tokenizer, "B")
        found = PrecisionTest(model, letter_tokenizer, name, 4, path=ceval).test()
        assert found.value == pytest.approx(2 / 6)

    def test_truthfulqa(self, tmp_path: Path, letter_tokenizer: Any) -> None:
        questions = [
            {
                "question": "What?",
                "mc1_targets": {"yy": 1, "nn": 0},
                "mc2_targets": {"yy": 1, "yn": 1, "nn": 0},
            },
            {
                "question": "Why?",
                "mc1_targets": {"nn": 1, "yy": 0},
                "mc2_targets": {"nn": 1, "yy": 0},
            },
        ]
        file = tmp_path / "mc_task.json"
        file.write_text(json.dumps(questions))
        model = Fond(letter_tokenizer, "y")
        found = PrecisionTest(model, letter_tokenizer, "truthfulqa", 4, path=file).test()
        assert (found.value, found.count) == (0.5, 2)
        # Each y is e^8 times as likely as an n.
        y, yn, n = 1.0, math.exp(-8), math.exp(-16)
        expected = ((y + yn) / (y + yn + n) + n / (n + y)) / 2
        assert found.parts == {"mc1": 0.5, "mc2": pytest.approx(expected, abs=1e-6)}
        assert len(TruthfulQA().load(file)) == 4

    def test_gsm8k_counts_the_last_integer(
        self, tmp_path: Path, letter_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = [{"question": str(n), "answer": f"#### {n}"} for n in (3, 4)]
        file = write_lines(tmp_path / "q.jsonl", *lines)
        answers = [" 1 + 2 = 3\nQuestion: 99", " I do not know"]
        monkeypatch.setattr(Scorer, "generate", lambda *_: answers)
        model = Fond(letter_tokenizer, "3")
        assert PrecisionTest(model, letter_tokenizer, "gsm8k", 1, path=file).test().value == 0.5

    def test_perplexity_is_that_of_evaluate(self, spelling_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog " * 20)
        model = load_model(spelling_model)
        tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
            spelling_model
        )
        found = PrecisionTest(model, tokenizer, "perplexity", 4, "cpu", path=text).test()
        expected = perplexity(model, encode_text(tokenizer, text.read_text()), window=512)
        assert found.value == pytest.approx(expected.value)
        assert found.count == expected.tokens
        again = evaluate_task(spelling_model, "perplexity", text)
        assert again == found

    def test_data_where_the_classic_tool_keeps_it(
        self, boolq: Path, letter_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = Fond(letter_tokenizer, " yes")
        with pytest.raises(FileNotFoundError, match=r"no data for 'boolq': give path="):
            PrecisionTest(model, letter_tokenizer, "boolq", 1)
        home = tmp_path / "precision_tool" / "dataset" / "boolq"
        home.mkdir(parents=True)
        boolq.rename(home / "dev.jsonl")
        assert PrecisionTest(model, letter_tokenizer, "boolq", 1).test().count == 3

    def test_samples(self, boolq: Path, letter_tokenizer: Any) -> None:
        model = Fond(letter_tokenizer, " yes")
        found = PrecisionTest(model, letter_tokenizer, "boolq", 1, path=boolq, samples=1).test()
        assert (found.value, found.count) == (1.0, 1)

    def test_unanswered_questions_cannot_be_graded(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "q.jsonl", {"inputs_pretokenized": "Is it?\nAnswer:"})
        with pytest.raises(CalibrationError, match="without its answer"):
            TaskData("boolq", file)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"model": "llama"}, InvalidTypeError, "model must be Module"),
            ({"tokenizer": None}, InvalidTypeError, "tokenizer must be callable"),
            ({"dataset": "humaneval"}, InvalidValueError, "task must be one of 'perplexity'"),
            ({"dataset": 3}, InvalidTypeError, "dataset must be str"),
            ({"batch_size": 0}, InvalidValueError, "batch_size must be at least 1, not 0"),
            ({"hardware_type": "tpu"}, InvalidValueError, "device must be one of 'cpu', 'npu'"),
            ({"hardware_type": "cpu", "device": "npu"}, InvalidValueError, "contradict"),
            ({"shot": 9}, InvalidValueError, r"shot must be in \[0, 5\]"),
            ({"samples": 0}, InvalidValueError, "samples must be at least 1"),
        ],
    )
    def test_bad_arguments(
        self,
        boolq: Path,
        letter_tokenizer: Any,
        change: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        given = {
            "model": Fond(letter_tokenizer, "a"),
            "tokenizer": letter_tokenizer,
            "dataset": "boolq",
            "batch_size": 1,
            "path": boolq,
        }
        with pytest.raises(error, match=message):
            PrecisionTest(**{**given, **change})


def test_a_fake_quantized_model_answers_nearly_as_the_float_one(
    tiny_model: Callable[..., Any], letter_tokenizer: Any, tiny_calib: Any
) -> None:
    from slim_ptq import Calibrator, QuantConfig

    model = tiny_model("llama")
    questions = [("Is it?", (" yes", " no"))]
    (before,) = Scorer(model, letter_tokenizer).choices(questions)
    Calibrator(model, QuantConfig(mm_tensor=False), calib_data=tiny_calib).run()
    (after,) = Scorer(model, letter_tokenizer).choices(questions)
    assert after != before
    assert after == pytest.approx(before, rel=0.1)


def test_the_example_questions() -> None:
    """The example model tells true endings of sentences from shuffled ones; chance is 1 in 4."""
    examples = Path(__file__).parents[3] / "examples"
    found = evaluate_task(
        examples / "tiny-llama", "truthfulqa", examples / "questions.json", samples=12
    )
    assert found.count == 12
    assert found.value >= 0.75
    assert found.parts["mc2"] >= 0.75
