"""GSM8K: word problems whose answer is a number (arXiv:2110.14168), one JSON object a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slim_core.errors import CalibrationError
from slim_core.files import PathLike
from slim_core.validate import check_int
from slim_ptq.calibration.text import read_json_lines
from slim_ptq.tasks.base import Question, Task, data_file
from slim_ptq.tasks.scoring import Scorer

_INTEGER = re.compile(r"-?\d[\d,]*")


@dataclass(frozen=True, slots=True)
class Gsm8k(Task):
    """Reads ``question`` and ``answer``; the last integer of the answer is the result.

    Parameters
    ----------
    tokens : int
        At most so many tokens are generated for an answer.
    """

    tokens: int = 256

    name = "gsm8k"

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, low=1)

    def load(self, path: PathLike) -> list[Question]:
        """Read a ``.jsonl`` file."""
        file = data_file(path)
        questions = []
        for where, line in read_json_lines(file):
            for key in ("question", "answer"):
                if not isinstance(line.get(key), str):
                    raise CalibrationError(f"{where}: {key} must be a str")
            if last_integer(line["answer"]) is None:
                raise CalibrationError(f"{where}: the answer has no number")
            prompt = f"Question: {line['question']}\nAnswer:"
            questions.append(Question(prompt, line["answer"]))
        if not questions:
            raise CalibrationError(f"{file} is empty")
        return questions

    def grade(self, scorer: Scorer, questions: Sequence[Question]) -> list[float]:
        """Compare the last integer of the greedy continuation; a new question ends it."""
        answers = scorer.generate([question.prompt for question in questions], self.tokens)
        return [
            float(last_integer(made.split("Question:")[0]) == last_integer(question.answer))
            for question, made in zip(questions, answers, strict=True)
        ]


def last_integer(text: str) -> int | None:
    """Return the last integer of a text, commas between digits left out; None if there is none.

    >>> last_integer("4 * 300 = 1,200 #### 1,200.")
    1200
    """
    found = _INTEGER.findall(text)
    return int(found[-1].replace(",", "")) if found else None
