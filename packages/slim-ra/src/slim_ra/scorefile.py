"""The scores behind a ``win.pt``, in a file beside it: shares can change without a new search."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slim_core.errors import FormatError
from slim_core.files import MODE_SHARED, PathLike, atomic_write, check_input_file
from slim_ra.profile import load_plain
from slim_ra.scores import HeadScores

_FORMAT = "slim-ra-scores"


def scores_path(profile: PathLike) -> Path:
    """Return where the scores of ``win.pt`` lie: ``win.scores.pt``."""
    return Path(profile).with_suffix(".scores.pt")


def write_scores(path: PathLike, scores: HeadScores) -> None:
    """Write a dict of fp32 tensors ``[layers, kv_heads]`` and plain settings, mode 0640."""
    content = {
        "format": _FORMAT,
        "induction": scores.induction,
        "echo": scores.echo,
        "needle": scores.needle,
        "candidates": list(scores.candidates),
        "settings": dict(scores.settings),
    }
    with atomic_write(path, MODE_SHARED) as stream:
        torch.save(content, stream)


def read_scores(path: PathLike) -> HeadScores:
    """Read what :func:`write_scores` wrote.

    Raises
    ------
    FormatError
        The file holds no scores.
    """
    file = check_input_file(path)
    content = load_plain(file)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FormatError(f"{file} holds no head scores")
    tensors = [content["induction"], content["echo"], content["needle"]]
    for tensor in tensors:
        if tensor is not None and not (
            isinstance(tensor, Tensor) and tensor.ndim == 2 and bool(tensor.isfinite().all())
        ):
            raise FormatError(f"the scores of {file} are no finite [layers, kv_heads] tensors")
    induction, echo, needle = tensors
    return HeadScores(induction, echo, needle, tuple(content["candidates"]), content["settings"])
