"""``CalibrationData``: samples of several data sets, shuffled together."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError
from slim_core.files import MODE_WEIGHTS, PathLike, as_path, check_input_file, write_json
from slim_core.logging import get_logger
from slim_core.validate import check_choice, check_int, check_type
from slim_ptq.calibration.text import Document, decode
from slim_ptq.mixing.processors import BUILT_IN, DatasetProcessorBase, QuestionProcessor, as_pairs

_log = get_logger("ptq")
_MAX_BYTES = 1 << 28
_KEYS = ("dataset_name", "dataset_path", "sample_size")


@dataclass(frozen=True, slots=True)
class _Part:
    """One entry of the configuration file."""

    name: str
    path: Path
    samples: int | None


class CalibrationData:
    """Mixes calibration prompts from several data sets.

    The configuration file is JSON::

        {"configurations": [
            {"dataset_name": "boolq", "dataset_path": "data/boolq/dev.jsonl", "sample_size": 20},
            {"dataset_name": "gsm8k", "dataset_path": "data/gsm8k/test.jsonl"}]}

    Built in are ``boolq`` and ``gsm8k`` (``.jsonl`` files), ``ceval_5_shot`` and ``mmlu``
    (directories of CSV files); see :mod:`slim_ptq.tasks` for what lies in them.  Paths are relative
    to the working directory or, if nothing is there, to the configuration file.

    Parameters
    ----------
    config_path : path
    save_path : path
        JSON file to write the samples to (mode 0400); nothing is written if empty.
    tokenizer, model : object, optional
        With a model only prompts that it answers rightly are taken.

    Raises
    ------
    CalibrationError, FileNotFoundError, FileSecurityError
        The configuration cannot be used.
    """

    def __init__(
        self,
        config_path: PathLike,
        save_path: PathLike = "",
        tokenizer: Any = None,
        model: Any = None,
    ) -> None:
        self._parts = _read_config(check_input_file(config_path, max_bytes=_MAX_BYTES))
        self._save_path = None if save_path == "" else as_path("save_path", save_path)
        if model is not None and tokenizer is None:
            raise InvalidValueError("a model needs its tokenizer, and tokenizer is None")
        self._tokenizer = tokenizer
        self._model = model
        self._own: dict[str, DatasetProcessorBase] = {}
        self._sizes = {part.name: part.samples for part in self._parts}
        self._batch_size = 1
        self._seed = 0

    def add_custormized_dataset_processor(
        self, dataset_name: str, processor: DatasetProcessorBase
    ) -> None:
        """Use a processor of your own for a data set, which need not be in the configuration."""
        check_type("dataset_name", dataset_name, str)
        if not isinstance(processor, DatasetProcessorBase):
            raise InvalidTypeError(
                f"processor must be DatasetProcessorBase, not {type(processor).__name__}"
            )
        self._own[dataset_name] = processor
        self._sizes.setdefault(dataset_name, None)

    def set_sample_size(self, sample_size: Mapping[str, int]) -> None:
        """Set how many samples each data set gives; all that there are if it is not set.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            Not a mapping of names to positive numbers, or a data set that is not in the mixture.
        """
        if not isinstance(sample_size, dict):
            raise InvalidTypeError(f"sample_size must be dict, not {type(sample_size).__name__}")
        for name, size in sample_size.items():
            check_type("a key of sample_size", name, str)
            check_int(f"sample_size[{name!r}]", size, low=0)
            check_choice("a key of sample_size", name, self._sizes)
        self._sizes.update(sample_size)

    def set_batch_size(self, batch_size: int) -> None:
        """Set how many prompts the model answers at once."""
        self._batch_size = check_int("batch_size", batch_size, low=1)

    def set_shuffle_seed(self, seed: int) -> None:
        """Set the seed of the choice and of the order of the samples."""
        self._seed = check_int("seed", seed)

    def process(self) -> list[dict[str, str]]:
        """Return the samples, ``{"prompt": ..., "ans": ...}`` each, in random order.

        Raises
        ------
        CalibrationError
            A data set is malformed, unknown, or the mixture is empty.
        """
        processors = self._processors()
        chosen: list[dict[str, str]] = []
        for name, processor in processors.items():
            chosen += self._choose(name, processor)
        if not chosen:
            raise CalibrationError("the mixture has no sample")
        random.Random(self._seed).shuffle(chosen)
        if self._save_path is not None:
            write_json(self._save_path, chosen, MODE_WEIGHTS)
        return chosen

    def _processors(self) -> dict[str, DatasetProcessorBase]:
        """Return the processor of each data set, made now so that every setting reaches it."""
        found = dict(self._own)
        for part in self._parts:
            if part.name in self._own:
                continue
            if part.name not in BUILT_IN:
                raise CalibrationError(
                    f"there is no processor for the data set {part.name!r}",
                    hint=f"built in are {', '.join(BUILT_IN)}; add your own with "
                    "add_custormized_dataset_processor",
                )
            task = BUILT_IN[part.name]()
            found[part.name] = QuestionProcessor(task, part.path, self._tokenizer, self._model)
        for processor in found.values():
            processor.batch_size = self._batch_size
        return found

    def _choose(self, name: str, processor: DatasetProcessorBase) -> list[dict[str, str]]:
        total = processor.get_dataset_size()
        wanted = self._sizes[name]
        wanted = total if wanted is None else wanted
        order = random.Random(f"{self._seed} {name}").sample(range(total), total)
        if self._model is None:
            taken = as_pairs(processor.process_data(order[:wanted]), name)
        else:
            taken = self._positive(name, processor, order, wanted)
        if len(taken) < wanted:
            _log.warning("%s gives %d samples, fewer than %d", name, len(taken), wanted)
        return taken

    def _positive(
        self, name: str, processor: DatasetProcessorBase, order: list[int], wanted: int
    ) -> list[dict[str, str]]:
        """Return the first samples that the model answers rightly."""
        taken: list[dict[str, str]] = []
        for start in range(0, len(order), self._batch_size):
            if len(taken) >= wanted:
                break
            pairs = as_pairs(processor.process_data(order[start : start + self._batch_size]), name)
            prompts = [pair["prompt"] for pair in pairs]
            answers = [pair["ans"] for pair in pairs]
            taken += as_pairs(processor.verify_positive_prompt(prompts, answers), name)
        return taken[:wanted]


def read_mixture(file: Path) -> list[Document]:
    """Return the calibration text of a JSON file: a configuration, or samples saved before.

    Raises
    ------
    CalibrationError
        The file is neither.
    """
    content = _read_json(file)
    if isinstance(content, dict):
        pairs = CalibrationData(file).process()
    else:
        pairs = as_pairs(content, file.name)
    return [
        Document(f"{file}, sample {number}", text=pair["prompt"])
        for number, pair in enumerate(pairs, 1)
    ]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(decode(file))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{file}: not JSON ({error})") from error


def _read_config(file: Path) -> list[_Part]:
    content = _read_json(file)
    entries = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise CalibrationError(f"{file} must hold a list under the key configurations")
    parts = [_part(entry, f"{file}, configurations[{i}]", file) for i, entry in enumerate(entries)]
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CalibrationError(f"{file} names the data set {twice!r} twice")
    return parts


def _part(entry: Any, where: str, file: Path) -> _Part:
    if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
        raise CalibrationError(f"{where} must be a mapping with the keys {', '.join(_KEYS)}")
    for key in _KEYS[:2]:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise CalibrationError(f"{where}: {key} must be a non-empty str")
    samples = entry.get("sample_size")
    if samples is not None and (type(samples) is not int or samples < 0):
        raise CalibrationError(f"{where}: sample_size must be an int of at least 0")
    path = Path(entry["dataset_path"])
    beside = file.parent / path
    return _Part(entry["dataset_name"], path if path.exists() else beside, samples)
