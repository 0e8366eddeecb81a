"""TruthfulQA, multiple choice (arXiv:2109.07958): MC1 and MC2."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from slim_core.errors import CalibrationError
from slim_core.files import PathLike
from slim_ptq.calibration.text import decode
from slim_ptq.tasks.base import Question, Task, data_file
from slim_ptq.tasks.scoring import Scorer


class TruthfulQA(Task):
    """Reads a JSON list of ``question``, ``mc1_targets`` and ``mc2_targets`` (answer to 0 or 1).

    Each entry gives two questions: for ``mc1`` the one best answer must be the likeliest of its
    list, and for ``mc2`` the score is the share of probability that the true answers have.
    """

    name = "truthfulqa"
    headline = "mc1"
    parts = 2

    def load(self, path: PathLike) -> list[Question]:
        """Read ``mc_task.json``."""
        file = data_file(path)
        try:
            content: Any = json.loads(decode(file))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{file}: not JSON ({error})") from error
        if not isinstance(content, list) or not content:
            raise CalibrationError(f"{file} must hold a list of questions")
        return [
            _question(item, subject, f"{file}, question {number}")
            for number, item in enumerate(content)
            for subject in ("mc1", "mc2")
        ]

    def grade(self, scorer: Scorer, questions: Sequence[Question]) -> list[float]:
        """Score the questions of both kinds."""
        found = scorer.choices([(question.prompt, question.choices) for question in questions])
        return [
            _share(likelihoods, question.truth)
            if question.subject == "mc2"
            else float(likelihoods.index(max(likelihoods)) in question.truth)
            for question, likelihoods in zip(questions, found, strict=True)
        ]


def _question(item: Any, subject: str, where: str) -> Question:
    targets = item.get(f"{subject}_targets") if isinstance(item, dict) else None
    if not isinstance(targets, dict) or not isinstance(item.get("question"), str):
        raise CalibrationError(f"{where}: must have question and {subject}_targets")
    truth = tuple(index for index, value in enumerate(targets.values()) if value == 1)
    if not truth:
        raise CalibrationError(f"{where}: {subject}_targets has no true answer")
    answers = list(targets)
    choices = tuple(f" {answer}" for answer in answers)
    return Question(f"Q: {item['question']}\nA:", answers[truth[0]], choices, truth, subject)


def _share(likelihoods: Sequence[float], truth: Sequence[int]) -> float:
    """Return the share of the probability of all answers that the true ones have."""
    peak = max(likelihoods)
    masses = [math.exp(value - peak) for value in likelihoods]
    return sum(masses[index] for index in truth) / sum(masses)
