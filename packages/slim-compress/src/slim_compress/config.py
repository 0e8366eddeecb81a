"""Settings of a compression."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.files import PathLike
from slim_core.logging import get_logger
from slim_core.validate import check_choice, check_float, check_int, check_type

# Names of tensors; a name goes into file names and log lines.
_NAME = re.compile(r"""[_A-Za-z0-9"'><=\[\])(,}{: /.*~-]*""")

Codec = Literal["slc1", "device"]


class CompressConfig:
    """Settings of a :class:`~slim_compress.Compressor`.

    Parameters
    ----------
    do_pseudo_sparse : bool
        Set random elements to zero before compression.  A toy for measurements: the weights change.
    sparse_ratio : float
        Share of the elements that ``do_pseudo_sparse`` *keeps*, in [0, 1].
    is_debug : bool
        Log the ratio of each weight and of all.
    compress_disable_layers : list or tuple of str, optional
        Keys of weights (with ``.weight`` where the dictionary has it) that stay uncompressed.
    record_detail_root : str
        Directory for the temporary files of the device codec; created with mode 0750.
    multiprocess_num : int
        Threads, or concurrent executors of the device codec.  Above the number of processors it is
        lowered to that, which a log line says; the result does not depend on it.
    codec : {"slc1", "device"}
        ``slc1`` is the open format that this package decodes.  ``device`` runs ``executor``, which
        needs CANN and an Atlas 300I Duo, and gives the stream of its hardware.
    fast : bool
        slc1 only: decode several times faster, at the price of size.
    seed : int
        Of the mask of ``do_pseudo_sparse``: the same seed, the same mask.
    executor : path, optional
        Program of CANN users that the device codec runs (``compress_excutor``).
    executor_timeout : float
        Seconds that one run of it may take.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is wrong; the message names it.
    """

    def __init__(
        self,
        do_pseudo_sparse: bool = False,
        sparse_ratio: float = 1,
        is_debug: bool = False,
        compress_disable_layers: Sequence[str] | None = None,
        record_detail_root: str = "./",
        multiprocess_num: int = 1,
        *,
        codec: Codec = "slc1",
        fast: bool = False,
        seed: int = 0,
        executor: PathLike | None = None,
        executor_timeout: float = 600.0,
    ) -> None:
        self.logger = get_logger("compress")
        self.do_pseudo_sparse = check_type("do_pseudo_sparse", do_pseudo_sparse, bool)
        self.sparse_ratio = sparse_ratio
        if do_pseudo_sparse:
            check_float("sparse_ratio", sparse_ratio, low=0.0, high=1.0)
        self.is_debug = check_type("is_debug", is_debug, bool)
        self.compress_disable_layers = _check_names(compress_disable_layers)
        if not isinstance(record_detail_root, str):
            raise InvalidValueError(
                f"record_detail_root must be str, not {type(record_detail_root).__name__}"
            )
        self.record_detail_root = record_detail_root
        self.multiprocess_num = self._check_jobs(multiprocess_num)
        self.codec: Codec = check_choice("codec", codec, ("slc1", "device"))
        self.fast = check_type("fast", fast, bool)
        self.seed = check_int("seed", seed, low=0)
        self.executor_timeout = check_float("executor_timeout", executor_timeout, low=0.001)
        self.executor = self._check_executor(executor)

    def _check_jobs(self, value: int) -> int:
        check_int("multiprocess_num", value, low=1)
        processors = os.cpu_count() or 1
        if value > processors:
            self.logger.info(
                "multiprocess_num is %d, the machine has %d processors: using %d",
                *(value, processors, processors),
            )
        return min(value, processors)

    def _check_executor(self, executor: PathLike | None) -> Path | None:
        if self.codec != "device":
            if executor is not None:
                raise InvalidValueError("executor is used only with codec='device'")
            return None
        if executor is None:
            raise InvalidValueError(
                "codec='device' needs executor, the path of the program that compresses with CANN",
                hint="codec='slc1' needs neither CANN nor a device",
            )
        path = Path(executor)
        if not path.is_file() or not os.access(path, os.X_OK):
            raise InvalidValueError(f"executor must be an executable file, not {path}")
        return path.resolve()


def _check_names(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return []
    if not isinstance(names, (list, tuple)):
        raise InvalidTypeError(
            f"compress_disable_layers must be list or tuple, not {type(names).__name__}"
        )
    for position, name in enumerate(names):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidValueError(
                f"compress_disable_layers[{position}] must be a tensor name, not {name!r:.80}"
            )
    return list(names)
