"""What a task is: questions from local files, and a grade for what a model makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slim_core.errors import CalibrationError
from slim_core.files import PathLike, as_path, check_input_file
from slim_ptq.tasks.scoring import Scorer

MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what is known about its answer.

    Parameters
    ----------
    prompt : str
        Everything that the model reads.
    answer : str
        As the data set writes it; empty if it does not say.
    choices : tuple of str
        Continuations of the prompt to choose from; empty for free answers.
    truth : tuple of int
        Numbers of the right choices.
    subject : str
        Part of the data set, for the breakdown; empty if it has none.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    truth: tuple[int, ...] = ()
    subject: str = ""


class Task(ABC):
    """A kind of data set.

    ``headline`` is the part (:attr:`Question.subject`) whose mean stands for the whole, if the
    parts measure different things.  ``parts`` is how many questions :meth:`load` makes of an entry.
    """

    name: ClassVar[str]
    headline: ClassVar[str] = ""
    parts: ClassVar[int] = 1

    @abstractmethod
    def load(self, path: PathLike) -> list[Question]:
        """Read all questions of a file or directory.

        Raises
        ------
        CalibrationError
            A file is malformed; names the line.
        FileNotFoundError, FileSecurityError
            As :func:`slim_core.files.check_input_file`.
        """

    def grade(self, scorer: Scorer, questions: Sequence[Question]) -> list[float]:
        """Return the score of a model for each question, in [0, 1], 1 for a right answer.

        By default the likeliest choice must be a right one.
        """
        self.check_answers(questions)
        likelihoods = scorer.choices([(q.prompt, q.choices) for q in questions])
        return [
            float(found.index(max(found)) in question.truth)
            for question, found in zip(questions, likelihoods, strict=True)
        ]

    def check_answers(self, questions: Sequence[Question]) -> None:
        """Require that every question says what its answer is."""
        missing = next((q for q in questions if not q.answer), None)
        if missing is not None:
            raise CalibrationError(
                f"the {self.name} data has a question without its answer: {missing.prompt[-60:]!r}",
                hint="such data can be calibrated on, not graded",
            )


def data_file(path: PathLike) -> Path:
    """Return the path of a data file after the usual checks."""
    return check_input_file(path, max_bytes=MAX_BYTES)


def data_directory(path: PathLike, *parts: str) -> Path:
    """Return a directory of data that must be there, with its required parts."""
    root = as_path("path", path)
    for part in ("", *parts):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"no such directory: {root / part}")
    return root
