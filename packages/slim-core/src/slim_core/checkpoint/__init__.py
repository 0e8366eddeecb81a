"""Checkpoints: headers and lazy tensors in, sharded safetensors out.

>>> checkpoint = open_checkpoint("examples/tiny-llama")  # doctest: +SKIP
>>> checkpoint.tensors["model.norm.weight"].shape  # doctest: +SKIP
(128,)
"""

from slim_core.checkpoint.edited import EditedCheckpoint
from slim_core.checkpoint.reader import Checkpoint, open_checkpoint
from slim_core.checkpoint.side_files import copy_side_files
from slim_core.checkpoint.tensor_info import TensorInfo
from slim_core.checkpoint.writer import ShardWriter

__all__ = [
    "Checkpoint",
    "EditedCheckpoint",
    "ShardWriter",
    "TensorInfo",
    "copy_side_files",
    "open_checkpoint",
]
