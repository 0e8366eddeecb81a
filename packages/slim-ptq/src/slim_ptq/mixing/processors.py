"""One data set of a mixture: its prompts, and which of them a model answers rightly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from slim_core.errors import CalibrationError
from slim_core.files import PathLike
from slim_ptq.tasks import BoolQ, CEval, Gsm8k, Mmlu, Scorer, Task


class DatasetProcessorBase(ABC):
    """A data set of your own, for :meth:`CalibrationData.add_custormized_dataset_processor`.

    Parameters
    ----------
    dataset_path : path
    tokenizer, model : object, optional
        For :meth:`verify_positive_prompt`.

    Attributes
    ----------
    ori_prompts, ori_answers : list of str
        All prompts and their answers; the subclass fills them.
    batch_size : int
        Prompts that :meth:`verify_positive_prompt` gets at once.
    """

    def __init__(self, dataset_path: PathLike, tokenizer: Any = None, model: Any = None) -> None:
        self.dataset_path = dataset_path
        self.tokenizer = tokenizer
        self.model = model
        self.batch_size = 1
        self.ori_prompts: list[str] = []
        self.ori_answers: list[str] = []

    def get_dataset_size(self) -> int:
        """Return the number of prompts."""
        return len(self.ori_prompts)

    @abstractmethod
    def process_data(self, indexs: list[int]) -> tuple[list[str], list[str]]:
        """Return the prompts and the answers of these numbers."""

    @abstractmethod
    def verify_positive_prompt(self, prompts: list[str], labels: list[str]) -> list[dict[str, str]]:
        """Return ``{"prompt": ..., "ans": ...}`` of the prompts that the model answers rightly."""


class QuestionProcessor(DatasetProcessorBase):
    """A data set of a built-in task."""

    def __init__(
        self, task: Task, dataset_path: PathLike, tokenizer: Any = None, model: Any = None
    ) -> None:
        super().__init__(dataset_path, tokenizer, model)
        self._task = task
        self._questions = task.load(dataset_path)
        self.ori_prompts = [question.prompt for question in self._questions]
        self.ori_answers = [question.answer for question in self._questions]
        self._by_prompt = {question.prompt: question for question in self._questions}

    def process_data(self, indexs: list[int]) -> tuple[list[str], list[str]]:
        """Return the prompts and the answers of these numbers."""
        return [self.ori_prompts[i] for i in indexs], [self.ori_answers[i] for i in indexs]

    def verify_positive_prompt(self, prompts: list[str], labels: list[str]) -> list[dict[str, str]]:
        """Grade the model on the prompts; a score of 1 counts."""
        scorer = Scorer(self.model, self.tokenizer, self.batch_size)
        scores = self._task.grade(scorer, [self._by_prompt[prompt] for prompt in prompts])
        return [
            {"prompt": prompt, "ans": label}
            for prompt, label, score in zip(prompts, labels, scores, strict=True)
            if score >= 1.0
        ]


BUILT_IN: dict[str, Callable[[], Task]] = {
    "boolq": BoolQ,
    "ceval_5_shot": CEval,
    "gsm8k": Gsm8k,
    "mmlu": Mmlu,
}


def as_pairs(value: Any, name: str) -> list[dict[str, str]]:
    """Return prompts with answers as a list of dicts, whether they are one or two lists.

    Raises
    ------
    CalibrationError
        Neither; names the data set.
    """
    if isinstance(value, tuple) and len(value) == 2 and len(value[0]) == len(value[1]):
        value = [{"prompt": prompt, "ans": answer} for prompt, answer in zip(*value, strict=True)]
    if not isinstance(value, Sequence) or not all(
        isinstance(item, dict) and isinstance(item.get("prompt"), str) for item in value
    ):
        raise CalibrationError(
            f"the processor of {name!r} must give (prompts, answers) or a list of "
            '{"prompt": ..., "ans": ...}'
        )
    return list(value)
