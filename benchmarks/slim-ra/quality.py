"""What is remembered at equal measured bytes: RazorCache against the presses of kvpress.

Run from the root of the repository, in an environment with the dependency group ``bench``:

    python benchmarks/slim-ra/quality.py

Every method feeds the same prompts to the same model, is decoded from in the same way, and is
given at least as many bytes as RazorCache really holds at the end (its spare capacity counts).
A press compresses after the prompt and keeps what comes later; the compressed heads of RazorCache
stay constant.  Questions come after compression ("agnostic") or are part of the prompt ("aware").
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from slim_ra import RazorPolicy, RetrievalHeads, razor, search_heads
from slim_ra.commands import load_tokenizer, text_windows
from slim_ra.evaluate import (
    Passkey,
    decode_perplexity,
    feed,
    full_cache,
    full_logits,
    passkey_accuracy,
    passkeys,
    with_cache,
)
from slim_ra.plots import trade_off
from slim_ra.select import select_by_bytes, select_heads
from slim_ra.wired import wired_llama

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TEXT = ROOT.parent / "shared" / "data" / "public_domain_test.txt"
PRESSES = {
    "StreamingLLM": lambda r: kvpress.StreamingLLMPress(compression_ratio=r),
    "SnapKV": lambda r: kvpress.SnapKVPress(compression_ratio=r, window_size=16),
    "TOVA": lambda r: kvpress.TOVAPress(compression_ratio=r),
    "ExpectedAttention": lambda r: kvpress.ExpectedAttentionPress(compression_ratio=r),
    "KeyDiff": lambda r: kvpress.KeyDiffPress(compression_ratio=r),
    "Knorm": lambda r: kvpress.KnormPress(compression_ratio=r),
    "AdaKV(SnapKV)": lambda r: kvpress.AdaKVPress(
        kvpress.SnapKVPress(compression_ratio=r, window_size=16)
    ),
}


TEXT_PRESSES = ("StreamingLLM", "SnapKV", "ExpectedAttention")


def load(name):
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples" / name, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


def pressed(press):
    """Return a prefill through a press; decoding goes on without it, as in kvpress itself.

    The head-wise presses only mark what they drop; their marks work while kvpress is imported.
    """

    def prefill(model, ids):
        cache = DynamicCache(config=model.config)
        with press(model):
            logits = feed(model, ids, cache, 0)[:, -1]
        return cache, logits

    return prefill


def ratio_for(nbytes, full_nbytes, slots, prompt):
    """Smallest compression ratio whose tokens are no fewer than ``nbytes`` in the end."""
    kept = math.ceil(nbytes * slots / full_nbytes) - (slots - prompt)
    kept = max(1, min(prompt, kept))
    return max(0.0, 1.0 - (kept + 0.5) / prompt)  # kvpress keeps int(prompt * (1 - ratio))


def measure(model, run, policy, slots, prompt, extra=(), presses=tuple(PRESSES)):
    """Figures of RazorCache and of the presses at no fewer bytes."""
    with razor(model, policy) as new_cache:
        own = run(with_cache(new_cache))
    rows = [("razor", own)]
    for name, other in extra:
        with razor(model, other) as new_cache:
            rows.append((name, run(with_cache(new_cache))))
    ratio = ratio_for(own.nbytes, own.full_nbytes, slots, prompt)
    for name in presses:
        try:
            rows.append((name, run(pressed(PRESSES[name](ratio)))))
        except ValueError as error:  # AdaKV's key search fails where a query is zero
            rows.append((name, f"{type(error).__name__}: {error}"))
    return rows


def passkey_rows(task, model, samples, policies, *, controls=None):
    """One line a method and budget, for both protocols."""
    lines = []
    prompt = samples[0].context.shape[1]
    after = samples[0].cue.shape[1] + samples[0].answer.shape[1]
    full = passkey_accuracy(model, samples, full_cache(model))
    lines.append(line(task, "agnostic", "full", full))
    for aware in (False, True):
        protocol = "aware" if aware else "agnostic"
        length = prompt + (samples[0].cue.shape[1] if aware else 0)
        for label, policy in policies.items():
            rows = measure(
                model,
                lambda prefill, aware=aware: passkey_accuracy(model, samples, prefill, aware=aware),
                policy,
                prompt + after,
                length,
                extra=(controls or {}).get(label, ()),
            )
            lines += [line(task, protocol, name, found, budget=label) for name, found in rows]
    return lines


def line(task, protocol, method, found, *, budget=""):
    out = {"task": task, "protocol": protocol, "budget": budget, "method": method}
    if isinstance(found, str):
        out["error"] = found
        print(f"{task:12} {protocol:9} {budget:22} {method:18} {found}")
        return out
    score = found.perplexity if hasattr(found, "perplexity") else found.accuracy
    out |= vars(found) | {"ratio": found.ratio}
    print(
        f"{task:12} {protocol:9} {budget:22} {method:18} {score:8.3f} {found.nbytes:>10,} B "
        f"{100 * found.ratio:5.1f} %"
    )
    return out


def copy_task():
    """Recall any part of 512 random tokens, with a model trained to have induction heads."""
    model = load("copy-llama")
    scores = search_heads(model, unit_length=128)
    best = select_heads(scores, induction_ratio=4 / 12, echo_ratio=0.0)
    others = RetrievalHeads({0: [0, 1], 2: [0, 1]})
    samples = passkeys(model.config, length=512, samples=8, answer=16, cue=16, seed=1)
    policies, controls = {}, {}
    for window in (8, 32, 128):
        label = f"4 of 12, window {window}"
        policies[label] = RazorPolicy.from_profile(best, model.config, window=window)
        wrong = RazorPolicy.from_profile(others, model.config, window=window)
        bare = RazorPolicy.from_profile(best, model.config, window=window, compensation="none")
        controls[label] = (("razor, wrong heads", wrong), ("razor, no compensation", bare))
    for heads in (1, 2, 3):
        chosen = select_by_bytes(scores, 0.1 + 0.9 * (heads + 0.01) / 12, kept=0.1)
        label = f"{heads} of 12, window 64"
        policies[label] = RazorPolicy.from_profile(chosen, model.config, window=64)
    return passkey_rows("copy-llama", model, samples, policies, controls=controls)


def wired_task():
    """Ask the hand-wired fixture, in which one head knows everything: no claim of quality.

    Asked before compression every method answers the first token from the exact prompt pass, and
    SnapKV the next two because it keeps the two neighbours of the token it was asked about.
    """
    model = wired_llama()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(511, generator=generator) + 1
    passkey, others = order[:41], order[41:]
    hay = others[torch.randint(len(others), (1499,), generator=generator)]
    context = torch.cat([torch.tensor([0]), hay[:299], passkey, hay[299:]])
    samples = [Passkey(context[None], passkey[None, :1], passkey[None, 1:])]
    config = model.config
    policy = RazorPolicy.from_profile(RetrievalHeads({1: [1]}), config, window=64)
    wrong = RazorPolicy.from_profile(RetrievalHeads({1: [0]}), config, window=64)
    label = "1 of 8, window 64"
    lines = passkey_rows(
        "wired", model, samples, {label: policy}, controls={label: (("razor, wrong heads", wrong),)}
    )
    said = {row["method"]: row for row in lines if row["protocol"] == "agnostic"}
    lost = ("razor, wrong heads", "StreamingLLM", "SnapKV")
    if said["razor"]["accuracy"] < 1.0 or any(said[name]["accuracy"] > 0.05 for name in lost):
        raise SystemExit("the hand-wired head does not decide who knows the passkey")
    return lines


def text_task():
    """Perplexity of plain text on a model without induction heads worth the name."""
    model = load("tiny-llama")
    tokenizer = load_tokenizer(ROOT / "examples" / "tiny-llama", False)
    texts = text_windows(TEXT, tokenizer, 512, 8)
    reference = full_logits(model, texts, prompt=384)
    scores = search_heads(model, tokenizer)
    heads = select_heads(scores, induction_ratio=0.14, echo_ratio=0.01, min_heads=1)
    lines = [line("tiny-llama", "text", "full", decode_perplexity(
        model, texts, full_cache(model), prompt=384, reference=reference))]  # fmt: skip
    for window in (32, 96):
        policy = RazorPolicy.from_profile(heads, model.config, window=window)
        bare = RazorPolicy.from_profile(heads, model.config, window=window, compensation="none")
        rows = measure(
            model,
            lambda prefill: decode_perplexity(
                model, texts, prefill, prompt=384, reference=reference
            ),
            policy,
            512,
            384,
            extra=(("razor, no compensation", bare),),
        )
        label = f"{heads.count()} of 16, window {window}"
        lines += [line("tiny-llama", "text", name, found, budget=label) for name, found in rows]
    return lines


def curves(lines, task, protocol, figure):
    found = {}
    for row in lines:
        if row["task"] == task and row["protocol"] == protocol and figure in row:
            found.setdefault(row["method"], []).append((row["ratio"], row[figure]))
    return found


def main():
    torch.manual_seed(0)
    lines = wired_task() + copy_task()
    if TEXT.is_file():
        lines += text_task()
    else:
        print(f"skipped: text, because {TEXT.relative_to(ROOT.parent)} is not there")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": "python benchmarks/slim-ra/quality.py",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvpress": version("kvpress"),
        },
        "device": "cpu, fp32",
        "rows": lines,
    }
    (RESULTS / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    for protocol in ("agnostic", "aware"):
        trade_off(
            RESULTS / f"quality-copy-{protocol}.svg",
            curves(lines, "copy-llama", protocol, "accuracy"),
            ylabel="recall accuracy",
            title=f"copy-llama, 512 tokens, question-{protocol}",
        )
    if TEXT.is_file():
        trade_off(
            RESULTS / "quality-text.svg",
            curves(lines, "tiny-llama", "text", "perplexity"),
            ylabel="decode-phase perplexity",
            title="tiny-llama, prompt 384, 128 decoded",
        )


if __name__ == "__main__":
    sys.exit(main())
