"""What the commands do; imports torch and transformers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from slim_core.checkpoint import open_checkpoint
from slim_core.devices import Device
from slim_core.errors import CheckpointError, DeviceError, InvalidValueError
from slim_core.files import check_output_dir, write_json
from slim_lowrank.budget import Budget
from slim_lowrank.calibrate import output_loss
from slim_lowrank.decomposer import Decomposer
from slim_lowrank.helpers import count_parameters
from slim_lowrank.measure import perplexity as measure_perplexity
from slim_lowrank.merging import merge as merge_model
from slim_lowrank.plan import Plan
from slim_lowrank.pretrained import load_pretrained, read_table, save_pretrained
from slim_lowrank.ranks import check_ratio
from slim_lowrank.text import token_windows

MEASURED_BATCHES = 4
"""Batches of the evaluation text on which the error of every layer is measured."""


def decompose(arguments: Namespace) -> None:
    """Decompose a model and save it."""
    check_ratio("--budget", arguments.budget)
    if not arguments.dry_run:
        check_output_dir(arguments.out, overwrite=arguments.overwrite)
    job = _Job(arguments)
    if arguments.uniform:
        plan = job.decomposer.ratio(arguments.budget)
    else:
        plan = job.decomposer.budget(Budget(**{arguments.unit: arguments.budget}))
    held_out = job.evaluation[:MEASURED_BATCHES] if job.evaluation else None
    small, report = plan.apply(sequential=arguments.sequential, measure_on=held_out)
    print(report)
    if job.evaluation:
        before, after = (measure_perplexity(model, job.evaluation) for model in (job.model, small))
        print(f"perplexity: {before:.3f} -> {after:.3f}")
    if not arguments.dry_run:
        save_pretrained(
            small,
            plan.table,
            arguments.model,
            arguments.out,
            report=report,
            overwrite=arguments.overwrite,
        )
        print(f"saved to {arguments.out}")


def sweep(arguments: Namespace) -> None:
    """Measure perplexity over kept parameters, uniform ranks against the budget."""
    from slim_lowrank.plot import plot_curves

    out = Path(arguments.out)
    if out.suffix not in (".svg", ".png"):
        raise InvalidValueError(f"out must end in .svg or .png, not {out.suffix!r}")
    for share in arguments.kept:
        check_ratio("--kept", share)
    job = _Job(arguments)
    plain = Decomposer(job.model, **job.choices)
    curves: dict[str, list[dict[str, float]]] = {"plain SVD, uniform": [], job.title: []}
    for share in sorted(arguments.kept, reverse=True):
        for title, plan, sequential in (
            ("plain SVD, uniform", plain.ratio(share), False),
            (job.title, job.decomposer.budget(share), arguments.sequential),
        ):
            point = job.point(plan, share, sequential)
            curves[title].append(point)
            print(f"{title}: {share:.0%} kept, perplexity {point['perplexity']:.3f}", flush=True)
    result = {
        "model": Path(arguments.model).name,
        "dense_perplexity": measure_perplexity(job.model, job.evaluation),
        "curves": curves,
    }
    write_json(out.with_suffix(".json"), result)
    plot_curves(result, out)
    print(f"saved {out} and {out.with_suffix('.json')}")


def perplexity(arguments: Namespace) -> None:
    """Print the perplexity of a model on a text."""
    model = load_pretrained(arguments.model, device=_device(arguments.device))
    batches = _windows(arguments, arguments.eval, arguments.eval_samples)
    print(f"{measure_perplexity(model, batches):.4f}")


def merge(arguments: Namespace) -> None:
    """Write the dense model that a decomposed one stands for."""
    check_output_dir(arguments.out, overwrite=arguments.overwrite)
    _require_table(arguments.model)
    dense = merge_model(load_pretrained(arguments.model), inplace=True)
    save_pretrained(dense, {}, arguments.model, arguments.out, overwrite=arguments.overwrite)
    print(f"{count_parameters(dense):,} parameters saved to {arguments.out}")


def show(arguments: Namespace) -> None:
    """Print the ranks of a decomposed model."""
    for name, entry in _require_table(arguments.model).items():
        shape, ranks = "x".join(map(str, entry.shape)), ",".join(map(str, entry.ranks))
        share = entry.params / entry.dense_params
        print(f"{name}  {shape}  {entry.form}  rank {ranks}  {share:.1%}")


class _Job:
    """A loaded model with its data, and a decomposer that is calibrated as asked."""

    def __init__(self, arguments: Namespace) -> None:
        method = arguments.method or ("loss" if arguments.calib else "plain")
        if (method != "plain" or arguments.sequential) and arguments.calib is None:
            raise InvalidValueError(
                "--calib is needed for --sequential and for every --method but plain"
            )
        shrinkage = _shrinkage(arguments.shrinkage)
        self.arguments = arguments
        device = _device(arguments.device)
        self.evaluation = (
            _windows(arguments, arguments.eval, arguments.eval_samples) if arguments.eval else []
        )
        calibration = (
            _windows(arguments, arguments.calib, arguments.samples) if arguments.calib else []
        )
        self.model = load_pretrained(arguments.model, device=device)
        self.choices: dict[str, Any] = {
            "include": arguments.include,
            "exclude": [*arguments.exclude, *_ends(self.model, arguments)],
            "divisor": arguments.divisor,
            "storage": arguments.storage,
        }
        self.decomposer = Decomposer(self.model, **self.choices)
        if method != "plain" or arguments.sequential:
            loss = output_loss if method == "loss" else None
            self.decomposer.calibrate(calibration, loss=loss, shrinkage=shrinkage)
        self.title = f"{method}, budget" + (", sequential" if arguments.sequential else "")

    def point(self, plan: Plan, share: float, sequential: bool) -> dict[str, float]:
        """Apply a plan and measure it."""
        small, report = plan.apply(sequential=sequential)
        return {
            "kept_of_layers": share,
            "parameters": report.params_after,
            "perplexity": measure_perplexity(small, self.evaluation),
        }


def _ends(model: Any, arguments: Namespace) -> list[str]:
    """Names of the embedding and the head, which stay dense unless asked for."""
    if arguments.include is not None:
        return []
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _windows(arguments: Namespace, path: str, samples: int | None) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    batches = token_windows(tokenizer, path, length=arguments.length, samples=samples)
    device = _device(arguments.device)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _shrinkage(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidValueError(f"--shrinkage must be a number or auto, not {text!r}") from None


def _device(name: str) -> torch.device:
    device = Device.parse(name)
    if device.kind == "npu":
        try:
            import torch_npu  # noqa: F401 - makes the device known to torch
        except ModuleNotFoundError as error:
            raise DeviceError(f"device {name!r} needs torch_npu") from error
    backend = getattr(torch, device.kind)
    if device.kind != "cpu" and not backend.is_available():
        raise DeviceError(f"there is no device {name!r}")
    return torch.device(str(device))


def _require_table(model: str) -> Any:
    table = read_table(open_checkpoint(model))
    if table is None:
        raise CheckpointError(f"{model} is not a decomposed model")
    return table
