"""Sparse quantization of a MindSpore network: the compatible ``Calibrator``."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.errors import (
    CalibrationError,
    CheckpointError,
    FileSecurityError,
    InvalidTypeError,
    InvalidValueError,
    PatternError,
    SlimError,
)
from slim_core.files import PathLike, as_path, check_input_file, make_dir, write_json
from slim_core.formats import DESCRIPTION_FILE
from slim_core.layers import QuantizedLinear
from slim_core.logging import get_logger
from slim_core.validate import check_choice, check_type
from slim_mindspore.ckpt import MAX_BYTES, CkptFile, write_ckpt
from slim_mindspore.config import QuantConfig
from slim_mindspore.fake_quant import CalibratedLinear
from slim_mindspore.framework import ms, nn
from slim_mindspore.generation import as_ids
from slim_mindspore.linears import check_known, find_linears, replace_cell, set_weight
from slim_mindspore.modes import pynative
from slim_mindspore.sparse import SparseWeight, quantize_sparse, stored_layer
from slim_mindspore.sparse_format import SPARSE_TYPE, WEIGHT_DTYPES, encode_sparse

LAYER_PATTERN = r"model\.layers\.\d+\.(attention[^_]|feed_forward|augs_attn\d+).*"

logger = get_logger("mindspore")

Forward = Callable[[Any, Any], Any]


class NotQuantizedError(SlimError, RuntimeError):
    """Results are asked for that :meth:`Calibrator.run` has yet to make."""


class Calibrator:
    """Quantize the linear cells of a network to a sparse-friendly int8.

    Parameters
    ----------
    cfg : QuantConfig
    model : Cell
        The float network; any ``nn.Cell``.  It stays as it is: calibration works on a copy.
    model_ckpt : path
        Its float ``.ckpt`` file; what is saved comes from there.
    calib_data : list, optional
        One element a sample: ``[[ids], ...]``.  A sample goes to ``model.generate(ids,
        max_new_tokens=1)`` if the model has that, to ``model(*sample)`` otherwise.
    forward_fn : callable, optional
        ``forward_fn(model, sample)`` in place of both.
    pattern : str
        Regular expression that the names of the cells to quantize must contain.
    allow_uncalibrated : bool
        Accept empty ``calib_data``; activations then get the scale 1 and the offset 1, which are
        good for nothing but looking at weights.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        An argument is wrong.
    CalibrationError
        ``calib_data`` is empty.
    PatternError
        No cell is to be quantized, or ``disable_names`` holds a name that no linear cell has.
    CheckpointError
        ``model_ckpt`` lacks the weight of a cell or has it in another shape; lists all of them.
    """

    def __init__(
        self,
        cfg: QuantConfig,
        model: Any,
        model_ckpt: PathLike,
        calib_data: list[Any] | None = None,
        *,
        forward_fn: Forward | None = None,
        pattern: str = LAYER_PATTERN,
        allow_uncalibrated: bool = False,
    ) -> None:
        self._cfg = check_type("cfg", cfg, QuantConfig)
        self._model = check_type("model", model, nn.Cell)
        self._data = check_type("calib_data", [] if calib_data is None else calib_data, list)
        if not self._data and not check_type("allow_uncalibrated", allow_uncalibrated, bool):
            raise CalibrationError(
                "calib_data is empty, so activations cannot be quantized",
                hint="pass samples, or allow_uncalibrated=True to look at weights only",
            )
        if forward_fn is not None and not callable(forward_fn):
            raise InvalidTypeError("forward_fn must be callable")
        self._forward: Forward = forward_fn or run_sample
        self._ckpt = CkptFile(check_input_file(model_ckpt, max_bytes=MAX_BYTES))
        self._names = self._select(pattern)
        self._check_weights()
        self._weights: dict[str, SparseWeight] = {}
        self._network: Any = None

    def run(self) -> None:
        """Quantize the weights, then find the ranges of the activations.

        Ranges come from the network that already runs on the quantized weights and inputs.

        Raises
        ------
        CalibrationError
            A sample cannot be run.
        NumericalError
            A weight holds NaN or infinity.
        """
        network = self._quantized_network()
        with pynative():
            for number, sample in enumerate(self._data):
                try:
                    self._forward(network, sample)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise CalibrationError(
                        f"the model cannot run sample {number} of calib_data: {error}",
                        hint="pass forward_fn=... if the model is called in another way",
                    ) from error
        unused = [name for name in self._names if not _cell(network, name).range.calls]
        if unused and self._data:
            raise CalibrationError(
                f"the samples never reached {', '.join(unused[:5])}",
                hint="put cells that are never called into disable_names",
            )
        for name in self._names:
            _cell(network, name).observing = False
        self._network = network

    def save(self, output_path: str, *, weight_dtype: str = "int8") -> None:
        """Write the quantized checkpoint, and beside it ``quant_model_description.json``.

        Parameters
        ----------
        output_path : str
            Ends in ``.ckpt``; its directory is created with mode 0750 if its parent exists.  The
            file gets mode 0400, the description 0600.
        weight_dtype : str
            ``int8``, or ``float32`` for readers that expect the codes as floats.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            The path is no str, does not end in ``.ckpt``, or has no place to be written to.
        NotQuantizedError
            :meth:`run` has not been called.
        FormatError
            A value does not fit its place in the file; names the layer.
        """
        path = check_output(output_path)
        check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
        if self._network is None:
            raise NotQuantizedError("call run() before save()")
        tensors: dict[str, np.ndarray] = {}
        types: dict[str, str] = {}
        layers = {f"{name}.weight": name for name in self._names}
        folded = {f"{name}.bias" for name in self._names}
        for key in self._ckpt.tensors:
            if key in layers:
                encoded = encode_sparse(self._layer(layers[key]), weight_dtype)
                named = {f"{layers[key]}.{local}": array for local, array in encoded.items()}
                types |= dict.fromkeys(named, SPARSE_TYPE)
                tensors |= named
            elif key not in folded:
                tensors[key] = self._ckpt.load(key)
                types[key] = "FLOAT"
        make_dir(path.parent)
        write_ckpt(path, tensors)
        header = {"version": "1.0.0", "model_quant_type": SPARSE_TYPE}
        write_json(path.with_name(DESCRIPTION_FILE), header | types)

    def fake_quantize_model(self) -> Any:
        """Return a float copy of the network that computes as the quantized one does.

        Before :meth:`run` only its weights are quantized.
        """
        return self._network if self._network is not None else self._quantized_network()

    def _quantized_network(self) -> Any:
        network = copy.deepcopy(self._model)
        network.update_parameters_name()
        linears = find_linears(network)
        for name in self._names:
            if name not in self._weights:
                weight = self._ckpt.load(f"{name}.weight")
                self._weights[name] = quantize_sparse(name, weight, self._cfg.fraction)
            set_weight(linears[name], self._weights[name].dequantized())
            replace_cell(network, name, CalibratedLinear(linears[name]))
        network.set_train(False)
        return network

    def _layer(self, name: str) -> QuantizedLinear:
        range_ = _cell(self._network, name).range
        scale, offset = range_.params() if range_.calls else (1.0, 1.0)
        key = f"{name}.bias"
        bias = self._ckpt.load(key) if key in self._ckpt.tensors else None
        return stored_layer(name, self._weights[name], scale, offset, bias)

    def _select(self, pattern: str) -> list[str]:
        linears = find_linears(self._model)
        check_known("disable_names", self._cfg.disable_names, list(linears))
        try:
            search = re.compile(check_type("pattern", pattern, str)).search
        except re.error as error:
            raise InvalidValueError(f"pattern is no regular expression: {error}") from error
        chosen = [name for name in linears if search(f"{name}.weight")]
        names = [name for name in chosen if name not in self._cfg.disable_names]
        if not names:
            raise PatternError(
                "no linear cell is left to quantize",
                hint=f"names look like {', '.join(list(linears)[:3])}; the pattern is {pattern}",
            )
        return names

    def _check_weights(self) -> None:
        linears = find_linears(self._model)
        problems = []
        for name in self._names:
            shape = tuple(linears[name].weight.shape)
            info = self._ckpt.tensors.get(f"{name}.weight")
            if info is None:
                problems.append(f"{name}.weight is missing")
            elif info.shape != shape:
                problems.append(f"{name}.weight has shape {info.shape}, the model {shape}")
            elif "float" not in info.dtype.name:
                problems.append(f"{name}.weight is {info.dtype}, not floating point")
            elif not getattr(linears[name], "transpose_b", True):
                problems.append(f"{name} stores its weight as (in, out)")
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise CheckpointError(f"{self._ckpt.path} does not fit the model:{lines}")


def run_sample(model: Any, sample: Any) -> None:
    """Run one calibration sample: by ``generate`` for one token, or by calling the model."""
    inputs = list(sample) if isinstance(sample, (list, tuple)) else [sample]
    if hasattr(model, "generate"):
        for ids in inputs:
            model.generate(as_ids("calib_data", ids), max_new_tokens=1)
        return
    model(
        *(item if isinstance(item, ms.Tensor) else ms.Tensor(np.asarray(item)) for item in inputs)
    )


def check_output(output_path: Any) -> Path:
    """Return the path of a ``.ckpt`` to write, checked before any work."""
    check_type("output_path", output_path, str)
    path = as_path("output_path", output_path)
    if path.suffix != ".ckpt":
        raise InvalidValueError(f"output_path must end in .ckpt, not {path.name!r}")
    if not path.parent.is_dir() and not path.absolute().parent.parent.is_dir():
        raise InvalidValueError(f"the directory of output_path does not exist: {path.parent}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileSecurityError(f"{path} is there and is not a regular file")
    return path


def _cell(network: Any, name: str) -> Any:
    cells: Mapping[str, Any] = dict(network.cells_and_names())
    return cells[name]
