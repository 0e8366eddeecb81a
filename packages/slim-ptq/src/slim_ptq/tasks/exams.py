"""Exams of four choices: C-Eval (arXiv:2305.08322) and MMLU (arXiv:2009.03300), as CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.errors import CalibrationError
from slim_core.files import PathLike
from slim_core.validate import check_int
from slim_ptq.calibration.text import decode
from slim_ptq.tasks.base import Question, Task, data_directory, data_file

_LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class _Style:
    """The words around the questions of an exam; ``head`` takes the name of the subject."""

    head: str
    answer: str
    gap: str


_CHINESE = _Style(
    "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n",  # noqa: RUF001
    "答案：",  # noqa: RUF001
    "",
)
_ENGLISH = _Style(
    "The following are multiple choice questions (with answers) about {}.\n\n", "Answer:", " "
)


@dataclass(frozen=True, slots=True)
class CEval(Task):
    """A directory with ``dev/<subject>_dev.csv`` and ``val/<subject>_val.csv``.

    Beside them is ``subject_mapping.json``: subject to ``[English name, Chinese name, category]``.

    Parameters
    ----------
    shot : int
        Examples of ``dev`` before each question, at most 5.
    """

    shot: int = 5

    name = "ceval"

    def __post_init__(self) -> None:
        check_int("shot", self.shot, low=0, high=5)

    def load(self, path: PathLike) -> list[Question]:
        """Read the questions of all subjects of the mapping."""
        root = data_directory(path, "dev", "val")
        questions: list[Question] = []
        for subject, title in _subjects(data_file(root / "subject_mapping.json")).items():
            test = _read_csv(root / "val" / f"{subject}_val.csv", header=True)
            dev = _examples(root / "dev" / f"{subject}_dev.csv", self.shot, header=True)
            questions += _questions(subject, _CHINESE.head.format(title), dev, test, _CHINESE)
        return _not_empty(questions, root)


@dataclass(frozen=True, slots=True)
class Mmlu(Task):
    """A directory with ``dev/<subject>_dev.csv`` and ``test/<subject>_test.csv``, without headers.

    Parameters
    ----------
    shot : int
        Examples of ``dev`` before each question, at most 5.
    """

    shot: int = 5

    name = "mmlu"

    def __post_init__(self) -> None:
        check_int("shot", self.shot, low=0, high=5)

    def load(self, path: PathLike) -> list[Question]:
        """Read the questions of all files of ``test``."""
        root = data_directory(path, "test")
        questions: list[Question] = []
        for file in sorted((root / "test").glob("*_test.csv")):
            subject = file.name.removesuffix("_test.csv")
            dev = _examples(root / "dev" / f"{subject}_dev.csv", self.shot, header=False)
            head = _ENGLISH.head.format(subject.replace("_", " "))
            test = _read_csv(file, header=False)
            questions += _questions(subject, head, dev, test, _ENGLISH)
        return _not_empty(questions, root)


def _subjects(file: Path) -> dict[str, str]:
    try:
        mapping: Any = json.loads(decode(file))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{file}: not JSON ({error})") from error
    if not isinstance(mapping, dict):
        raise CalibrationError(f"{file} must hold a mapping of subjects")
    for subject, names in mapping.items():
        listed = isinstance(names, list) and len(names) > 1 and isinstance(names[1], str)
        if not listed or Path(subject).name != subject:
            raise CalibrationError(f"{file}: {subject!r} must be mapped to a list of its names")
    return {subject: names[1] for subject, names in mapping.items()}


def _examples(file: Path, count: int, *, header: bool) -> list[list[str]]:
    if not count:
        return []
    rows = _read_csv(file, header=header)
    if len(rows) < count:
        raise CalibrationError(f"{file} has {len(rows)} examples, fewer than shot={count}")
    return rows[:count]


def _read_csv(path: Path, *, header: bool) -> list[list[str]]:
    """Return rows of question, four choices, and the letter of the answer (perhaps empty)."""
    file = data_file(path)
    rows = list(csv.reader(decode(file).removeprefix("\ufeff").splitlines(keepends=True)))
    columns = list(range(6))
    if header and rows:
        names, rows = rows[0], rows[1:]
        try:
            columns = [names.index(name) for name in ("question", *_LETTERS)]
        except ValueError as error:
            raise CalibrationError(f"{file} lacks a column: {error}") from error
        columns.append(names.index("answer") if "answer" in names else -1)
    return [_row(row, columns, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _row(row: list[str], columns: Sequence[int], where: str) -> list[str]:
    if max(columns) >= len(row):
        raise CalibrationError(f"{where} has {len(row)} columns, too few")
    values = [row[column].strip() if column >= 0 else "" for column in columns]
    if values[-1] and (len(values[-1]) != 1 or values[-1] not in _LETTERS):
        raise CalibrationError(f"{where}: the answer must be A, B, C or D, not {values[-1]!r:.20}")
    return values


def _questions(
    subject: str, head: str, dev: list[list[str]], test: list[list[str]], style: _Style
) -> list[Question]:
    shown = "".join(f"{_ask(row, style)}{style.gap}{row[-1]}\n\n" for row in dev)
    return [
        Question(
            head + shown + _ask(row, style),
            row[-1],
            tuple(style.gap + letter for letter in _LETTERS),
            (_LETTERS.index(row[-1]),) if row[-1] else (),
            subject,
        )
        for row in test
    ]


def _ask(row: Sequence[str], style: _Style) -> str:
    choices = "".join(
        f"\n{letter}. {text}" for letter, text in zip(_LETTERS, row[1:5], strict=True)
    )
    return f"{row[0]}{choices}\n{style.answer}"


def _not_empty(questions: list[Question], root: Path) -> list[Question]:
    if not questions:
        raise CalibrationError(f"{root} holds no question")
    return questions
