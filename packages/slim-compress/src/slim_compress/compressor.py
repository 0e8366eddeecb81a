"""The compatible face: a dictionary of weights in, dictionaries or safetensors out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slim_compress.arrays import to_int8, to_numpy
from slim_compress.codec import Compressed, compress, decompress
from slim_compress.config import CompressConfig
from slim_compress.description import (
    WEIGHT_FILE,
    compressed_description,
    description_file,
    is_sparse_weight,
    refuse_16_bit,
    tensor_types,
    types_of,
)
from slim_compress.device import compress_for_device
from slim_compress.errors import VerificationError
from slim_compress.export import export_arrays
from slim_compress.layout import nd_to_nz
from slim_compress.loading import load_weights
from slim_compress.quant_types import QuantType
from slim_core.checkpoint import ShardWriter
from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.files import PathLike, as_path, make_dir, write_json
from slim_core.logging import logger as slim_logger
from slim_core.logging import set_logger_level
from slim_core.progress import track
from slim_core.validate import check_type


class Compressor:
    """Compresses the sparse weights (W8A8S) of a model.

    Parameters
    ----------
    config : CompressConfig
    weight_path : path, optional
        A dictionary name -> array saved with ``np.save``; all its arrays are compressed.  Asks for
        a confirmation, see :func:`slim_compress.loading.load_weights`.
    weight : dict of str to torch.Tensor or numpy.ndarray, optional
        All tensors of a checkpoint, together with
    quant_model_description : dict, optional
        The type of each tensor.  Those that are W8A8S and end in ``.weight`` are compressed, norms
        excepted.
    trusted : bool
        Load ``weight_path`` without asking.

    Attributes
    ----------
    config : CompressConfig
    weights, quant_model_description : dict or None
    sparse_type : QuantType or None
        W8A8S if there is something to compress.
    compress_result_weight, compress_result_index, compress_result_info : dict
        What :meth:`run` returned.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        An argument is wrong or none of the inputs is given.
    CheckpointError
        The weights and the description do not speak of the same tensors; names them.
    """

    def __init__(
        self,
        config: CompressConfig,
        weight_path: PathLike | None = None,
        weight: dict[str, Any] | None = None,
        quant_model_description: dict[str, Any] | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        if not isinstance(config, CompressConfig):
            raise InvalidValueError(f"config must be a CompressConfig, not {type(config).__name__}")
        self.config = config
        self.quant_model_description = quant_model_description
        self._types: dict[str, str] | None = None
        if weight_path:
            self.weights = load_weights(weight_path, trusted=check_type("trusted", trusted, bool))
            self.quant_model_description = None
        elif weight and quant_model_description:
            self.weights = check_type("weight", weight, dict)
            self._types = self._check_description(quant_model_description)
        else:
            raise InvalidValueError(
                "Weight Loading failed! Give weight_path, or weight and quant_model_description"
            )
        self._keys = self._select()
        for name in sorted(set(config.compress_disable_layers) - self.weights.keys()):
            config.logger.warning("compress_disable_layers names %s, which is no weight", name)
        self.sparse_type = QuantType.W8A8S if self._keys else None
        self._transpose = False
        self.compress_result_weight: dict[str, np.ndarray] = {}
        self.compress_result_index: dict[str, np.ndarray] = {}
        self.compress_result_info: dict[str, np.ndarray] = {}

    def run(
        self, weight_transpose: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Compress.

        Parameters
        ----------
        weight_transpose : bool
            The weights are (k, n): transpose them first.  Linear layers of torch need it not.

        Returns
        -------
        weight, index, info : dict of str to numpy.ndarray
            See :class:`slim_compress.Compressed`.  A disabled layer has its bytes in FRACTAL_NZ as
            ``weight``, an empty ``index`` and no ``info``.

        Raises
        ------
        InvalidValueError
            There is no sparse weight, or one is not a matrix of int8 values; names it.
        ExecutorError
            The device codec failed.
        """
        self._transpose = check_type("weight_transpose", weight_transpose, bool)
        if not self._keys:
            raise InvalidValueError("No sparse weight found in input weight and description")
        enabled = [key for key in self._keys if key not in self.config.compress_disable_layers]
        for key in enabled:
            to_int8(key, self.weights[key])  # every error before any work
        results = (
            self.compress_result_weight,
            self.compress_result_index,
            self.compress_result_info,
        )
        for result in results:
            result.clear()
        done = dict(track(self._compress_all(enabled), "compressing", total=len(enabled)))
        for key in self._keys:
            if key in done:
                for result, array in zip(results, done[key], strict=True):
                    result[key] = array
            else:
                results[0][key] = nd_to_nz(self._matrix(key), name=key)
                results[1][key] = np.empty(0, np.int8)
        if self.config.is_debug:
            self._log_ratios(enabled)
        return results

    def verify(self) -> int:
        """Decode everything that :meth:`run` compressed and compare it with the originals.

        Returns
        -------
        int
            Weights compared.

        Raises
        ------
        VerificationError, CorruptStreamError
            A weight does not come back as it was; names it.
        FormatError
            The streams are for the device, which only its hardware can decode.
        """
        for key in track(self.compress_result_info, "verifying"):
            decoded = decompress(*self._triple(key), jobs=self.config.multiprocess_num, name=key)
            if not np.array_equal(decoded, self._matrix(key)):
                raise VerificationError(f"{key}: the decoded weight differs from the original")
        return len(self.compress_result_info)

    @classmethod
    def export(cls, arr: dict[str, np.ndarray], path: str, dtype: Any = np.int8) -> None:
        """Write each array to ``<path>/<key>.dat``; see :func:`slim_compress.export.export_arrays`.

        Info arrays need ``dtype=np.int64``.
        """
        export_arrays(arr, path, dtype)

    def export_safetensors(
        self, path: PathLike, safetensors_name: str | None = None, json_name: str | None = None
    ) -> None:
        """Write the checkpoint with compressed weights, and its description.

        Each compressed ``X.weight`` becomes ``X.weight``, ``X.index`` and ``X.info``; all other
        tensors, disabled layers and norms among them, stay as they are.

        Parameters
        ----------
        path : path
            Directory; created with mode 0750 if missing.
        safetensors_name, json_name : str, optional
            Names of the two files; a name with another suffix is replaced by the default, which a
            warning says.

        Raises
        ------
        InvalidValueError
            The compressor was made without a description, or :meth:`run` was not called.
        """
        description = self.quant_model_description
        if description is None or self._types is None:
            raise InvalidValueError(
                "export_safetensors needs weight and quant_model_description",
                hint="results of weight_path are written by export()",
            )
        if not self.compress_result_weight:
            raise InvalidValueError("there is nothing to export before run()")
        weights = self._file_name("safetensors_name", safetensors_name, ".safetensors", WEIGHT_FILE)
        default = description_file(description, "w8a8sc")
        notes = self._file_name("json_name", json_name, ".json", default)
        directory = make_dir(as_path("path", path))
        with ShardWriter(directory, weights.removesuffix(".safetensors")) as writer:
            for key in self._types:
                for name, array in self._stored(key):
                    writer.add(name, array)
        done = compressed_description(description, self.compress_result_info, self.config.codec)
        write_json(directory / notes, done)

    def _check_description(self, description: Any) -> dict[str, str]:
        types = tensor_types(check_type("quant_model_description", description, dict))
        for key, value in self.weights.items():
            if not isinstance(key, str):
                raise InvalidTypeError(f"the keys of weight must be str, not {type(key).__name__}")
            to_numpy(key, value)
        types = types_of(self.weights, types)
        refuse_16_bit(types)
        return types

    def _select(self) -> list[str]:
        if self._types is None:
            return sorted(self.weights)
        return [key for key, kind in self._types.items() if is_sparse_weight(key, kind)]

    def _matrix(self, key: str) -> np.ndarray:
        """Return the (n, k) matrix that is compressed under this key."""
        matrix = to_int8(key, self.weights[key])
        if self._transpose:
            matrix = matrix.T
        if self.config.do_pseudo_sparse:
            keep = pseudo_sparse_mask(
                matrix.shape, self.config.sparse_ratio, [self.config.seed, zlib.crc32(key.encode())]
            )
            matrix = np.where(keep, matrix, np.int8(0))
        return matrix

    def _compress_all(self, keys: list[str]) -> Iterator[tuple[str, Compressed]]:
        if self.config.codec == "slc1":
            for key in keys:
                yield key, self._compress_one(key)
            return
        make_dir(self.config.record_detail_root)
        yield from in_order(self._compress_on_device, keys, self.config.multiprocess_num)

    def _compress_one(self, key: str) -> Compressed:
        return compress(
            self._matrix(key),
            jobs=self.config.multiprocess_num,
            fast=self.config.fast,
            transposed=self._transpose,
            name=key,
        )

    def _compress_on_device(self, key: str) -> Compressed:
        if self.config.executor is None:
            raise InvalidValueError("codec='device' needs executor")
        return compress_for_device(
            self._matrix(key),
            executor=self.config.executor,
            root=Path(self.config.record_detail_root),
            timeout=self.config.executor_timeout,
            name=key,
        )

    def _triple(self, key: str) -> Compressed:
        return Compressed(
            self.compress_result_weight[key],
            self.compress_result_index[key],
            self.compress_result_info[key],
        )

    def _stored(self, key: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tensors that take the place of one, by name."""
        if key not in self.compress_result_info:
            yield key, to_numpy(key, self.weights[key])
            return
        stem = key.removesuffix(".weight")
        for part, array in zip((".weight", ".index", ".info"), self._triple(key), strict=True):
            yield stem + part, array

    def _file_name(self, what: str, name: Any, suffix: str, default: str) -> str:
        if isinstance(name, str) and name.endswith(suffix) and Path(name).name == name:
            return name
        self.config.logger.warning("%s is not a name ending in %s: using %s", what, suffix, default)
        return default

    def _log_ratios(self, keys: Iterable[str]) -> None:
        if slim_logger.level == 0:  # no program has set up the log that is_debug asks for
            set_logger_level("info")
        before = after = 0
        for key in keys:
            raw = to_numpy(key, self.weights[key]).size
            stored = self.compress_result_weight[key].size
            self.config.logger.info("%s: compression ratio %.4f", key, stored / raw)
            before, after = before + raw, after + stored
        if before:
            self.config.logger.info(
                "The final compression ratio is %.4f (from %d to %d)", after / before, before, after
            )


def pseudo_sparse_mask(shape: tuple[int, ...], ratio: float, seed: int | list[int]) -> np.ndarray:
    """Return a random mask that keeps each element with probability ``ratio``."""
    return np.random.default_rng(seed).random(shape, np.float32) < ratio


def in_order(
    work: Callable[[str], Compressed], keys: list[str], jobs: int
) -> Iterator[tuple[str, Compressed]]:
    """Yield (key, work(key)) in order, with ``jobs`` of them under way and no more."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: dict[str, Future[Compressed]] = {}
        rest = iter(keys)
        for key in keys:
            while len(waiting) < jobs and (ahead := next(rest, None)) is not None:
                waiting[ahead] = pool.submit(work, ahead)
            try:
                result = waiting.pop(key).result()
            except BaseException:
                for future in waiting.values():
                    future.cancel()
                raise
            yield key, result
