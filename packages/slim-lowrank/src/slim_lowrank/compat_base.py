"""The framework-independent half of the msModelSlim-compatible ``Decompose`` class.

A framework adds how its layers are found, read and replaced.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slim_core.errors import InvalidValueError, SlimError
from slim_core.files import check_input_file, write_json
from slim_core.logging import get_logger
from slim_core.validate import check_int, check_type, did_you_mean
from slim_lowrank.factorize import Array
from slim_lowrank.rank_requests import (
    LayerShape,
    Ranks,
    Request,
    check_ranks,
    choose_ranks,
    parse_request,
)
from slim_lowrank.ranks import check_ratio

if TYPE_CHECKING:
    from typing_extensions import Self

logger = get_logger("lowrank")

MAX_CONFIG_BYTES = 64 << 20


class DecomposeBase(ABC):
    """Choose ranks for the layers of a model, then replace the layers by factors.

    Parameters
    ----------
    model : object
        Model of the framework.
    config_file : str, optional
        Path ending in ``.json``: written (mode 0600) by every ``from_...`` method except
        :meth:`from_file`, which reads it.

    Attributes
    ----------
    decompose_config : dict or None
        Ranks by layer name: an int for matrices, ``(out, in)`` for kernels.  None until a
        ``from_...`` method ran.

    Raises
    ------
    InvalidValueError
        The model is not one of the framework, or the name of the file is wrong.
    """

    framework: ClassVar[str]

    def __init__(self, model: Any, config_file: str | None = None) -> None:
        if not self._is_model(model):
            raise InvalidValueError(f"model must be a {self.framework}, not {type(model).__name__}")
        if config_file is not None and not (
            isinstance(config_file, str) and config_file.endswith(".json")
        ):
            raise InvalidValueError(
                f"config_file must be a path ending in '.json', not {config_file!r:.80}"
            )
        self.model = model
        self.config_file = config_file
        self.decompose_config: dict[str, Ranks] | None = None

    @abstractmethod
    def _is_model(self, model: Any) -> bool:
        """Whether the framework can handle the object."""

    @abstractmethod
    def _layers(self) -> Mapping[str, LayerShape]:
        """Return the layers that can be decomposed, in the order of the model."""

    @abstractmethod
    def _weight(self, name: str) -> Array:
        """Return the weight of a layer as a float array, shaped as in its LayerShape."""

    def from_ratio(
        self,
        channel_ratio: float,
        excludes: list[str] | tuple[str, ...] | None = None,
        divisor: int = 64,
    ) -> Self:
        """Keep a share of the parameters of every layer.

        Parameters
        ----------
        channel_ratio : float
            Share of each layer's parameters to keep, strictly between 0 and 1.
        excludes : list of str, optional
            Exact names of layers to leave dense.
        divisor : int
            Ranks are multiples of it.

        Raises
        ------
        InvalidValueError
            An argument is wrong, or no layer would become smaller.
        """
        if not isinstance(channel_ratio, float):
            raise InvalidValueError(
                f"channel_ratio must be a float, not {type(channel_ratio).__name__}"
            )
        return self._choose({"": check_ratio("channel_ratio", channel_ratio)}, excludes, divisor)

    def from_fixed(
        self,
        channel_fixed: int,
        excludes: list[str] | tuple[str, ...] | None = None,
        divisor: int = 64,
    ) -> Self:
        """Give every layer one rank; arguments and errors otherwise as :meth:`from_ratio`."""
        fixed = _value_error(check_int, "channel_fixed", channel_fixed, low=1)
        return self._choose({"": fixed}, excludes, divisor)

    def from_vbmf(
        self, excludes: list[str] | tuple[str, ...] | None = None, divisor: int = 64
    ) -> Self:
        """Estimate every rank from the trained weight (:func:`slim_lowrank.vbmf.vbmf_rank`)."""
        return self._choose({"": "vbmf"}, excludes, divisor)

    def from_dict(
        self,
        channel_dict: Mapping[str, Any],
        excludes: list[str] | tuple[str, ...] | None = None,
        divisor: int = 64,
    ) -> Self:
        """Choose by name: the first key found in it (``re.search``) decides about a layer.

        Parameters
        ----------
        channel_dict : dict
            From regular expressions to a float (share), an int (rank), a pair ``(out, in)`` or
            ``"vbmf"``.  Layers that no key matches stay dense.
        excludes, divisor
            As in :meth:`from_ratio`.

        Raises
        ------
        InvalidTypeError
            A key is not a str.
        InvalidValueError
            A key is not a regular expression or a value is none of the above, naming the key.
        """
        if not isinstance(channel_dict, Mapping) or not channel_dict:
            raise InvalidValueError("channel_dict must be a non-empty dict")
        requests = {}
        for key, value in channel_dict.items():
            check_type("key of channel_dict", key, str)
            requests[key] = _value_error(parse_request, f"channel_dict[{key!r}]", value)
        return self._choose(requests, excludes, divisor)

    def from_file(self) -> Self:
        """Read the ranks that an earlier ``from_...`` call wrote to ``config_file``.

        Raises
        ------
        InvalidValueError
            No ``config_file``, not a table of ranks, an unknown layer, or a rank that does not fit.
        FileSecurityError
            The file is no regular file or can be written by others.
        """
        if self.config_file is None or not Path(self.config_file).exists():
            raise InvalidValueError(f"config_file must exist, got {self.config_file!r}")
        path = check_input_file(self.config_file, max_bytes=MAX_CONFIG_BYTES)
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(table, dict) or not table:
            raise InvalidValueError(f"{path} must hold a non-empty JSON object")
        self.decompose_config = self._check_config(table)
        return self

    def _choose(self, requests: Mapping[str, Request], excludes: Any, divisor: Any) -> Self:
        excluded, divisor = check_excludes(excludes), check_divisor(divisor)
        layers = self._layers()
        for name in sorted(excluded - layers.keys()):
            logger.warning("excludes names %r, which is no layer that can be decomposed", name)
        patterns = [(_compile(key), request) for key, request in requests.items()]
        config: dict[str, Ranks] = {}
        for name, layer in layers.items():
            request = next((value for key, value in patterns if key.search(name)), None)
            if name in excluded or request is None:
                continue
            ranks = choose_ranks(layer, request, divisor, partial(self._weight, name))
            if ranks is not None:
                config[name] = ranks
        return self._set(config)

    def _set(self, config: dict[str, Ranks]) -> Self:
        """Take ranks that were chosen, and write them to the file if there is one."""
        if not config:
            raise InvalidValueError(
                "no layer would become smaller, so nothing is decomposed",
                hint="a smaller divisor, a lower rank or fewer excludes may help",
            )
        self.decompose_config = config
        if self.config_file is not None:
            write_json(self.config_file, config)
        return self

    def _check_config(self, config: Mapping[str, Any]) -> dict[str, Ranks]:
        """Check a table of ranks against the model."""
        layers = self._layers()
        checked = {}
        for name, value in config.items():
            if name not in layers:
                raise InvalidValueError(
                    f"decompose_config names {name!r}, which is no layer that can be decomposed",
                    hint=did_you_mean(name, list(layers)),
                )
            checked[name] = _value_error(check_ranks, name, layers[name], value)
        return checked

    def _check_call(self, do_decompose_weight: Any, max_iter: Any) -> dict[str, Ranks]:
        """Check the arguments that all frameworks share and return the checked ranks."""
        if self.decompose_config is None:
            raise InvalidValueError("call one of the from_... methods before decompose_network")
        check_type("do_decompose_weight", do_decompose_weight, bool)
        check_int("max_iter", max_iter, low=-1)
        return self._check_config(self.decompose_config)


def _value_error(check: Any, *args: Any, **limits: Any) -> Any:
    """Turn a wrong type into a ValueError: what callers of the compatible face catch."""
    try:
        return check(*args, **limits)
    except TypeError as error:
        message = error.message if isinstance(error, SlimError) else str(error)
        raise InvalidValueError(message) from error


def check_divisor(divisor: Any) -> int:
    """Require an int of at least 1."""
    checked: int = _value_error(check_int, "divisor", divisor, low=1)
    return checked


def check_excludes(excludes: Any) -> set[str]:
    """Require None or a list or tuple of str."""
    if excludes is None:
        return set()
    if not isinstance(excludes, (list, tuple)) or not all(isinstance(x, str) for x in excludes):
        raise InvalidValueError(f"excludes must be a list of str, not {excludes!r:.80}")
    return set(excludes)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidValueError(f"key {pattern!r} is no regular expression: {error}") from error
