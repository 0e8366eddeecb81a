"""Developer entry points: ``nox -l`` lists them, ``nox -s tests-slim-ptq`` tests one package.

``nox`` alone runs everything that a change must pass.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip, which reads the machine's configuration
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = True

ROOT = Path(__file__).parent
PACKAGES = {
    path.parent.name: path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
SOURCES = [str(path.relative_to(ROOT) / "src") for path in PACKAGES.values()]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Extras that the tests of a package need beside its hard requirements.
EXTRAS = {"slim-core": "recipes", "slim-lowrank": "torch,hf,plot", "slim-mindspore": "mindspore"}


@functools.cache
def project(name: str) -> dict[str, Any]:
    """Return the pyproject.toml of a package."""
    return nox.project.load_toml(PACKAGES[name] / "pyproject.toml")


def local_closure(*names: str) -> list[str]:
    """Return the packages after every package of this repository that they need."""
    order: dict[str, None] = {}
    for name in names:
        lines = project(name)["project"].get("dependencies", [])
        needs = [Requirement(line).name for line in lines]
        for dependency in local_closure(*(need for need in needs if need in PACKAGES)):
            order.setdefault(dependency)
        order.setdefault(name)
    return list(order)


def editable(name: str, extras: str | None) -> list[str]:
    """Return the arguments that install a package in place."""
    path = str(PACKAGES[name].relative_to(ROOT))
    return ["-e", f"./{path}[{extras}]" if extras else f"./{path}"]


def install(session: nox.Session, *names: str, group: str, pins: tuple[str, ...] = ()) -> None:
    """Install packages and what they need in one resolution, so that none comes from an index."""
    lines = [line for name in names for line in nox.project.dependency_groups(project(name), group)]
    ours = [line for line in lines if Requirement(line).name in PACKAGES]
    wanted = [line for line in lines if line not in ours]
    local = [
        argument
        for name in local_closure(*names, *ours)
        for argument in editable(name, EXTRAS.get(name) if name in names else None)
    ]
    session.install("-c", "constraints.txt", *local, *wanted, *pins)


def run_tests(session: nox.Session, package: str, pins: tuple[str, ...] = ()) -> None:
    """Run the tests of a package beside nothing that it does not declare."""
    install(session, package, group="test", pins=pins)
    session.run("pytest", f"packages/{package}", *session.posargs, env=OFFLINE)


for _package in PACKAGES:
    _run = functools.partial(run_tests, package=_package)
    _run.__doc__ = f"Test {_package} beside nothing that it does not declare."
    nox.session(name=f"tests-{_package}", tags=["tests"])(_run)


@nox.session(name="tests-slim-core-numpy1", tags=["tests"])
def tests_numpy1(session: nox.Session) -> None:
    """Test slim-core under numpy 1.26."""
    run_tests(session, "slim-core", pins=("numpy==1.26.4",))


@nox.session(name="tests-slim-ptq-transformers4", tags=["tests"])
def tests_transformers4(session: nox.Session) -> None:
    """Test slim-ptq under the oldest transformers that it supports."""
    run_tests(session, "slim-ptq", pins=("transformers==4.57.*",))


@nox.session(name="tests-slim-ra-transformers4", tags=["tests"])
def tests_ra_transformers4(session: nox.Session) -> None:
    """Test slim-ra under the oldest transformers that it supports."""
    run_tests(session, "slim-ra", pins=("transformers==4.57.*",))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def imports(session: nox.Session) -> None:
    """Hold the packages to the layers of .importlinter."""
    session.install("-c", "constraints.txt", "import-linter")
    paths = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    session.run("lint-imports", env={"PYTHONPATH": paths})


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of all sources strictly."""
    local = [a for name in local_closure(*PACKAGES) for a in editable(name, None)]
    typed = ("torch", "transformers", "accelerate", "pydantic", "scipy", "matplotlib")
    session.install("-c", "constraints.txt", *local, "mypy", *typed)
    session.run("mypy", *SOURCES)
    session.run("python", "-m", "mypy.stubtest", "slim_compress._native")


