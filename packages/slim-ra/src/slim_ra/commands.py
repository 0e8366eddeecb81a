"""What the commands do once their arguments are there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slim_core.errors import CalibrationError, CheckpointError, FormatError, InvalidValueError
from slim_core.files import check_input_file, write_json
from slim_core.validate import check_choice
from slim_ra.config import RACompressConfig, check_ratio
from slim_ra.evaluate import (
    Passkey,
    Prefill,
    decode_perplexity,
    full_cache,
    full_logits,
    passkey_accuracy,
    passkeys,
    with_cache,
)
from slim_ra.geometry import head_geometry
from slim_ra.memory import predict
from slim_ra.plots import check_plot_path, head_map, trade_off, window_map
from slim_ra.policy import RazorPolicy
from slim_ra.profile import AlibiWindows, RetrievalHeads, read_profile, write_profile
from slim_ra.runtime import razor
from slim_ra.savepath import check_save_path
from slim_ra.scorefile import read_scores, scores_path, write_scores
from slim_ra.scores import search_heads
from slim_ra.select import select_by_bytes, select_heads
from slim_ra.tables import heads_table, memory_table, windows_table
from slim_ra.windows import bound_windows, legacy_windows

BUDGET_TOKENS = 32768
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODES = ("legacy", "bound", "calibrated")
Loading = tuple[str, str, bool]


def heads(
    model: str,
    output: str,
    *,
    ratios: tuple[float, float, float],
    min_heads: int,
    budget: float | None,
    protect_first_layers: int,
    search: dict[str, Any],
    loading: Loading,
    plot: Path | None,
) -> None:
    """Search heads, write ``win.pt`` and its scores, and show them."""
    path = check_save_path(output)
    for name, ratio in zip(("induction-ratio", "echo-ratio", "needle-ratio"), ratios, strict=True):
        check_ratio(name, ratio)
    if budget is not None:
        check_ratio("budget", budget)
        if protect_first_layers or min_heads:
            raise InvalidValueError("budget leaves no room for protect-first-layers or min-heads")
    if ratios[2] and not search["needles"]:
        raise InvalidValueError("needle-ratio is above 0, so needles must be, too")
    if plot is not None:
        check_plot_path(plot)
    loaded, tokenizer = load(model, loading)
    scores = search_heads(loaded, tokenizer, **search)
    if budget is None:
        found = select_heads(
            scores,
            induction_ratio=ratios[0],
            echo_ratio=ratios[1],
            needle_ratio=ratios[2],
            min_heads=min_heads,
            protect_first_layers=protect_first_layers,
        )
    else:
        nothing = RazorPolicy.from_profile(RetrievalHeads({}), loaded.config)
        kept = predict(nothing, BUDGET_TOKENS, itemsize=loaded.dtype.itemsize).ratio
        found = select_by_bytes(scores, budget, kept=kept)
    write_profile(path, found)
    write_scores(scores_path(path), scores)
    console = Console()
    console.print(heads_table(found, scores))
    policy = RazorPolicy.from_profile(found, loaded.config)
    console.print(memory_table(policy, loaded.dtype.itemsize))
    console.print(f"wrote {path} and {scores_path(path).name}")
    if plot is not None:
        head_map(plot, found, scores)
        console.print(f"wrote {plot}")


def windows(
    model: str,
    output: str,
    *,
    mode: str,
    legacy: tuple[float, int],
    epsilon: float,
    mass: bool,
    delta: float,
    calibration: tuple[Path | None, int, int],
    loading: Loading,
    plot: Path | None,
) -> None:
    """Search windows, write ``win.pt`` and those of each layer, and show them."""
    path = check_save_path(output)
    check_choice("mode", mode, MODES)
    config = RACompressConfig(*legacy)
    if plot is not None:
        check_plot_path(plot)
    text, length, samples = calibration
    if mode == "calibrated" and text is None:
        raise CalibrationError("mode calibrated needs a text", hint="add --text FILE")
    loaded, tokenizer = load(model, loading)
    if mode == "legacy":
        found = legacy_windows(loaded, config)
    elif mode == "bound":
        found = bound_windows(loaded, epsilon, mass=mass)
    else:
        from slim_ra.calibrated import calibrated_windows

        ids = text_windows(text, tokenizer, length, samples)
        found = calibrated_windows(loaded, ids, epsilon, delta=delta)
    write_profile(path, found)
    names = path.name
    if found.windows.ndim == 2:
        layers = path.with_suffix(".layers.pt")
        write_profile(layers, found)
        names += f" and {layers.name}"
    console = Console()
    console.print(windows_table(found))
    if int(found.windows.min()) >= 1:
        policy = RazorPolicy.from_profile(found, loaded.config)
        console.print(memory_table(policy, 2))
    console.print(f"wrote {names}")
    if plot is not None:
        window_map(plot, found)
        console.print(f"wrote {plot}")


def evaluate(
    model: str,
    profile: Path,
    *,
    passkey: tuple[int, int, int],
    text: tuple[Path | None, int, int, int],
    windows: list[int],
    mode: str,
    policy: dict[str, Any],
    loading: Loading,
    plot: Path | None,
    json: Path | None,
) -> None:
    """Measure a profile at one or more windows, against the full cache."""
    known = read_profile(profile)
    if plot is not None:
        check_plot_path(plot)
    loaded, tokenizer = load(model, loading)
    length, count, seed = passkey
    samples = passkeys(loaded.config, tokenizer, length=length, samples=count, seed=seed)
    file, prompt, decode, limit = text
    texts = [] if file is None else text_windows(file, tokenizer, prompt + decode, limit)
    reference = full_logits(loaded, texts, prompt=prompt)
    reading = (texts, prompt, reference)
    rows = [_measure("full", loaded, samples, reading, full_cache(loaded))]
    choices: list[int | None] = [*windows] or [None]
    for window in choices:
        options = {**policy, **({} if window is None else {"window": window})}
        fixed = RazorPolicy.from_profile(known, loaded.config, **options)
        with razor(loaded, fixed, mode=mode) as new_cache:
            name = "razor" if window is None else f"razor, window {window}"
            rows.append(_measure(name, loaded, samples, reading, with_cache(new_cache)))
    console = Console()
    console.print(_evaluation_table(rows, bool(texts)))
    if json is not None:
        settings = {"model": model, "heads": str(profile), "length": length, "mode": mode, **policy}
        write_json(json, {"settings": settings, "rows": rows}, mode=0o644)
        console.print(f"wrote {json}")
    if plot is not None:
        curve = [(row["passkey"]["ratio"], row["passkey"]["accuracy"]) for row in rows]
        trade_off(
            plot,
            {"razor": curve[1:], "full": curve[:1]},
            ylabel="passkey accuracy",
            title=f"{Path(model).name}, {length} tokens",
        )
        console.print(f"wrote {plot}")


def show(
    profile: Path, *, model: str | None, sink_size: int, window: int | None, plot: Path | None
) -> None:
    """Show a profile that was written before."""
    if plot is not None:
        check_plot_path(plot)
    known = read_profile(profile)
    console = Console()
    if isinstance(known, RetrievalHeads):
        beside = scores_path(profile)
        scores = read_scores(beside) if beside.exists() and profile.suffix == ".pt" else None
        console.print(heads_table(known, scores))
        if plot is not None:
            head_map(plot, known, scores)
    else:
        console.print(windows_table(known))
        if plot is not None:
            window_map(plot, known)
    if model is not None:
        options: dict[str, Any] = {} if isinstance(known, AlibiWindows) else {
            "sink_size": sink_size, "window": window
        }  # fmt: skip
        policy = RazorPolicy.from_profile(known, load_config(model), **options)
        console.print(memory_table(policy, 2))
    if plot is not None:
        console.print(f"wrote {plot}")


def convert(source: Path, output: str, *, model: str | None) -> None:
    """Read a profile in one dialect and write it in another."""
    suffix = Path(output).suffix
    if suffix not in (".pt", ".json", ".tsv"):
        raise FormatError(f"output must end in .pt, .json or .tsv, not {Path(output).name!r}")
    path = check_save_path(output, suffix=suffix)
    shape = None
    if model is not None:
        geometry = head_geometry(load_config(model))
        shape = (geometry.layers, geometry.kv_heads)
    write_profile(path, read_profile(source), shape=shape)
    Console().print(f"wrote {path}")


def load(model: str, loading: Loading) -> tuple[Any, Any | None]:
    """Load a model, and its tokenizer if it has one, from a directory."""
    from transformers import AutoModelForCausalLM

    dtype, device, trust = loading
    check_choice("dtype", dtype, DTYPES)
    directory = _directory(model)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=chosen, local_files_only=True, trust_remote_code=trust
    )
    loaded.to(device).eval()
    return loaded, load_tokenizer(directory, trust)


def load_tokenizer(directory: Path, trust: bool) -> Any | None:
    """Load the tokenizer of a model directory; None if there are no files of one."""
    import transformers

    if not any(directory.glob("token*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust
        )
    except ValueError:
        # A class that this transformers release does not know; its fast file is enough.
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise
        fast: Any = transformers.PreTrainedTokenizerFast
        return fast(tokenizer_file=str(file))


def load_config(model: str) -> Any:
    """Load the configuration of a model directory."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_directory(model), local_files_only=True)


