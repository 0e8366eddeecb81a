"""Make the golden files of this folder.

Run by hand with torch installed; the tests that read the files need no torch::

    python packages/slim-core/tests/golden/make_golden.py

The committed files were made with torch 2.13.0 and numpy 2.4.6, except ``numpy1_dict.npy``, made
with numpy 1.26.4 (without torch, in which case only that file is written).
"""

import importlib.util
from collections import OrderedDict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def arrays() -> dict[str, np.ndarray]:
    """Return what the tests expect in the dictionaries of numpy arrays."""
    return {
        "layer.weight": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
        "layer.scale": np.array([0.5, 0.25, 2.0], np.float32),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "big_endian": np.array([1, 2, 3], ">i4"),
        "scalar": np.float32(1.5),
    }


def tensors() -> "OrderedDict[str, object]":
    """Return a state dictionary with what occurs in real ones."""
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
    state = OrderedDict(
        {
            "embed.weight": tied,
            "whole": base,
            "transposed": base.t(),
            "slice": base[1:3, ::2],
            "row": base[2],
            "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
            "long": torch.tensor([[1 << 40, -1]]),
            "codes": torch.arange(-4, 4, dtype=torch.int8),
            "bytes": torch.tensor([0, 255], dtype=torch.uint8),
            "mask": torch.tensor([True, False, True]),
            "double": torch.tensor(0.1, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "fp8": torch.tensor([1.0, -0.5, 448.0]).to(torch.float8_e4m3fn),
            "head.weight": tied,
        }
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


if __name__ == "__main__":
    if importlib.util.find_spec("torch"):
        import torch

        torch.save(tensors(), HERE / "zip.bin")
        torch.save(tensors(), HERE / "legacy.bin", _use_new_zipfile_serialization=False)
        np.save(HERE / "torch_dict.npy", dict(tensors()), allow_pickle=True)
        np.save(HERE / "numpy2_dict.npy", arrays(), allow_pickle=True)
    else:
        np.save(HERE / "numpy1_dict.npy", arrays(), allow_pickle=True)
