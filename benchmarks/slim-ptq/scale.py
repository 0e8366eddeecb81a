"""How far GPTQ is from the products that it cannot avoid, and what more processes bring.

The products are counted, and take as long as they would at the speed that a matrix product of the
same kind reaches here.  Processes are started by torchrun with one thread each; their time is that
of the quantization in the report, without the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import best_of, save, write_llama

from slim_core.method import MethodSpec
from slim_core.scheme import QuantScheme
from slim_ptq.methods import LayerInputs, WeightMethod, make_method

COMMAND = "nox -s bench-slim-ptq"
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # of a block of a model of 1 B parameters
METHODS = {
    "gptq as published": {"name": "gptq", "range": "minmax", "order": "natural", "sweeps": 0},
    "gptq by default": {"name": "gptq"},
}
PROCESSES = (1, 2, 4)
SAMPLES, LENGTH = 16, 512


def gemm_speed() -> float:
    """Return the floating-point operations a second of a large float32 product."""
    size = 4096
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best_of(lambda: left @ right)


def gptq_rows(speed: float) -> list[dict[str, object]]:
    """Measure GPTQ on weights with moments of their own, and how many products each is worth.

    Counted are, for a weight (out, in), the factor of the inverse, ``2/3 in**3`` (one Cholesky
    factorization and the inverse of a triangle), and the feedback of errors, ``out * in**2``.
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

            seconds = best_of(quantize, 2)
            rows.append(
                {
                    "method": label,
                    "weight": list(shape),
                    "gflop": round(flops / 1e9, 1),
                    "seconds": round(seconds, 3),
                    "times_bound": round(seconds / (flops / speed), 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def seconds_of(model: Path, output: Path, scheme: str, processes: int, data: Path) -> float:
    """Return the seconds that some processes quantize, imports left out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "29517", "-m", "slim_ptq", "quantize", str(model), str(output)]
    command += ["--scheme", scheme, "--samples", str(SAMPLES), "--length", str(LENGTH)]
    command += ["--overwrite"] + (["--calib", str(data)] if scheme == "w8a8" else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    report = json.loads((output / "slim_report.json").read_text())
    return float(report["seconds"]["quantize"])


def main() -> None:
    """Measure and save."""
    speed = gemm_speed()
    gptq = gptq_rows(speed)
    scaling: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_llama(root / "model", layers=4, hidden=2048, inter=5632)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 2000, (SAMPLES, LENGTH), generator=generator).tolist()
        data = root / "calib.jsonl"
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        for scheme in ("w8a8", "w8a16"):
            alone = 0.0
            for count in PROCESSES:
                seconds = seconds_of(root / "model", root / "out", scheme, count, data)
                alone = alone or seconds
                row = {
                    "seconds": round(seconds, 2),
                    "efficiency": round(alone / seconds / count, 3),
                }
                scaling.setdefault(scheme, {})[str(count)] = row
                print(scheme, count, row, flush=True)
    save(
        "scale",
        COMMAND,
        {
            "question": "GPTQ against its operations; processes of one thread each",
            "threads_of_gptq": torch.get_num_threads(),
            "gemm_gflops": round(speed / 1e9, 1),
            "gptq": gptq,
            "tokens": SAMPLES * LENGTH,
            "processes": scaling,
            "oversubscribed_from": (os.cpu_count() or 1) + 1,
        },
    )


if __name__ == "__main__":
    main()