def text_windows(path: Path | None, tokenizer: Any | None, length: int, limit: int) -> list[Tensor]:
    """Cut a text into windows of ``length`` tokens, int64 ``[1, length]`` each.

    Raises
    ------
    CalibrationError
        There is no tokenizer, or the text is shorter than one window.
    """
    if path is None or tokenizer is None:
        raise CalibrationError("a text needs a tokenizer, and the model directory has none")
    text = check_input_file(path).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    count = min(limit, ids.shape[1] // length)
    if not count:
        raise CalibrationError(f"{path} has {ids.shape[1]} tokens, fewer than {length}")
    return list(ids[:, : count * length].view(count, 1, length))


def _directory(model: str) -> Path:
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{model} is no model directory: it has no config.json")
    return directory


def _measure(
    name: str,
    model: Any,
    samples: list[Passkey],
    reading: tuple[list[Tensor], int, list[Tensor]],
    prefill: Prefill,
) -> dict[str, Any]:
    found = passkey_accuracy(model, samples, prefill)
    row: dict[str, Any] = {"name": name, "passkey": {**asdict(found), "ratio": found.ratio}}
    texts, prompt, reference = reading
    if texts:
        read = decode_perplexity(model, texts, prefill, prompt=prompt, reference=reference)
        row["text"] = {**asdict(read), "ratio": read.ratio}
    return row


def _evaluation_table(rows: list[dict[str, Any]], text: bool) -> Table:
    table = Table("cache", "passkey", "bytes", "of full")
    for name in ("perplexity", "KL", "top-1", "of full") if text else ():
        table.add_column(name, justify="right")
    for row in rows:
        found = row["passkey"]
        cells = [row["name"], f"{found['accuracy']:.3f}", f"{found['nbytes']:,}",
                 f"{100 * found['ratio']:.1f} %"]  # fmt: skip
        if text:
            read = row["text"]
            cells += [f"{read['perplexity']:.2f}", f"{read['divergence']:.4f}",
                      f"{read['agreement']:.3f}", f"{100 * read['ratio']:.1f} %"]  # fmt: skip
        table.add_row(*cells)
    return table
