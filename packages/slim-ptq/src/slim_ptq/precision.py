"""Accuracy of a model on question sets, and perplexity on a text: one call, numbers back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import InvalidValueError
from slim_core.files import PathLike, as_path
from slim_core.logging import get_logger
from slim_core.validate import check_choice, check_int, check_type
from slim_ptq.calibration.text import load_tokenizer
from slim_ptq.devices import torch_device
from slim_ptq.evaluate import encode_text, perplexity, read_text
from slim_ptq.limits import within_positions
from slim_ptq.load import load_model
from slim_ptq.tasks import BoolQ, CEval, Gsm8k, Mmlu, Question, Scorer, Task, TruthfulQA

_log = get_logger("ptq")

PERPLEXITY = "perplexity"
TASKS = (PERPLEXITY, "boolq", "ceval", "mmlu", "gsm8k", "truthfulqa")
# The names of the classic interface fix the number of examples.
_FIXED_SHOTS = {"ceval_0_shot": 0, "ceval_5_shot": 5}
_CLASSIC_HOME = Path("precision_tool") / "dataset"


@dataclass(frozen=True, slots=True)
class Precision:
    """What a model reached.

    Parameters
    ----------
    task : str
    metric : str
        ``accuracy`` (share of right answers, in [0, 1]) or ``perplexity``.
    value : float
    count : int
        Questions, or predicted tokens.
    parts : dict
        The value of each subject, if there are several.
    """

    task: str
    metric: str
    value: float
    count: int
    parts: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values: dict[str, Any] = {"task": self.task, self.metric: self.value, "count": self.count}
        return values | ({"parts": self.parts} if self.parts else {})


class PrecisionTest:
    """Measures a model in memory, float or fake-quantized.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model.
    tokenizer : object
        Its tokenizer.
    dataset : str
        ``boolq``, ``ceval`` (also ``ceval_0_shot``, ``ceval_5_shot``), ``mmlu``, ``gsm8k``,
        ``truthfulqa`` or ``perplexity``.
    batch_size : int
        Sequences that run at once.
    hardware_type : str, optional
        ``cpu``, ``cuda:0``, ``npu``: where the model is put.  It stays where it is if not given.
    tokenizer_return_type_id : bool
        Accepted for compatibility: token types are never passed to the model.
    shot : int
        Examples before each question of ``ceval`` and ``mmlu``, at most 5.
    path : path, optional
        The data: a file, or a directory for ``ceval`` and ``mmlu``.  If not given it is looked for
        below ``precision_tool/dataset/`` in the working directory.
    samples : int, optional
        At most so many questions, the first ones.
    device : str, optional
        Another name of ``hardware_type``.

    Raises
    ------
    InvalidTypeError, InvalidValueError, DeviceError, FileNotFoundError, CalibrationError
        Before the model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: str,
        batch_size: int,
        hardware_type: str | None = None,
        tokenizer_return_type_id: bool = False,
        shot: int = 5,
        *,
        path: PathLike | None = None,
        samples: int | None = None,
        device: str | None = None,
    ) -> None:
        check_type("dataset", dataset, str)
        check_type("tokenizer_return_type_id", tokenizer_return_type_id, bool)
        if hardware_type is not None and device is not None and hardware_type != device:
            raise InvalidValueError(
                f"hardware_type={hardware_type!r} and device={device!r} contradict each other"
            )
        place = hardware_type or device
        self._scorer = Scorer(model, tokenizer, batch_size)
        self._data = TaskData(dataset, _data_path(dataset, path), shot=shot, samples=samples)
        if place is not None and getattr(model, "hf_device_map", None) is None:
            model.to(torch_device(place))

    def test(self) -> Precision:
        """Measure, log the value, and return it.

        Raises
        ------
        NumericalError
            The model gives NaN.
        CalibrationError
            A question says no answer.
        """
        return self._data.measure(self._scorer)


