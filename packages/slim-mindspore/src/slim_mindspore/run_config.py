"""MindFormers YAML files, as far as quantizing a Llama needs them.

::

    load_checkpoint: ./tiny-llama            # a .ckpt, a safetensors file, or a directory
    output_dir: ./output
    load_ckpt_format: ckpt                   # or safetensors: the type of the output
    processor: {tokenizer: {tokenizer_file: ./tiny-llama/tokenizer.json}}
    model:
      arch: {type: LlamaForCausalLM}
      model_config:
        seq_length: 128
        compute_dtype: float32
        hidden_size: 128                     # and the other sizes; from config.json if left out
        quantization_config: {...}

Other keys belong to other parts of MindFormers and are passed over; within ``quantization_config``
an unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slim_core.errors import RecipeError
from slim_core.files import PathLike, as_path, check_input_file
from slim_core.validate import check_int
from slim_mindspore.hub import read_config
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.tensors import model_dir

ARCHITECTURES = ("LlamaForCausalLM", "ParallelLlamaForCausalLM")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class RunConfig:
    """What a run needs to know.

    Parameters
    ----------
    checkpoint : Path
        Float weights.
    llama : LlamaConfig
    output_dir, tokenizer : Path
        The tokenizer is needed for calibration text only.
    seq_length : int
        Longest calibration sample.
    compute_dtype, file_type : str
        Of the output.
    quantization : QuantizationConfig or None
    """

    checkpoint: Path
    llama: LlamaConfig
    output_dir: Path
    tokenizer: Path
    seq_length: int
    compute_dtype: str
    file_type: str
    quantization: QuantizationConfig | None


def read_run_config(path: PathLike) -> RunConfig:
    """Read a YAML file and check what a run needs.

    Raises
    ------
    RecipeError
        The file is no YAML mapping, or a key is missing or wrong; names it.
    FileNotFoundError, FileSecurityError
        The file, or the weights that it names, are not there or unsafe.
    StructureError
        The sizes are not those of a supported Llama.
    """
    file = check_input_file(path, max_bytes=_MAX_BYTES)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    top = _mapping(str(file), content)
    model = _mapping("model", top.get("model"))
    arch = _mapping("model.arch", model.get("arch")).get("type", ARCHITECTURES[0])
    if arch not in ARCHITECTURES:
        raise RecipeError(
            f"{file}: model.arch.type must be one of {', '.join(ARCHITECTURES)}, not {arch!r}"
        )
    sizes = _mapping("model.model_config", model.get("model_config"))
    if not isinstance(top.get("load_checkpoint"), str) or not top["load_checkpoint"]:
        raise RecipeError(f"{file}: load_checkpoint must be the path of the float weights")
    checkpoint = as_path("load_checkpoint", top["load_checkpoint"])
    if not checkpoint.exists():
        raise FileNotFoundError(f"no such file or directory: load_checkpoint {checkpoint}")
    processor = _mapping("processor", top.get("processor"))
    tokenizer = _mapping("processor.tokenizer", processor.get("tokenizer"))
    quantization = sizes.get("quantization_config")
    llama = (
        LlamaConfig.from_mindformers(sizes) if sizes.get("hidden_size") else read_config(checkpoint)
    )
    length = sizes.get("seq_length") or llama.max_positions
    return RunConfig(
        checkpoint=checkpoint,
        llama=llama,
        output_dir=as_path("output_dir", top.get("output_dir") or "./output"),
        tokenizer=Path(tokenizer.get("tokenizer_file") or model_dir(checkpoint)),
        seq_length=check_int("seq_length", length, low=1, high=llama.max_positions),
        compute_dtype=_choice("compute_dtype", sizes, ("float32", "float16")),
        file_type=_choice("load_ckpt_format", top, ("ckpt", "safetensors")),
        quantization=None if quantization is None else QuantizationConfig.from_dict(quantization),
    )


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} must be a mapping of keys, not {type(value).__name__}")
    return value


def _choice(name: str, values: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    value = values.get(name, allowed[0])
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return str(value)
