"""How far the predictions of the example model move under sign rounding, by its rate.

Defaults are chosen here, on held-out text as in ``methods.py``: calibration is on 24 windows of the
first half of the lines of examples/calib.jsonl, the measure on the second half.  It is the mean
Kullback-Leibler divergence from the float model in thousandths of a nat a token.  The weights that
the codes stand for are put into the model, so that 3 bits, which have no format, are there too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _common import save
from methods import ROOT, halves, likelihoods, scheme_of, text_of
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slim_core.method import MethodSpec

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from ours import put_codes

COMMAND = "nox -s bench-slim-ptq"
MODEL = "tiny-llama"
OPTIONS = (
    {"iterations": 0},  # GPTQ on what quantized blocks give
    {"iterations": 200, "rate": 0.00125},
    {"iterations": 200, "rate": 0.0025},
    {"iterations": 200, "rate": 0.005},
)
SCHEMES = ((3, 32, False), (4, 0, True))
WINDOWS = 24


def main() -> None:
    """Measure and save."""
    seen, held_out = halves(MODEL)
    ids = torch.cat(seen)[:WINDOWS]
    exact = likelihoods(_model(), held_out)
    rows = []
    for scheme in (scheme_of(*values) for values in SCHEMES):
        for options in OPTIONS:
            model = _model()
            put_codes(model, ids, scheme, MethodSpec.parse({"name": "signround", **options}))
            found = likelihoods(model, held_out)
            moved = float(functional.kl_div(found, exact, reduction="sum", log_target=True))
            divergence = round(1000 * moved / exact.shape[:2].numel(), 2)
            rows.append({"scheme": text_of(scheme), **options, "divergence": divergence})
            print(rows[-1], flush=True)
    save(
        "rounding",
        COMMAND,
        {
            "question": "divergence of tiny-llama by the rate of sign rounding, on held-out text",
            "calibration_tokens": ids.numel(),
            "measured_tokens": sum(batch.numel() for batch in held_out),
            "rows": rows,
        },
    )


def _model() -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples" / MODEL, dtype=torch.float32
    )
    return model.eval()


if __name__ == "__main__":
    main()
