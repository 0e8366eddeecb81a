"""``slim-mindspore quantize``."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import InvalidValueError, OutputExistsError
from slim_core.files import check_output_dir
from slim_mindspore.approaches import APPROACHES, from_approach
from slim_mindspore.ascend_format import check_ascend
from slim_mindspore.datasets import DATASETS, DEFAULT_SAMPLES, read_texts, token_batches
from slim_mindspore.hub import read_config
from slim_mindspore.layer_policy import GROUP_SIZES
from slim_mindspore.layouts import COMPUTE_DTYPES, LAYOUT_OF, LAYOUTS
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.run_config import read_run_config
from slim_mindspore.tensors import WEIGHT_SUFFIXES, model_dir, model_dtype

HELP = "quantize a Llama"
DESCRIPTION = """\
Quantize a Llama, in one of two forms:

  slim-mindspore quantize -c CONFIG.yaml -s DATA.jsonl -t boolq -q rtn-a16w8
      as the conversion script of Golden Stick: writes
      <output_dir>/<approach>_ckpt/rank_0/<approach>.ckpt

  slim-mindspore quantize MODEL OUTPUT -q ptq -w int8 -a int8 -s DATA.jsonl -t calibrate
      MODEL is a Hugging Face directory or a weight file with a config.json beside it; OUTPUT a
      new directory (ascend_v1 format), or a .ckpt or .safetensors file (Golden Stick layout)
"""

_NONE = "none"
_OTHER_SUFFIXES = (".bin", ".npy", ".npz", ".pt", ".pth")  # no name for a directory


@dataclass(frozen=True)
class Job:
    """One run, whichever form it was asked for in."""

    checkpoint: Path
    llama: LlamaConfig
    config: QuantizationConfig
    output: Path
    tokenizer: Path
    seq_length: int
    compute_dtype: str = "float32"
    layout: str | None = None

    @property
    def ascend(self) -> bool:
        """Whether the output is a directory in ``ascend_v1`` format."""
        return self.output.suffix not in WEIGHT_SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("model", nargs="?", help="float model (plain form)")
    add("output", nargs="?", help="output directory or file (plain form)")
    add("-c", "--config_path", help="MindFormers YAML file")
    add("-q", "--approach", choices=APPROACHES, help="what to do; else quantization_config says")
    add("-s", "--dataset_path", help="calibration data")
    add("-t", "--dataset_type", choices=tuple(DATASETS), help="layout of the calibration data")
    add("-w", "--weight_dtype", choices=("int8", "int4", _NONE))
    add("-a", "--act_dtype", choices=("int8", _NONE))
    add("-k", "--kvcache_dtype", choices=("int8", _NONE))
    add("-o", "--outliers_suppression", choices=("smooth", "awq", _NONE))
    add("-p", "--precision_recovery", choices=("gptq", _NONE))
    add("-ag", "--act_granularity", choices=("per_tensor", "per_token"))
    add("-wg", "--weight_granularity", choices=("per_channel", "per_group"))
    add("-kvg", "--kvcache_granularity", choices=("per_channel", "per_token"))
    add("-g", "--group_size", type=int, choices=GROUP_SIZES)
    add("-b", "--opname_blacklist", nargs="*", help="parts of names to leave in floating point")
    add("-e", "--debug", action="store_true", help="show what is going on")
    add("-d", "--dump_path", metavar="DIR", help="write what calibration saw, one .npz a cell")
    add("--alpha", type=float, help="share of the activation in smoothing (default 0.5)")
    add("--weight-range", choices=("golden_stick", "symmetric"), help="convention of int8 scales")
    add("--layout", choices=LAYOUTS, help="names in a .ckpt or .safetensors file")
    add("--compute-dtype", choices=COMPUTE_DTYPES, help="of floats in such a file")
    add("--samples", type=int, default=DEFAULT_SAMPLES, help="calibration samples at most")
    add("--seq-length", type=int, help="tokens of a calibration sample at most")
    add("--eval", metavar="TEXT", help="text file: report the perplexity before and after")
    add("--overwrite", action="store_true", help="replace the output")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    job = _job(options)
    texts = _texts(options)
    _check_output(job, options.overwrite)
    from slim_mindspore.hub import load_llama
    from slim_mindspore.modes import prepare_cpu
    from slim_mindspore.quantize import quantize_network

    prepare_cpu()
    start = time.perf_counter()
    network = load_llama(job.checkpoint, job.llama)
    before = _perplexity(network, job, options.eval)
    loaded = time.perf_counter()
    batches = _batches(job, texts, options.samples)
    quantized = quantize_network(network, job.config, batches, storage=_storage(job))
    done = time.perf_counter()
    after = _perplexity(network, job, options.eval)
    seconds = {"load": loaded - start, "quantize": done - loaded}
    _write(job, quantized, options, batches, (before, after), seconds)


def _job(options: argparse.Namespace) -> Job:
    if options.config_path and (options.model or options.output):
        raise InvalidValueError("give either -c CONFIG or MODEL and OUTPUT, not both")
    return _from_config(options) if options.config_path else _from_model(options)


def _from_config(options: argparse.Namespace) -> Job:
    run_config = read_run_config(options.config_path)
    if options.approach:
        config = from_approach(options.approach, _overrides(options))
    elif run_config.quantization is None:
        raise InvalidValueError(
            f"-q is not given and {options.config_path} has no quantization_config"
        )
    elif _overrides(options):
        raise InvalidValueError(f"-q is needed with {', '.join(_overrides(options))}")
    else:
        config = run_config.quantization
    name = options.approach or config.quant_method
    suffix = run_config.file_type
    output = run_config.output_dir / f"{name}_{suffix}" / "rank_0" / f"{name}.{suffix}"
    return Job(
        checkpoint=run_config.checkpoint,
        llama=run_config.llama,
        config=config,
        output=output,
        tokenizer=run_config.tokenizer,
        seq_length=options.seq_length or run_config.seq_length,
        compute_dtype=options.compute_dtype or run_config.compute_dtype,
        layout=options.layout,
    )


def _from_model(options: argparse.Namespace) -> Job:
    if not options.model or not options.output or not options.approach:
        raise InvalidValueError("MODEL, OUTPUT and -q are needed, or -c CONFIG")
    output = Path(options.output)
    if output.suffix in _OTHER_SUFFIXES:
        raise InvalidValueError(
            f"OUTPUT must end in {' or '.join(WEIGHT_SUFFIXES)}, or be a directory, "
            f"not {options.output!r}"
        )
    overrides = _overrides(options)
    if output.suffix not in WEIGHT_SUFFIXES:
        if options.layout or options.compute_dtype:
            raise InvalidValueError(
                "--layout and --compute-dtype are for an OUTPUT that ends in .ckpt or .safetensors"
            )
        overrides.setdefault("weight_range", "symmetric")
        if options.approach == "smooth_quant" or overrides.get("outliers_suppression"):
            overrides.setdefault("smooth_into", "norm")
    llama = read_config(options.model)
    return Job(
        checkpoint=Path(options.model),
        llama=llama,
        config=from_approach(options.approach, overrides),
        output=output,
        tokenizer=model_dir(options.model),
        seq_length=options.seq_length or llama.max_positions,
        compute_dtype=options.compute_dtype or "float32",
        layout=options.layout,
    )


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the configuration that options set."""
    given = {
        "weight_dtype": options.weight_dtype,
        "activation_dtype": options.act_dtype,
        "kvcache_dtype": options.kvcache_dtype,
        "outliers_suppression": options.outliers_suppression,
        "precision_recovery": options.precision_recovery,
        "act_quant_granularity": options.act_granularity,
        "weight_quant_granularity": options.weight_granularity,
        "kvcache_quant_granularity": options.kvcache_granularity,
        "group_size": options.group_size,
        "modules_to_not_convert": options.opname_blacklist,
        "algorithm_args": None if options.alpha is None else {"alpha": options.alpha},
        "weight_range": options.weight_range,
    }
    return {
        key: None if value == _NONE else value for key, value in given.items() if value is not None
    }


