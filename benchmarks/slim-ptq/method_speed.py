"""Speed of the weight methods, and how far GPTQ is from the products that it cannot avoid."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from _common import REPEATS, best_of, save
from methods import METHODS, scheme_of

from slim_core.method import MethodSpec
from slim_core.scheme import TensorScheme
from slim_ptq.methods import LayerInputs, make_method

COMMAND = "nox -s bench-slim-ptq"
WIDTH = 1024  # inputs and outputs of the weight


def main() -> None:
    """Measure and save."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(2 * WIDTH, WIDTH, generator=generator)
    hessian = x.T @ x / len(x)
    scheme = scheme_of(4, 128, True)
    seconds = {}
    for label, spec in METHODS.items():
        once = functools.partial(quantize, spec, weight, hessian, scheme)
        taken = best_of(once, 1 if label == "signround" else REPEATS)
        seconds[label] = round(taken * 1e6 / weight.numel(), 4)
    save(
        "method_speed",
        COMMAND,
        {
            "question": "seconds to quantize a million weights, moments of the inputs given",
            "weight": [WIDTH, WIDTH],
            "scheme": "w4_g128",
            "threads": torch.get_num_threads(),
            "seconds_per_million_weights": seconds,
            "gptq_bound": bound(weight, hessian),
        },
    )


def quantize(spec: Any, weight: torch.Tensor, hessian: torch.Tensor, scheme: TensorScheme) -> None:
    """Quantize with moments that no other layer shares."""
    inputs = LayerInputs(1, hessian, hessian.diagonal())
    make_method(MethodSpec.parse(spec)).quantize("", weight, scheme, inputs)


def bound(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return the seconds, for a million weights, of one factorization and one half product.

    Every GPTQ needs ``n**3 / 3`` multiplications for a Cholesky factor, and half a product of the
    weight with an (in, in) matrix for the feedback of errors.
    """
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.linalg.cholesky(hessian)
        middle = time.perf_counter()
        weight @ hessian
        times.append(middle - started + (time.perf_counter() - middle) / 2)
    return round(min(times) * 1e6 / weight.numel(), 4)


if __name__ == "__main__":
    main()
