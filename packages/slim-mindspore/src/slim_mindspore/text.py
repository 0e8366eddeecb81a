"""Text to token ids, by the ``tokenizer.json`` of a model."""

from __future__ import annotations

from typing import Any

from slim_core.errors import MissingDependencyError
from slim_core.files import PathLike, as_path, check_input_file


def load_tokenizer(path: PathLike) -> Any:
    """Return a ``tokenizers.Tokenizer``.

    Parameters
    ----------
    path : path
        A ``tokenizer.json``, or a directory with one.

    Raises
    ------
    MissingDependencyError
        The package tokenizers is not installed.
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "reading text needs the package tokenizers, part of slim-mindspore[mindspore]",
            hint="pip install 'slim-mindspore[mindspore]'",
        ) from error
    source = as_path("path", path)
    file = check_input_file(source / "tokenizer.json" if source.is_dir() else source)
    return Tokenizer.from_file(str(file))
