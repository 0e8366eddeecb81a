"""``RoundToNearest``, ``SmoothQuant`` and ``PTQ``: quantize a network in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.files import check_input_file
from slim_core.validate import check_type
from slim_mindspore.cells import find_quantized
from slim_mindspore.deployment import await_checkpoint
from slim_mindspore.framework import nn
from slim_mindspore.generation import as_ids
from slim_mindspore.layouts import LAYOUT_OF
from slim_mindspore.linears import find_linears
from slim_mindspore.load import fill_network, read_quantized
from slim_mindspore.ptq.config import BackendTarget, PTQConfig, PTQMode
from slim_mindspore.ptq.network_helper import NetworkHelper
from slim_mindspore.quantize import quantize_network
from slim_mindspore.statistics import Forward


class _Algorithm:
    """What the algorithms share; ``method`` is the ``quant_method`` of a configuration."""

    method = "ptq"

    def __init__(
        self,
        config: PTQConfig | None = None,
        layer_policies: OrderedDict[str, PTQConfig | None] | None = None,
    ) -> None:
        self._config = check_type("config", PTQConfig() if config is None else config, PTQConfig)
        policies = OrderedDict() if layer_policies is None else layer_policies
        check_type("layer_policies", policies, OrderedDict)
        for pattern, policy in policies.items():
            if not isinstance(pattern, str) or not isinstance(policy, (PTQConfig, type(None))):
                raise InvalidTypeError("layer_policies must map str to PTQConfig or None")
        self.quantization_config = self._config.whole(self.method, policies)
        self._layout = LAYOUT_OF[self.method]

    def apply(
        self, network: Any, network_helper: NetworkHelper | None = None, datasets: Any = None
    ) -> Any:
        """Replace the linear cells of a network, in place, and return it.

        In mode QUANTIZE the new cells compute from integers what the quantized network computes;
        in mode DEPLOY they are empty and :meth:`convert` or ``load_param_into_net`` fills them.

        Parameters
        ----------
        network : Cell
        network_helper : NetworkHelper, optional
            Its ``generate`` runs the network; otherwise it is called with int32 ids.
        datasets : mindspore.dataset.Dataset or iterable, optional
            Calibration samples with ``input_ids``: a data set with that column, or dicts or arrays
            of token ids.

        Raises
        ------
        InvalidTypeError
            An argument has the wrong type.
        PlanError, CalibrationError, NumericalError
            As :func:`slim_mindspore.quantize_network`.
        """
        check_type("network", network, nn.Cell)
        if network_helper is not None:
            check_type("network_helper", network_helper, NetworkHelper)
        if self._config.mode is PTQMode.DEPLOY:
            await_checkpoint(network, self.quantization_config, self._layout)
            return network
        quantize_network(
            network,
            self.quantization_config,
            token_batches(datasets),
            storage=np.float16 if self._layout == "gs-sq" else np.float32,
            layout=self._layout,
            forward=None if network_helper is None else _by_helper(network_helper),
        )
        return network

    def convert(self, net_opt: Any, ckpt_path: str = "") -> Any:
        """Return a network that :meth:`apply` was used on, ready to run and to be saved.

        ``mindspore.save_checkpoint`` saves it with the names of Golden Stick; int4 codes lie
        unpacked in it, and :func:`slim_mindspore.save_quantized` packs them.

        Parameters
        ----------
        net_opt : Cell
        ckpt_path : str
            A quantized checkpoint to load into it; none if empty.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            An argument is wrong.
        CheckpointError, FormatError
            The checkpoint is damaged or does not fit the network.
        """
        check_type("net_opt", net_opt, nn.Cell)
        if check_type("ckpt_path", ckpt_path, str):
            try:
                file = check_input_file(ckpt_path)
            except FileNotFoundError as error:
                raise InvalidValueError(f"ckpt_path is no file: {ckpt_path}") from error
            fill_network(net_opt, read_quantized(file), ckpt_path, self._layout)
        return net_opt

    def summary(self, network: Any) -> str:
        """Return a table of the linear cells and how each is quantized."""
        rows = {name: "float" for name in find_linears(network)}
        rows |= {name: cell.scheme_name for name, cell in find_quantized(network).items()}
        width = max((len(name) for name in rows), default=0)
        return "\n".join(f"{name:{width}s}  {scheme}" for name, scheme in rows.items())


class PTQ(_Algorithm):
    """Every combination of weights, activations and cache, with a policy for some layers.

    Parameters
    ----------
    config : PTQConfig, optional
    layer_policies : OrderedDict of str to PTQConfig or None, optional
        By regular expressions on names of cells; the first that is found decides, None leaves a
        cell in floating point.

    Raises
    ------
    InvalidTypeError
        An argument has the wrong type.
    RecipeError
        The combination is not supported.
    """


class RoundToNearest(_Algorithm):
    """int8 weights and int8 cache by rounding.

    Raises
    ------
    InvalidTypeError
        ``config`` is no PTQConfig.
    InvalidValueError
        ``backend`` is NONE, or activations or outliers are to be quantized or suppressed.
    """

    method = "rtn"

    def __init__(self, config: PTQConfig | None = None) -> None:
        super().__init__(config)
        _check_backend(self._config)


class SmoothQuant(_Algorithm):
    """int8 weights and activations after smoothing, and nothing else.

    Raises
    ------
    InvalidTypeError
        ``config`` is no PTQConfig.
    InvalidValueError
        ``backend`` is NONE, or the configuration is another one.
    """

    method = "smooth_quant"

    def __init__(self, config: PTQConfig | None = None) -> None:
        super().__init__(config)
        _check_backend(self._config)


def token_batches(datasets: Any) -> list[np.ndarray]:
    """Return the token ids of calibration samples, int64 of shape (batch, length) each.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A sample has no ``input_ids``, or they are not token ids.
    """
    if datasets is None:
        return []
    if hasattr(datasets, "create_dict_iterator"):
        samples: Iterable[Any] = datasets.create_dict_iterator(num_epochs=1)
    elif isinstance(datasets, Iterable):
        samples = datasets
    else:
        raise InvalidTypeError(f"datasets must be iterable, not {type(datasets).__name__}")
    batches = []
    for sample in samples:
        if isinstance(sample, dict):
            if "input_ids" not in sample:
                raise InvalidValueError(f"a sample has no input_ids, but {', '.join(sample)}")
            sample = sample["input_ids"]
        batches.append(as_ids("input_ids", sample))
    return batches


def _by_helper(helper: NetworkHelper) -> Forward:
    return lambda network, ids: helper.generate(network, ids, max_new_tokens=1)


def _check_backend(config: PTQConfig) -> None:
    if config.backend is BackendTarget.NONE:
        raise InvalidValueError("backend must be BackendTarget.ASCEND")