class TaskData:
    """A data set in memory, to measure any number of models on.

    Parameters
    ----------
    task : str
        As ``dataset`` of :class:`PrecisionTest`.
    path : path
    shot : int
    samples : int, optional
    window : int
        Tokens of a window, for ``perplexity``.
    """

    def __init__(
        self,
        task: str,
        path: PathLike,
        *,
        shot: int = 5,
        samples: int | None = None,
        window: int = 512,
    ) -> None:
        shot = _FIXED_SHOTS.get(task, check_int("shot", shot, low=0, high=5))
        kind = "ceval" if task in _FIXED_SHOTS else check_choice("task", task, TASKS)
        if samples is not None:
            check_int("samples", samples, low=1)
        self.task = task
        self._settings = {"task": task, "shot": shot, "samples": samples, "window": window}
        self.metric = PERPLEXITY if kind == PERPLEXITY else "accuracy"
        self._window = check_int("window", window, low=2)
        self._text = read_text(path) if kind == PERPLEXITY else ""
        self._task = None if kind == PERPLEXITY else _make(kind, shot)
        self._questions: Sequence[Question] = ()
        if self._task is not None:
            kept = None if samples is None else samples * self._task.parts
            self._questions = self._task.load(path)[:kept]
            self._task.check_answers(self._questions)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that decide what is measured, but for the data itself."""
        return dict(self._settings)

    def measure(self, scorer: Scorer) -> Precision:
        """Return what a model reaches."""
        task = self._task
        result = self._perplexity(scorer) if task is None else self._grade(task, scorer)
        _log.info("%s: %s %.4f (%d)", self.task, result.metric, result.value, result.count)
        return result

    def _perplexity(self, scorer: Scorer) -> Precision:
        config = getattr(scorer.model, "config", None)
        window = self._window
        if config is not None:
            window = within_positions(window, config.to_dict())
        tokens = encode_text(scorer.tokenizer, self._text)
        model: Any = scorer.model
        found = perplexity(model, tokens, window=window, batch_size=scorer.batch_size)
        return Precision(self.task, PERPLEXITY, found.value, found.tokens)

    def _grade(self, task: Task, scorer: Scorer) -> Precision:
        scores = task.grade(scorer, self._questions)
        parts: dict[str, list[float]] = {}
        for question, score in zip(self._questions, scores, strict=True):
            parts.setdefault(question.subject, []).append(score)
        headline = parts[task.headline] if task.headline else scores
        means = {name: _mean(values) for name, values in parts.items() if name}
        return Precision(self.task, "accuracy", _mean(headline), len(headline), means)


def evaluate_task(
    model: PathLike,
    task: str,
    path: PathLike,
    *,
    shot: int = 5,
    samples: int | None = None,
    window: int = 512,
    batch_size: int = 4,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Precision:
    """Return what a float or quantized model directory reaches on a task.

    Parameters are those of :class:`PrecisionTest` and :class:`TaskData`.

    Raises
    ------
    SlimError
        The model, its tokenizer or the data cannot be used.
    """
    directory = as_path("model", model)
    check_int("batch_size", batch_size, low=1)
    open_checkpoint(directory)  # what is wrong with the files is said before torch loads them
    data = TaskData(task, path, shot=shot, samples=samples, window=window)
    tokenizer = load_tokenizer(directory)
    loaded = load_model(directory, device=device, trust_remote_code=trust_remote_code)
    return data.measure(Scorer(loaded, tokenizer, batch_size))


def _make(kind: str, shot: int) -> Task:
    simple: dict[str, type[Task]] = {"boolq": BoolQ, "gsm8k": Gsm8k, "truthfulqa": TruthfulQA}
    if kind in simple:
        return simple[kind]()
    return CEval(shot) if kind == "ceval" else Mmlu(shot)


def _data_path(dataset: str, path: PathLike | None) -> PathLike:
    """Return where the data is: as given, or where the classic tool keeps it."""
    if path is not None:
        return path
    home = _CLASSIC_HOME / dataset.removesuffix("_0_shot").removesuffix("_5_shot")
    if not home.is_dir():
        raise FileNotFoundError(
            f"no data for {dataset!r}: give path=..., or put it below {home} "
            "in the working directory"
        )
    files = sorted(file for file in home.iterdir() if file.suffix in (".json", ".jsonl", ".txt"))
    return files[0] if len(files) == 1 else home


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
