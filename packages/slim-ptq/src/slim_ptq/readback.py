"""Reading back what was written, before it gets its name."""

from __future__ import annotations

from pathlib import Path

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import FormatError
from slim_core.formats import FORMATS
from slim_core.plan import Plan
from slim_core.verify import verify_checkpoint

_DEFECT = "this is a defect of slim; the output directory was not made"


def read_back(directory: Path, plan: Plan) -> None:
    """Read back what was written.

    Raises
    ------
    FormatError
        It is not what readers of the format expect.
    """
    form = FORMATS[plan.format]
    if plan.format == "float":
        return
    if form.description_file(plan.model_type) is None:
        _verify_layers(directory, plan)
        return
    found = verify_checkpoint(directory)
    if not found.sound:
        listed = "".join(f"\n  - {problem}" for problem in found.problems)
        raise FormatError(f"what was written does not pass verification:{listed}", hint=_DEFECT)


def _verify_layers(directory: Path, plan: Plan) -> None:
    """Decode every layer of a checkpoint that no description file lists."""
    checkpoint = open_checkpoint(directory)
    for layer in plan.layers:
        if layer.scheme.is_float:
            continue
        inside = f"{layer.name}."
        tensors = {
            name.removeprefix(inside): checkpoint.load(name)
            for name in checkpoint.tensors
            if name.startswith(inside)
        }
        found = FORMATS[plan.format].decode(layer.name, layer.scheme, tensors, plan.model_dtype)
        if tuple(found.codes.shape) != layer.shape:
            raise FormatError(
                f"{layer.name} was written with shape {tuple(found.codes.shape)}, "
                f"not {layer.shape}",
                hint=_DEFECT,
            )