@nox.session
def build(session: nox.Session) -> None:
    """Build an sdist and a wheel of every package into dist/."""
    session.install("build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for path in PACKAGES.values():
        session.run("python", "-m", "build", "--outdir", "dist", str(path), silent=True)


@nox.session
def e2e(session: nox.Session) -> None:
    """Install the built wheels as a user would and run the commands on real files."""
    wheels = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "dist").glob("*.whl"))]
    if not wheels:
        session.error("dist/ is empty: run `nox -s build e2e`")
    chosen = [wheel for wheel in wheels if "mindspore" not in wheel]
    session.install("-c", "constraints.txt", "pytest", "transformers", *chosen)
    session.run("pytest", "tests/e2e", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Quantize the example model to W8A8, verify it, and show what it cost."""
    install(session, "slim-ptq", group="test")
    model, out = "examples/tiny-llama", "demo-output/tiny-llama-w8a8"
    session.run(
        *("slim-ptq", "quantize", model, out, "--scheme", "w8a8", "--overwrite"),
        *("--calib", "examples/calib.jsonl", "--eval", "examples/eval.txt"),
        env=OFFLINE,
    )
    session.run("slim-ptq", "verify", out, env=OFFLINE)


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Read the checkpoints of slim-ptq with the code of compressed-tensors and GPTQModel."""
    install(session, "slim-ptq", group="test")
    session.install("-c", "constraints.txt", "compressed-tensors", "gptqmodel")
    readers = "packages/slim-ptq/tests/test_foreign_readers.py"
    session.run("pytest", readers, *session.posargs, env=OFFLINE)


# Tools that slim-ptq is compared with; they exclude each other, so each has an environment.
COMPARED = ("llmcompressor", "gptqmodel", "auto-round", "hqq", "optimum-quanto")
COMPARISON = "benchmarks/slim-ptq/peers"


@nox.session(name="bench-peers", default=False)
def bench_peers(session: nox.Session) -> None:
    """Compare slim-ptq with other tools: perplexity at equal bits, and speed."""
    install(session, "slim-ptq", group="bench")
    work = str(ROOT / ".nox" / "peers-work")
    if "measure" in session.posargs:
        session.run("python", f"{COMPARISON}/speed.py", "save", work, env=OFFLINE)
        session.run("python", f"{COMPARISON}/run.py", "measure", work, env=OFFLINE)
        return
    session.run("python", f"{COMPARISON}/run.py", "cases", work, env=OFFLINE)
    session.run("python", f"{COMPARISON}/speed.py", "prepare", work, env=OFFLINE)
    for tool in COMPARED:
        session.notify(f"bench-peer-{tool}", [f"{work}/speed", work])
    session.notify("bench-peers", ["measure"])


def run_peer(session: nox.Session, tool: str) -> None:
    """Quantize with another tool what the session bench-peers has prepared."""
    session.install("-c", "constraints.txt", "torch", "transformers", tool)
    for work in session.posargs:
        session.run("python", f"{COMPARISON}/worker.py", tool, work, env=OFFLINE)


for _tool in COMPARED:
    _run = functools.partial(run_peer, tool=_tool)
    _run.__doc__ = f"Quantize with {_tool} what the session bench-peers has prepared."
    nox.session(name=f"bench-peer-{_tool}", default=False)(_run)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz the decoder of slim-compress with libFuzzer under ASan and UBSan; needs clang."""
    install(session, "slim-compress", group="test")
    session.run("python", "packages/slim-compress/fuzz/run.py", *session.posargs)


def run_benchmarks(session: nox.Session, package: str) -> None:
    """Run every benchmark of a package; peers side by side, results into JSON and plots."""
    install(session, package, group="bench")
    for script in sorted((ROOT / "benchmarks" / package).glob("*.py")):
        if not script.name.startswith("_"):
            session.run("python", str(script.relative_to(ROOT)), *session.posargs, env=OFFLINE)


_MEASURED = [name for name in PACKAGES if (ROOT / "benchmarks" / name).is_dir()]
for _package in _MEASURED:
    _run = functools.partial(run_benchmarks, package=_package)
    _run.__doc__ = f"Run the benchmarks of {_package}."
    nox.session(name=f"bench-{_package}", default=False)(_run)


@nox.session(default=False, venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run all benchmarks."""
    for name in _MEASURED:
        session.notify(f"bench-{name}")
