"""Calibration texts from the files of common data sets.

===========  ===========================================================================
type         file
===========  ===========================================================================
boolq        JSON lines with ``passage`` and ``question``, or ``inputs_pretokenized``
wikitext2    plain text, taken as one stream
squad1.1     JSON with ``data[].paragraphs[]`` of ``context`` and ``qas[].question``
ceval        CSV with ``question``, ``A``, ``B``, ``C``, ``D``
gsm8k        JSON lines with ``question`` (and ``answer``)
calibrate    JSON lines with ``text``, or plain text with one sample a line
===========  ===========================================================================
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slim_core.errors import CalibrationError
from slim_core.files import PathLike, check_input_file
from slim_core.validate import check_choice, check_int

MAX_BYTES = 1 << 30
DEFAULT_SAMPLES = 100


def read_texts(path: PathLike, kind: str) -> list[str]:
    """Return the samples of a file.

    Parameters
    ----------
    path : path
    kind : str
        One of ``DATASETS``.

    Raises
    ------
    InvalidValueError
        The kind is unknown.
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    CalibrationError
        The file has no sample or is not of this kind; names the line.
    """
    reader = DATASETS[check_choice("dataset type", kind, DATASETS)]
    file = check_input_file(path, max_bytes=MAX_BYTES)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text: {error}") from error
    samples = [sample for sample in reader(str(file), text) if sample.strip()]
    if not samples:
        raise CalibrationError(f"{file} holds no sample of the type {kind}")
    return samples


def token_batches(
    tokenizer: Any, texts: list[str], length: int, samples: int = DEFAULT_SAMPLES
) -> list[np.ndarray]:
    """Return token ids, int32 of shape (1, up to ``length``), of the first samples.

    A single text, such as a whole corpus, is cut into windows.
    """
    check_int("seq_length", length, low=1)
    check_int("samples", samples, low=1)
    if len(texts) == 1:
        ids = tokenizer.encode(texts[0]).ids
        rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    else:
        rows = [tokenizer.encode(text).ids[:length] for text in texts[:samples]]
    batches = [np.asarray([row], np.int32) for row in rows[:samples] if row]
    if not batches:
        raise CalibrationError("the calibration texts give no token")
    return batches


def _boolq(file: str, text: str) -> Iterator[str]:
    for number, row in _json_lines(file, text):
        if "inputs_pretokenized" in row:
            yield row["inputs_pretokenized"]
        else:
            passage, question = _fields(file, number, row, "passage", "question")
            yield f"{passage}\nQuestion: {question}?\nAnswer:"


def _gsm8k(file: str, text: str) -> Iterator[str]:
    for number, row in _json_lines(file, text):
        (question,) = _fields(file, number, row, "question")
        yield f"Question: {question}\nAnswer: {row.get('answer', '')}"


def _calibrate(file: str, text: str) -> Iterator[str]:
    if text.lstrip().startswith("{"):
        for number, row in _json_lines(file, text):
            yield _fields(file, number, row, "text")[0]
    else:
        yield from text.splitlines()


def _wikitext2(file: str, text: str) -> Iterator[str]:
    yield text


def _squad(file: str, text: str) -> Iterator[str]:
    try:
        content = json.loads(text)
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    yield f"{paragraph['context']}\nQuestion: {item['question']}\nAnswer:"
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{file} is not SQuAD JSON: {error!r}") from error


def _ceval(file: str, text: str) -> Iterator[str]:
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        parts = _fields(file, number, row, "question", "A", "B", "C", "D")
        options = "\n".join(f"{k}. {v}" for k, v in zip("ABCD", parts[1:], strict=True))
        yield f"{parts[0]}\n{options}\nAnswer:"


DATASETS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "boolq": _boolq,
    "wikitext2": _wikitext2,
    "squad1.1": _squad,
    "ceval": _ceval,
    "gsm8k": _gsm8k,
    "calibrate": _calibrate,
}


def _json_lines(file: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{file}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{file}:{number} must be a JSON object")
        yield number, row


def _fields(file: str, number: int, row: dict[str, Any], *names: str) -> list[str]:
    values = [row.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise CalibrationError(f"{file}:{number} has no text {name!r}")
    return [str(value) for value in values]
