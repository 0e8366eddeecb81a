"""Builds the fuzzers with ASan and UBSan and runs them, or runs the self-check.

python packages/slim-compress/fuzz/run.py --runs 200000
python packages/slim-compress/fuzz/run.py --selfcheck
python packages/slim-compress/fuzz/run.py --selfcheck --cxx aarch64-linux-gnu-g++ \
    --emulator "qemu-aarch64 -L /usr/aarch64-linux-gnu"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FUZZERS = ("fuzz_decode", "fuzz_round_trip")
MAX_INPUT = 2048
# A round trip makes code tables, which takes far longer than refusing a stream.
RUNS_SHARE = {"fuzz_decode": 1, "fuzz_round_trip": 50}
# Newest first; clang has libFuzzer, g++ has not.
COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(22, 12, -1)))


def main() -> int:
    """Build, run, return the exit status."""
    options = parse()
    compiler = options.cxx or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        print("no clang++ found: install it, or name a compiler with --cxx", file=sys.stderr)
        return 2
    build = options.build / Path(compiler).name
    configure(build, compiler, fuzzers=not options.selfcheck, emulated=bool(options.emulator))
    status = selfcheck(build, shlex.split(options.emulator))
    if status != 0 or options.selfcheck:
        return status
    for fuzzer in options.only or FUZZERS:
        corpus = build / f"corpus_{fuzzer}"
        corpus.mkdir(exist_ok=True)
        write_seeds(corpus, fuzzer)
        runs = options.runs // RUNS_SHARE[fuzzer]
        limits = [f"-runs={runs}", f"-max_len={MAX_INPUT}", f"-seed={options.seed}"]
        status = run([str(build / fuzzer), *limits, "-print_final_stats=1", str(corpus)], build)
        if status != 0:
            return status
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs",
        type=int,
        default=200_000,
        help="inputs of fuzz_decode; a fiftieth for round trips",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=FUZZERS)
    parser.add_argument("--selfcheck", action="store_true", help="no fuzzing")
    parser.add_argument("--cxx", help="compiler (default: the newest clang++)")
    parser.add_argument("--emulator", default="", help="command before a cross-compiled self-check")
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "fuzz")
    return parser.parse_args()


def configure(build: Path, compiler: str, *, fuzzers: bool, emulated: bool) -> None:
    """Build with cmake."""
    build.mkdir(parents=True, exist_ok=True)
    cross = []
    if compiler.startswith("aarch64"):
        cross = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    switches = [
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DFUZZERS={'ON' if fuzzers else 'OFF'}",
        f"-DSANITIZE={'OFF' if emulated else 'ON'}",  # ASan and qemu-user do not go together
    ]
    for command in (
        ["cmake", "-S", str(HERE), "-B", str(build), *switches, *cross],
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(command: list[str], directory: Path) -> int:
    """Show and run a command; return its exit status."""
    print("+", shlex.join(command), flush=True)
    return subprocess.run(command, cwd=directory, check=False).returncode


def selfcheck(build: Path, emulator: list[str]) -> int:
    """Run the self-check on the golden vectors too; compare what it decodes with their digests."""
    stems = {}
    for vector in sorted((HERE.parent / "tests" / "golden").glob("*.npz")):
        stems[vector.stem] = build / vector.stem
        arrays = np.load(vector)
        for part in ("index", "weight"):
            stems[vector.stem].with_suffix(f".{part}").write_bytes(arrays[part].tobytes())
    status = run([*emulator, str(build / "selfcheck"), *map(str, stems.values())], build)
    digests = json.loads((HERE.parent / "tests" / "golden" / "sha256.json").read_text())
    for name, stem in stems.items() if status == 0 else ():
        decoded = stem.with_suffix(".matrix").read_bytes()
        if hashlib.sha256(decoded).hexdigest() != digests[name]["matrix"]:
            print(f"{name}: the golden vector is decoded to another matrix", file=sys.stderr)
            return 1
    if status == 0:
        print(f"{len(stems)} golden vectors decoded, and written again with the same bytes")
    return status


def write_seeds(corpus: Path, fuzzer: str) -> None:
    """Write small streams of all modes, or small matrices."""
    if fuzzer == "fuzz_round_trip":
        rng = np.random.default_rng(0)
        for number, width in enumerate((1, 3, 40)):
            values = np.rint(rng.normal(0, width, 3000)).clip(-128, 127).astype(np.int8)
            (corpus / f"seed{number}").write_bytes(bytes([32, 0, 0]) + values.tobytes())
        return
    from slim_compress import compress

    rng = np.random.default_rng(0)
    for number, (n, k, width) in enumerate([(16, 32, 3), (40, 70, 2), (33, 256, 5), (64, 64, 40)]):
        matrix = np.rint(rng.normal(0, width, (n, k))).clip(-128, 127).astype(np.int8)
        for fast in (False, True):
            stream = compress(matrix, fast=fast)
            put_stream(corpus / f"seed{number}{fast:d}", stream.index, stream.weight)


def put_stream(path: Path, index: np.ndarray, weight: np.ndarray) -> None:
    """Write one input of fuzz_decode, with the bit that makes its checksum right."""
    head = index.size.to_bytes(2, "little") + b"\x01"
    path.write_bytes(head + index.tobytes() + weight.tobytes())


if __name__ == "__main__":
    sys.exit(main())
