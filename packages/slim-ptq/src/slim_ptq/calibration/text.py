"""Calibration text: files and lists to windows of token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slim_core.errors import CalibrationError, MissingDependencyError
from slim_core.files import PathLike, check_input_file
from slim_core.validate import check_int

_MAX_BYTES = 1 << 30
_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|sentencepiece", re.ASCII)


@dataclass(frozen=True, slots=True)
class Document:
    """One entry of calibration text: exactly what one of the three keys of a line holds."""

    where: str  # file and line, for messages
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenWindows:
    """Token windows to calibrate on.

    Parameters
    ----------
    batches : tuple of torch.Tensor
        int64, shape (rows, tokens) each; all tokens are real, nothing is padded.
    source : str
        Where the text comes from, for the report.
    """

    batches: tuple[torch.Tensor, ...]
    source: str

    @property
    def rows(self) -> int:
        """Number of windows."""
        return sum(batch.shape[0] for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(batch.numel() for batch in self.batches)

    def head(self, rows: int) -> TokenWindows:
        """Return at most the first ``rows`` windows."""
        kept: list[torch.Tensor] = []
        for batch in self.batches:
            room = rows - sum(part.shape[0] for part in kept)
            if room > 0:
                kept.append(batch[:room])
        return TokenWindows(tuple(kept), self.source)

    def part(self, rank: int, size: int) -> TokenWindows:
        """Return the windows that fall to one of ``size`` processes, in their order.

        Raises
        ------
        CalibrationError
            There are fewer windows than processes.
        """
        if size == 1:
            return self
        if self.rows < size:
            raise CalibrationError(
                f"{size} processes need {size} calibration windows, and there are {self.rows}"
            )
        start, stop = (self.rows * step // size for step in (rank, rank + 1))
        kept: list[torch.Tensor] = []
        first = 0
        for batch in self.batches:
            own = batch[max(start - first, 0) : max(stop - first, 0)]
            first += batch.shape[0]
            if own.shape[0]:
                kept.append(own)
        return TokenWindows(tuple(kept), self.source)

    def to_dict(self) -> dict[str, Any]:
        """Return what the report says of it."""
        return {"source": self.source, "samples": self.rows, "tokens": self.tokens}


def read_calibration(
    path: PathLike, model_dir: Path, *, samples: int = 32, length: int = 512, batch: int = 4
) -> TokenWindows:
    """Read a calibration file and cut it into windows.

    Parameters
    ----------
    path : path
        ``.jsonl`` with ``{"text": ...}``, ``{"messages": [...]}`` (put through the chat template
        of the tokenizer) or ``{"input_ids": [...]}`` a line, ``.json`` with the configuration or
        the samples of a mixture (:class:`slim_ptq.mixing.CalibrationData`), or any other file as
        plain text.
    model_dir : Path
        Where the tokenizer is; not needed for ``input_ids``.
    samples, length : int
        At most so many windows of at most so many tokens.  Shorter texts are joined, with the end
        token of the tokenizer between them.
    batch : int
        Windows that go through the model at once.

    Raises
    ------
    CalibrationError
        The file is empty or malformed; names the line.
    """
    file = check_input_file(path, max_bytes=_MAX_BYTES)
    for name, value in (("samples", samples), ("length", length), ("batch", batch)):
        check_int(name, value, low=1)
    if file.suffix == ".jsonl":
        documents = list(_read_jsonl(file))
    elif file.suffix == ".json":
        from slim_ptq.mixing import read_mixture  # which reads files with what is defined here

        documents = read_mixture(file)
    else:
        text = decode(file)
        documents = [Document(str(file), text=text)] if text else []
    if not documents:
        raise CalibrationError(f"{file} is empty")
    ids = _tokenize(documents, model_dir, samples * length)
    return TokenWindows(windows(ids, samples, length, batch), file.name)


def windows(ids: Sequence[int], samples: int, length: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Cut a stream of tokens into batches of equally long windows.

    Raises
    ------
    CalibrationError
        There is less than one token.
    """
    if not ids:
        raise CalibrationError("the calibration data has no tokens")
    length = min(length, len(ids))
    count = min(samples, len(ids) // length)
    table = torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)
    return tuple(table[start : start + batch] for start in range(0, count, batch))


