"""Finding and replacing the linear cells of a network.

A linear cell is an ``nn.Dense``, or any cell with a 2-D parameter ``weight`` that says how it lies:
by ``in_channels`` and ``out_channels``, or by ``transpose_b`` as the ``Linear`` of MindFormers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.errors import PatternError, StructureError
from slim_core.validate import did_you_mean
from slim_mindspore.framework import Parameter, Tensor, ms, nn


def find_linears(network: Any) -> dict[str, Any]:
    """Return the linear cells by their full names, in the order of the network."""
    return {name: cell for name, cell in network.cells_and_names() if is_linear(cell)}


def is_linear(cell: Any) -> bool:
    """Whether the cell is a float linear layer."""
    if isinstance(cell, nn.Dense):
        return True
    weight = getattr(cell, "weight", None)
    if not isinstance(weight, Parameter) or weight.ndim != 2:
        return False
    described = hasattr(cell, "in_channels") and hasattr(cell, "out_channels")
    return (described or hasattr(cell, "transpose_b")) and weight.dtype in FLOATS


def weight_of(cell: Any) -> np.ndarray:
    """Return the weight of a linear cell as float32, shape (out, in)."""
    weight = cell.weight.astype(ms.float32).asnumpy()
    return weight if stores_rows(cell) else np.ascontiguousarray(weight.T)


def set_weight(cell: Any, weight: np.ndarray) -> None:
    """Put a weight, shape (out, in), into a linear cell, in the dtype that it has."""
    rows = weight if stores_rows(cell) else np.ascontiguousarray(weight.T)
    cell.weight.set_data(Tensor(rows.astype(np.float32)).astype(cell.weight.dtype))


def bias_of(cell: Any) -> np.ndarray | None:
    """Return the bias of a linear cell as float32, None if it has none."""
    bias = getattr(cell, "bias", None)
    if not isinstance(bias, Parameter):
        return None
    return np.asarray(bias.astype(ms.float32).asnumpy())


def stores_rows(cell: Any) -> bool:
    """Whether the weight is stored as (out, in) rather than (in, out)."""
    return bool(getattr(cell, "transpose_b", True))


def replace_cell(network: Any, name: str, new: Any) -> None:
    """Put a cell in the place of another and give its parameters the full name.

    Raises
    ------
    StructureError
        There is no cell of that name.
    """
    parent_name, _, attribute = name.rpartition(".")
    parent = cell_at(network, parent_name)
    if attribute not in getattr(parent, "_cells", {}):
        raise StructureError(f"the network has no cell {name!r}")
    # SequentialCell and CellList are containers by number, and the former keeps a second list.
    if isinstance(parent, (nn.SequentialCell, nn.CellList)):
        parent[list(parent._cells).index(attribute)] = new
        if isinstance(parent, nn.SequentialCell):
            parent.cell_list = list(parent._cells.values())
    else:
        setattr(parent, attribute, new)
    for local, parameter in new.parameters_and_names():
        parameter.name = f"{name}.{local}"


def cell_at(network: Any, name: str) -> Any:
    """Return the cell of a dotted name; the network itself for an empty one."""
    if not name:
        return network
    for found, cell in network.cells_and_names():
        if found == name:
            return cell
    raise StructureError(f"the network has no cell {name!r}")


def check_known(what: str, names: list[str], known: list[str]) -> None:
    """Require that every name is one of the known cells.

    Raises
    ------
    PatternError
        Lists the names that are not, with the nearest known one.
    """
    lost = [name for name in names if name not in known]
    if lost:
        raise PatternError(
            f"{what}: the network has no linear cell {', '.join(repr(name) for name in lost)}",
            hint=did_you_mean(lost[0], known),
        )


FLOATS = (ms.float16, ms.float32, ms.float64, ms.bfloat16)
