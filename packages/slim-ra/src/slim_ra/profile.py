"""``win.pt`` and the other files that say what each head keeps.

RoPE models: a dict ``{"prefix_matching": {layer: [kv_head, ...]}, "copying": {...}}`` with
induction and echo heads.  ALiBi models: one int64 tensor, element ``h`` the number of latest tokens
that head ``h`` keeps.  Both are what the deployment flows of Ascend paste into their tables, and
both load with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import FormatError, InvalidValueError
from slim_core.files import (
    MODE_SHARED,
    MODE_WEIGHTS,
    PathLike,
    atomic_write,
    check_input_file,
    write_bytes,
)
from slim_ra import dialects

INDUCTION, ECHO = "prefix_matching", "copying"
_WINDOWS = "slim-ra-windows"
_MAX_BYTES = 1 << 26

Heads = Mapping[int, list[int]]


@dataclass(frozen=True)
class RetrievalHeads:
    """KV heads of a RoPE model that keep their whole history.

    Attributes
    ----------
    induction, echo : dict of int to list of int
        KV heads of each layer, ascending; layers without any are left out.
    """

    induction: Heads
    echo: Heads = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("induction", "echo"):
            object.__setattr__(self, name, _clean(name, getattr(self, name)))

    def union(self) -> dict[int, list[int]]:
        """Return the heads that are in either set."""
        layers = sorted({*self.induction, *self.echo})
        return {i: sorted({*self.induction.get(i, []), *self.echo.get(i, [])}) for i in layers}

    def count(self) -> int:
        """Return the number of heads in either set."""
        return sum(map(len, self.union().values()))


@dataclass(frozen=True)
class AlibiWindows:
    """Latest tokens that each head of an ALiBi model keeps.

    Attributes
    ----------
    windows : Tensor
        int64, ``[heads]`` for all layers alike or ``[layers, heads]``.
    settings : dict
        How they were found, in plain types; not part of ``win.pt``.
    """

    windows: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        windows = self.windows
        if windows.ndim not in (1, 2) or windows.is_floating_point() or not windows.numel():
            raise FormatError(
                "windows must be integers of shape [heads] or [layers, heads], not "
                f"{windows.dtype} {list(windows.shape)}"
            )
        object.__setattr__(self, "windows", windows.to("cpu", torch.int64).contiguous())

    def shared(self) -> Tensor:
        """Return one window a head that serves all layers, int64 ``[heads]``."""
        return self.windows if self.windows.ndim == 1 else self.windows.amax(0)


Profile = RetrievalHeads | AlibiWindows


def write_profile(
    path: PathLike, profile: Profile, *, shape: tuple[int, int] | None = None
) -> None:
    """Write a profile in the dialect that the ending of ``path`` names.

    ``.pt``: ``win.pt``; ALiBi windows shared by all layers, mode 0400, retrieval heads mode 0640.
    ``.layers.pt``: ALiBi windows of each layer with their settings.  ``.json``: heads of each layer
    (Golden-Stick).  ``.tsv``: a 0/1 pattern (DuoAttention), which needs ``shape``, the number of
    layers and of KV heads.

    Raises
    ------
    FormatError
        The dialect cannot hold the profile.
    """
    name = Path(path).name
    if name.endswith(".layers.pt") and isinstance(profile, AlibiWindows):
        rich = {"format": _WINDOWS, "windows": profile.windows, "settings": dict(profile.settings)}
        _save(path, rich, MODE_WEIGHTS)
    elif name.endswith(".pt"):
        if isinstance(profile, AlibiWindows):
            _save(path, profile.shared().clone(), MODE_WEIGHTS)
        else:
            plain = {INDUCTION: dict(profile.induction), ECHO: dict(profile.echo)}
            _save(path, plain, MODE_SHARED)
    elif name.endswith(".json") and isinstance(profile, RetrievalHeads):
        write_bytes(path, dialects.heads_json(profile.union()).encode(), MODE_SHARED)
    elif name.endswith(".tsv") and isinstance(profile, RetrievalHeads) and shape is not None:
        check_fits(profile.union(), *shape)
        text = dialects.pattern_text(profile.union(), *shape)
        write_bytes(path, text.encode(), MODE_SHARED)
    else:
        raise FormatError(
            f"{name} cannot hold {type(profile).__name__}",
            hint="endings: .pt, .json (heads), .tsv (heads, with a shape), .layers.pt (windows)",
        )


def read_profile(path: PathLike) -> Profile:
    """Read any of the dialects: ``win.pt``, Golden-Stick JSON, DuoAttention TSV, 0/1 pattern.

    JSON and patterns know no echo heads: all their heads come back as induction heads.

    Raises
    ------
    FormatError
        The file is none of these.
    FileSecurityError
        The file is unsafe to read.
    """
    file = check_input_file(path, max_bytes=_MAX_BYTES)
    if file.suffix == ".json":
        return RetrievalHeads(dialects.parse_heads_json(file.read_text()))
    if file.suffix in (".tsv", ".txt"):
        return RetrievalHeads(dialects.parse_pattern(file.read_text()))
    return parse_profile(load_plain(file), file.name)


def load_plain(file: Path) -> Any:
    """Load a torch file of tensors and plain containers, and nothing else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise FormatError(f"{file} is no readable torch file of plain data: {error}") from error


def parse_profile(content: Any, name: str) -> Profile:
    """Interpret what a ``.pt`` file holds."""
    if isinstance(content, Tensor):
        return AlibiWindows(content)
    if isinstance(content, dict) and content.get("format") == _WINDOWS:
        return AlibiWindows(content["windows"], content["settings"])
    if isinstance(content, dict) and set(content) == {INDUCTION, ECHO}:
        return RetrievalHeads(content[INDUCTION], content[ECHO])
    raise FormatError(f"{name} holds neither retrieval heads nor ALiBi windows")


def _save(path: PathLike, content: Any, mode: int) -> None:
    with atomic_write(path, mode) as stream:
        torch.save(content, stream)


def _clean(name: str, heads: Any) -> dict[int, list[int]]:
    if not isinstance(heads, Mapping):
        raise FormatError(f"{name} must map layers to KV heads, not be {type(heads).__name__}")
    clean: dict[int, list[int]] = {}
    for layer, row in sorted(heads.items(), key=lambda item: str(item[0]).zfill(9)):
        numbers = [layer, *row] if isinstance(row, (list, tuple)) else [None]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise FormatError(f"{name}[{layer!r}] must list KV heads (int >= 0), not {row!r:.80}")
        if row:
            clean[layer] = sorted(set(row))
    return clean


def check_fits(heads: Mapping[int, list[int]], layers: int, kv_heads: int) -> None:
    """Require that all heads exist in a model.

    Raises
    ------
    InvalidValueError
        A layer or head that the model does not have.
    """
    for layer, row in heads.items():
        if layer >= layers or max(row) >= kv_heads:
            raise InvalidValueError(
                f"the profile names KV head {max(row)} of layer {layer}, but the model has "
                f"{layers} layers of {kv_heads} KV heads"
            )