def texts_to_calibration(
    texts: Iterable[str], model_dir: Path, *, samples: int, length: int, batch: int
) -> TokenWindows:
    """Cut texts given in memory into windows, as :func:`read_calibration` does with a file."""
    documents = []
    for index, text in enumerate(texts):
        where = f"calibration text {index}"
        if not isinstance(text, str) or not text:
            raise CalibrationError(f"{where} must be a non-empty str")
        documents.append(Document(where, text=text))
    if not documents:
        raise CalibrationError("the calibration texts are empty")
    ids = _tokenize(documents, model_dir, samples * length)
    return TokenWindows(windows(ids, samples, length, batch), "texts")


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of a model directory.

    Raises
    ------
    CalibrationError
        There is none, or transformers cannot read it.
    MissingDependencyError
        It needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    hint = 'give token ids instead: lines of {"input_ids": [1, 2, ...]} in a .jsonl file'
    # Asked of transformers, a directory without any can end in an error about packages.
    if not any(_TOKENIZER_FILE.search(file.name) for file in model_dir.iterdir()):
        raise CalibrationError(f"{model_dir} has no tokenizer", hint=hint)
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CalibrationError(
            f"{model_dir} has no tokenizer that transformers can read: {error}",
            hint=hint,
        ) from error
    except ImportError as error:
        what = " ".join(str(error).split())
        raise MissingDependencyError(f"the tokenizer of {model_dir} fails: {what}") from error


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line that is not blank, with its place for messages.

    Raises
    ------
    CalibrationError
        The file is not UTF-8, or a line is no JSON object; names the line.
    """
    # Not splitlines: JSON text may hold the line separators of Unicode as they are.
    for number, line in enumerate(decode(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise CalibrationError(f"{where}: must be a JSON object, not {type(value).__name__}")
        yield where, value


def _read_jsonl(file: Path) -> Iterator[Document]:
    for where, value in read_json_lines(file):
        yield _document(value, where)


def _document(value: dict[str, Any], where: str) -> Document:
    given = {key: value[key] for key in _CHECKS if value.get(key)}
    if not given:
        raise CalibrationError(f"{where}: must have one of {', '.join(_CHECKS)}, and not empty")
    for key, content in given.items():
        what, is_right = _CHECKS[key]
        if not is_right(content):
            raise CalibrationError(f"{where}: {key} must be {what}")
    return Document(where, **given)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(token) is int and 0 <= token < 1 << 31 for token in value
    )


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a str", lambda value: isinstance(value, str)),
    "messages": ('a list of {"role": ..., "content": ...}', _are_messages),
    "input_ids": ("a list of token numbers", _are_ids),
}


def decode(file: Path) -> str:
    """Return the text of a UTF-8 file, or raise a CalibrationError that names it."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text: {error.reason}") from error


def _tokenize(documents: Sequence[Document], model_dir: Path, enough: int) -> list[int]:
    """Return one stream of tokens, at least ``enough`` of them if there is so much text."""
    tokenizer: Any = None
    ids: list[int] = []
    for document in documents:
        if len(ids) >= enough:
            break
        if document.input_ids is not None:
            ids += document.input_ids
            continue
        tokenizer = tokenizer or load_tokenizer(model_dir)
        ids += _encode(tokenizer, document)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return ids


def _encode(tokenizer: Any, document: Document) -> list[int]:
    if document.text is not None:
        return list(tokenizer(document.text).input_ids)
    if not tokenizer.chat_template:
        raise CalibrationError(f"{document.where}: has messages, the tokenizer no chat template")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(document.messages, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise CalibrationError(f"{document.where}: the chat template fails: {error}") from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)
