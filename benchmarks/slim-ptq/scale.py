"""How far GPTQ is from the products that it cannot avoid.

The products are counted, those of the published algorithm and those of the sweeps beyond it, and
take as long as they would at the speed that a matrix product of the same kind reaches here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _common import best_of, save

from slim_core.method import MethodSpec
from slim_core.plan import LayerPlan
from slim_core.scheme import QuantScheme
from slim_ptq.methods import LayerInputs, WeightMethod, make_method
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.pipeline.batches import portions, quantize_batches

COMMAND = "nox -s bench-slim-ptq"
# How often a block of a model of 1 B parameters has weights of a shape.
SHAPES = {(2048, 2048): 4, (5632, 2048): 2, (2048, 5632): 1}
# A tenth of the experts of a block of a model of 30 B parameters.
EXPERT, EXPERTS = (768, 2048), 13
PUBLISHED: dict[str, Any] = {
    "name": "gptq",
    "range": "minmax",
    "order": "natural",
    "sweeps": 0,
    "static_groups": False,
    "keep_nearest": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "gptq as published": PUBLISHED,
    "the same, no row worse than rounding": PUBLISHED | {"keep_nearest": True},
    "gptq by default": {"name": "gptq"},
}


def gemm_speed() -> float:
    """Return the floating-point operations a second of a large float32 product."""
    size = 4096
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best_of(lambda: left @ right)


def gptq_rows(speed: float) -> list[dict[str, Any]]:
    """Measure GPTQ on weights with moments of their own, and how many products each is worth.

    Counted are, for a weight (out, in), the factor of the inverse, ``2/3 in**3`` (one Cholesky
    factorization and the inverse of a triangle), and the feedback of errors, ``out * in**2``; with
    sweeps also their slopes, ``2 * out * in**2`` each.  The comparison with plain rounding and the
    products inside of groups are not.
    """
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme.parse("w4a16_g128").weight
    assert scheme is not None
    rows = []
    for shape in SHAPES:
        out, width = shape
        weight = torch.randn(shape, generator=generator)
        x = torch.randn(2 * width, width, generator=generator)
        hessian = x.T @ x / len(x)

        flops = 2 * width**3 / 3 + out * width**2
        for label, spec in METHODS.items():
            method = make_method(MethodSpec.parse(spec))

            def quantize(
                weight: torch.Tensor = weight,
                hessian: torch.Tensor = hessian,
                method: WeightMethod = method,
            ) -> None:
                inputs = LayerInputs(1, hessian, hessian.diagonal())
                method.quantize("", weight, scheme, inputs)

            needed = flops + 2 * int(spec.get("sweeps", GPTQ.sweeps)) * out * width**2
            seconds = best_of(quantize, 5)
            rows.append(
                {
                    "method": label,
                    "weight": list(shape),
                    "gflop": round(flops / 1e9, 1),
                    "seconds": round(seconds, 3),
                    "times_bound": round(seconds / (flops / speed), 2),
                    "gflop_with_sweeps": round(needed / 1e9, 1),
                    "times_bound_with_sweeps": round(seconds / (needed / speed), 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def block_rows(rows: list[dict[str, Any]], speed: float) -> list[dict[str, Any]]:
    """Return the seconds of all weights of a block, and how many times its products they are."""
    found = []
    for label in METHODS:
        seconds = gflop = needed = 0.0
        for row in rows:
            if row["method"] == label:
                count = SHAPES[tuple(row["weight"])]
                seconds += count * row["seconds"]
                gflop += count * row["gflop"]
                needed += count * row["gflop_with_sweeps"]
        found.append(
            {
                "method": label,
                "seconds": round(seconds, 3),
                "times_bound": round(seconds / (gflop * 1e9 / speed), 2),
                "times_bound_with_sweeps": round(seconds / (needed * 1e9 / speed), 2),
            }
        )
    return found


class _Known:
    """Statistics of inputs that are known."""

    def __init__(self, hessian: torch.Tensor) -> None:
        self._hessian = hessian

    def inputs(self) -> LayerInputs:
        """Return them, with nothing computed of them yet."""
        return LayerInputs(1, self._hessian, self._hessian.diagonal())


def expert_rows(speed: float) -> list[dict[str, Any]]:
    """Measure GPTQ on the experts of a block, one layer after the other and as the pipeline does.

    Counted is what :func:`gptq_rows` counts, one factor for the gate and what stands beside it.
    """
    generator = torch.Generator().manual_seed(0)
    rows, width = EXPERT
    shapes = {"gate": (rows, width), "up": (rows, width), "down": (width, rows)}
    weights, statistics = {}, {}
    for index in range(EXPERTS):
        for shape in ((rows, width), (width, rows)):
            x = torch.randn(2 * shape[1], shape[1], generator=generator)
            known = _Known(x.T @ x / len(x))
            for name in (name for name in shapes if shapes[name] == shape):
                statistics[f"{index}.{name}"] = known
                weights[f"{index}.{name}"] = torch.randn(shape, generator=generator)
    products = 2 * (width**3 + rows**3) / 3 + 2 * rows * width**2 + width * rows**2
    swept = 2 * (2 * rows * width**2 + width * rows**2)
    found = []
    for label, spec in METHODS.items():
        method = MethodSpec.parse(spec)
        plans = {
            name: LayerPlan(
                name, tuple(weight.shape), QuantScheme.parse("w4a16_g128"), "", method=method
            )
            for name, weight in weights.items()
        }

        def run(portion: dict[str, LayerPlan]) -> None:
            shared: dict[int, LayerInputs] = {}
            for name, plan in portion.items():
                known = statistics[name]
                inputs = shared.setdefault(id(known), known.inputs())
                made: WeightMethod = make_method(plan.method)
                made.quantize(name, weights[name], plan.scheme.weight, inputs)

        def together(plans: dict[str, LayerPlan] = plans) -> None:
            for portion in portions(plans, statistics):
                done = quantize_batches(portion, statistics, weights.__getitem__)
                run({name: plan for name, plan in portion.items() if name not in done})

        sweeps = int(spec.get("sweeps", GPTQ.sweeps))
        needed = EXPERTS * (products + sweeps * swept) / speed
        alone, batched = best_of(partial(run, plans), 3), best_of(together, 3)
        found.append(
            {
                "method": label,
                "experts": EXPERTS,
                "weights": [list(shape) for shape in shapes.values()],
                "seconds_one_by_one": round(alone, 2),
                "seconds_together": round(batched, 2),
                "ratio": round(batched / alone, 2),
                "times_bound_with_sweeps": round(batched / needed, 2),
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and save."""
    speed = gemm_speed()
    gptq = gptq_rows(speed)
    save(
        "scale",
        COMMAND,
        {
            "question": "GPTQ against its operations",
            "threads_of_gptq": torch.get_num_threads(),
            "gemm_gflops": round(speed / 1e9, 1),
            "gptq": gptq,
            "block": block_rows(gptq, speed),
            "experts": expert_rows(speed),
        },
    )


if __name__ == "__main__":
    main()
