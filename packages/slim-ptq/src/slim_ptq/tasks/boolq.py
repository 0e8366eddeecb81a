"""BoolQ: yes/no questions on a passage (arXiv:1905.10044), one JSON object a line."""

from __future__ import annotations

from typing import Any

from slim_core.errors import CalibrationError
from slim_core.files import PathLike
from slim_ptq.calibration.text import read_json_lines
from slim_ptq.tasks.base import Question, Task, data_file

_CHOICES = (" no", " yes")


class BoolQ(Task):
    """Reads ``question``, ``passage``, ``answer`` (a bool) and perhaps ``title``.

    Lines that hold the finished prompt as ``inputs_pretokenized`` are read too; their answer may be
    given as ``answer`` or as ``label`` (0 or 1).
    """

    name = "boolq"

    def load(self, path: PathLike) -> list[Question]:
        """Read a ``.jsonl`` file."""
        file = data_file(path)
        questions = [_question(line, where) for where, line in read_json_lines(file)]
        if not questions:
            raise CalibrationError(f"{file} is empty")
        return questions


def _question(line: dict[str, Any], where: str) -> Question:
    truth = line.get("answer", line.get("label"))
    if truth not in (None, True, False):  # 0 and 1 too
        raise CalibrationError(f"{where}: answer must be true or false, not {truth!r:.40}")
    answer = "" if truth is None else _CHOICES[int(truth)].strip()
    return Question(
        _prompt(line, where),
        answer,
        _CHOICES,
        () if truth is None else (int(truth),),
    )


def _prompt(line: dict[str, Any], where: str) -> str:
    ready = line.get("inputs_pretokenized")
    if isinstance(ready, str) and ready:
        return ready
    for key in ("question", "passage"):
        if not isinstance(line.get(key), str):
            raise CalibrationError(f"{where}: {key} must be a str")
    title = f"{line['title']} -- " if line.get("title") else ""
    return f"{title}{line['passage']}\nQuestion: {line['question']}?\nAnswer:"
