"""Networks that wait for a quantized checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.layers import QuantizedLinear
from slim_mindspore.cells import activation_of, quant_cell, weight_shape
from slim_mindspore.linears import bias_of, find_linears, replace_cell
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.quantize import plan
from slim_mindspore.quantized_layer import SmoothedLinear


def await_checkpoint(network: Any, config: QuantizationConfig, layout: str = "gs-ptq") -> None:
    """Replace the linear cells that a configuration quantizes by empty quantized ones, in place.

    Their parameters have the names, dtypes and shapes of a checkpoint of that layout (int4 codes
    unpacked in int8) and hold nothing yet.

    Raises
    ------
    PlanError, FormatError
        As :func:`slim_mindspore.quantize_network`, and if the layout cannot hold the layers.
    """
    linears = find_linears(network)
    for name, scheme in plan(config, linears).items():
        if scheme.is_float:
            continue
        cell = linears[name]
        rows, columns = weight_shape(cell)
        groups = columns // scheme.group_size if scheme.group_size else 1
        layer = QuantizedLinear(
            name=name,
            scheme=scheme,
            codes=np.zeros((rows, columns), np.int8),
            weight_scale=np.ones((rows, groups), np.float32),
            weight_offset=np.zeros((rows, groups), np.float32),
            input_scale=np.ones(1, np.float32) if scheme.is_static else None,
            input_offset=np.zeros(1, np.float32) if scheme.is_static else None,
            bias=None if bias_of(cell) is None else np.zeros(rows, np.float32),
        )
        divided = config.smooth_into == "input" and config.policy_of(name).outliers_suppression
        smooth = np.ones(columns, np.float32) if divided else None
        empty = quant_cell(SmoothedLinear(layer, smooth), activation_of(cell), layout)
        replace_cell(network, name, empty)
    network.update_parameters_name()