def _texts(options: argparse.Namespace) -> list[str]:
    if not options.dataset_path and not options.dataset_type:
        return []
    if not options.dataset_path or not options.dataset_type:
        raise InvalidValueError("-s and -t belong together")
    return read_texts(options.dataset_path, options.dataset_type)


def _check_output(job: Job, overwrite: bool) -> None:
    if job.ascend:
        check_ascend(job.config)
        check_output_dir(job.output, overwrite=overwrite)
    elif job.output.exists() and not overwrite:
        raise OutputExistsError(f"{job.output} is there already", hint="pass --overwrite")


def _storage(job: Job) -> Any:
    """Return the dtype in which the output keeps the scales of inputs."""
    if job.ascend:
        return model_dtype(open_checkpoint(model_dir(job.checkpoint)))
    layout = job.layout or LAYOUT_OF[job.config.quant_method]
    return np.dtype("float16" if layout in ("gs-sq", "msmodelslim") else job.compute_dtype)


def _batches(job: Job, texts: list[str], samples: int) -> list[np.ndarray]:
    from slim_mindspore.text import load_tokenizer

    if not texts:
        return []
    return token_batches(load_tokenizer(job.tokenizer), texts, job.seq_length, samples)


def _perplexity(network: Any, job: Job, text: str | None) -> float | None:
    if text is None:
        return None
    from slim_mindspore.evaluate import perplexity
    from slim_mindspore.text import load_tokenizer

    ids = load_tokenizer(job.tokenizer).encode("\n".join(read_texts(text, "wikitext2"))).ids
    return perplexity(network, ids, window=min(512, job.llama.max_positions))


def _write(
    job: Job,
    quantized: Any,
    options: argparse.Namespace,
    batches: list[np.ndarray],
    perplexities: tuple[float | None, float | None],
    seconds: dict[str, float],
) -> None:
    from rich.console import Console

    from slim_core.report_console import print_report
    from slim_mindspore.dump import dump_arrays
    from slim_mindspore.run_report import make_report
    from slim_mindspore.save import save_ascend, save_quantized

    start = time.perf_counter()
    if options.dump_path:
        dump_arrays(quantized, options.dump_path)
    if job.ascend:
        target = save_ascend(quantized, model_dir(job.checkpoint), job.output, options.overwrite)
    else:
        target = save_quantized(
            quantized, job.output, layout=job.layout, compute_dtype=job.compute_dtype
        )
    report = make_report(
        quantized,
        checkpoint=job.checkpoint,
        target=target,
        batches=batches,
        dataset=options.dataset_path,
        evaluation=(options.eval, *perplexities),
        seconds=seconds | {"save": time.perf_counter() - start},
    )
    report.save(target if job.ascend else target.parent)
    print_report(report, Console())
    print(f"Written: {target}")
