"""The report of a run: what was done to each layer, what it cost, what it saved.

One set of dataclasses and three renderings: JSON (here), a console summary
(:mod:`slim_core.report_console`) and a page of HTML (:mod:`slim_core.report_html`).  Errors are
relative Frobenius errors, ``||W - W_q|| / ||W||``: 0 is exact and 1 is as bad as all zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from slim_core.errors import CheckpointError
from slim_core.files import PathLike, as_path, check_input_file, write_bytes, write_json
from slim_core.validate import check_int

JSON_FILE = "slim_report.json"
HTML_FILE = "slim_report.html"

_VERSION = 1
_MAX_BYTES = 1 << 28

R = TypeVar("R", "LayerReport", "Report")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer.

    Parameters
    ----------
    name : str
        Dotted name of the layer in the checkpoint.
    scheme, type, method : str
        Scheme in the short notation, type in the description file, algorithm.
    shape : tuple of int
        Of the weight.
    bytes_before, bytes_after : int
        Of the stored tensors of the layer.
    weight_error : float
        Relative Frobenius error of the weight.
    output_error : float, optional
        Relative Frobenius error of the layer's output on calibration data.
    seconds : float
    notes : tuple of str
    """

    name: str
    scheme: str
    type: str
    method: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether the layer was left in floating point."""
        return self.type == "FLOAT"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, content: Any) -> LayerReport:
        """Return what :meth:`to_dict` was called on.

        Raises
        ------
        CheckpointError
            A key is missing or has a wrong value.
        """
        return _build(cls, "layer", content, _LAYER_KEYS)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Parameters
    ----------
    tool : str
        Name and version of the program.
    model, scheme, format : str
    layers : tuple of LayerReport
        In the order of the model.
    bytes_before, bytes_after : int
        True bytes of the weight files on disk.
    perplexity_before, perplexity_after : float, optional
        Of the float and the quantized model on ``perplexity_tokens`` tokens of the text file
        ``perplexity_text``.
    calibration : dict, optional
        What the statistics come from: file, samples, tokens.
    fallbacks : tuple of (str, str)
        Layers that did not get what was asked for, and the reasons.
    seconds : dict
        Wall time of each stage, in the order in which they ran.
    peak_memory : int, optional
        Largest resident set of the process, in bytes.
    provenance : dict
        Versions, seeds and settings that are needed to repeat the run.
    """

    tool: str
    model: str
    scheme: str
    format: str
    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_text: str | None = None
    perplexity_tokens: int | None = None
    calibration: dict[str, Any] | None = None
    fallbacks: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were not left in floating point."""
        return tuple(layer for layer in self.layers if not layer.is_float)

    @property
    def has_output_errors(self) -> bool:
        """Whether the output error of every quantized layer was measured."""
        layers = self.quantized
        return bool(layers) and all(layer.output_error is not None for layer in layers)

    def worst(self, n: int = 10) -> tuple[LayerReport, ...]:
        """Return the ``n`` quantized layers with the largest errors, largest first.

        They are ranked by output error if every quantized layer has one, else by weight error.
        """
        check_int("n", n, low=0)
        by_output = self.has_output_errors

        def error(layer: LayerReport) -> float:
            value = layer.output_error if by_output else layer.weight_error
            return math.inf if value is None or math.isnan(value) else value

        return tuple(sorted(self.quantized, key=error, reverse=True)[:n])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON; numbers that JSON lacks become strings."""
        plain: dict[str, Any] = _plain({"report_version": _VERSION} | asdict(self))
        return plain

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that :meth:`to_json` wrote.

        Raises
        ------
        CheckpointError
            The text is not such a report; names the key at fault.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"the report is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("report_version", None) != _VERSION:
            raise CheckpointError(f"the report has no report_version {_VERSION}")
        return _build(cls, "report", content, _REPORT_KEYS)

    @classmethod
    def load(cls, path: PathLike) -> Report:
        """Read a report from its JSON file, or from the directory that holds it."""
        file = as_path("path", path)
        file = check_input_file(file / JSON_FILE if file.is_dir() else file, max_bytes=_MAX_BYTES)
        return cls.from_json(file.read_text(encoding="utf-8"))

    def save(self, directory: PathLike) -> tuple[Path, Path]:
        """Write ``slim_report.json`` and ``slim_report.html``, mode 0600, and return their paths.

        Each file is complete or not there; the directory must exist.
        """
        from slim_core.report_html import render_html

        folder = as_path("directory", directory)
        page = render_html(self)
        write_json(folder / JSON_FILE, self.to_dict())
        write_bytes(folder / HTML_FILE, page.encode())
        return folder / JSON_FILE, folder / HTML_FILE


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


def _build(cls: type[R], what: str, content: Any, keys: Mapping[str, Callable[[Any], Any]]) -> R:
    """Return a dataclass of plain values, each key checked and converted."""
    if not isinstance(content, dict) or set(content) != {item.name for item in fields(cls)}:
        raise CheckpointError(f"a {what} must have the keys {', '.join(keys)}")
    values = {}
    for key, convert in keys.items():
        try:
            values[key] = convert(content[key])
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{key} of a {what} is damaged: {error}") from error
    return cls(**values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a string")
    return value


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _items(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: tuple(convert(item) for item in value)


def _fallback(value: Any) -> tuple[str, str]:
    name, reason = value
    return _text(name), _text(reason)


def _seconds(value: Any) -> dict[str, float]:
    return {_text(stage): float(time) for stage, time in dict(value).items()}


_LAYER_KEYS: dict[str, Callable[[Any], Any]] = {
    "name": _text,
    "scheme": _text,
    "type": _text,
    "method": _text,
    "shape": _items(int),
    "bytes_before": int,
    "bytes_after": int,
    "weight_error": float,
    "output_error": _optional(float),
    "seconds": float,
    "notes": _items(_text),
}
_REPORT_KEYS: dict[str, Callable[[Any], Any]] = {
    "tool": _text,
    "model": _text,
    "scheme": _text,
    "format": _text,
    "layers": _items(LayerReport.from_dict),
    "bytes_before": int,
    "bytes_after": int,
    "perplexity_before": _optional(float),
    "perplexity_after": _optional(float),
    "perplexity_text": _optional(_text),
    "perplexity_tokens": _optional(int),
    "calibration": _optional(dict),
    "fallbacks": _items(_fallback),
    "seconds": _seconds,
    "peak_memory": _optional(int),
    "provenance": dict,
}
