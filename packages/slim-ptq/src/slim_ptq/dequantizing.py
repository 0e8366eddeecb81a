"""From a quantized checkpoint back to an ordinary one."""

from __future__ import annotations

from slim_core.checkpoint import copy_side_files
from slim_core.errors import FormatError
from slim_core.export import CheckpointExport
from slim_core.files import PathLike, as_path, check_apart, check_output_dir, staged_dir
from slim_core.formats import FORMATS
from slim_core.progress import track
from slim_core.quantized import QuantizedCheckpoint
from slim_core.tensor_parallel import layer_of
from slim_ptq.inventory import transposed_names


def dequantize(path: PathLike, output: PathLike, *, overwrite: bool = False) -> None:
    """Write the float weights that a quantized checkpoint stands for, in the dtype of its model.

    Parameters
    ----------
    path : path
        Directory in the ``ascend_v1`` or ``safe_tensor`` format.
    output : path
        Directory to make, in the layout of Hugging Face.

    Raises
    ------
    CheckpointError, FormatError
        The checkpoint is damaged, or shifts a norm; names the tensor.
    OutputExistsError
        The output is there and ``overwrite`` is False.
    """
    target = check_output_dir(as_path("output", output), overwrite=overwrite)
    check_apart("path", path, target)
    stored = QuantizedCheckpoint(path)
    extras = stored.norm_extras
    for name in extras:
        copied = name.endswith(".module.bias")
        if name.endswith(".bias") and not copied and stored.checkpoint.load(name).any():
            raise FormatError(f"{name} shifts a norm, which the float model has no place for")
    layers = [*stored.layers, *stored.slices]
    done = {name for layer in layers for name in stored.tensor_names(layer)}
    done |= extras | stored.attention_tensors
    transposed = transposed_names(stored.checkpoint)
    with staged_dir(target, overwrite=overwrite) as staging:
        with CheckpointExport(staging, FORMATS["float"], model_type="FLOAT") as export:
            for name in track(layers, "Dequantizing"):
                if layer_of(name) in stored.slices and name not in stored.slices:
                    continue  # written as a part of its layer
                sliced = name in stored.slices
                layer = stored.sliced(name).joined() if sliced else stored.layer(name)
                export.add_layer(layer, transposed=name in transposed)
            for name in stored.checkpoint.tensors:
                if name not in done:
                    export.add_float(name, stored.checkpoint.load(name))
        copy_side_files(stored.checkpoint, staging)
