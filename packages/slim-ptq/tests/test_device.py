"""The code for devices gives what the CPU gives: on a stand-in for an NPU, and on a GPU if any."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from slim_core.checkpoint import open_checkpoint
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows

STAND_IN = Path(__file__).parent / "stand_in"
MODELS = ("llama", "qwen3_moe", "gpt2")
RECIPES: dict[str, dict[str, Any]] = {
    "weights": {"scheme": "w8a16"},
    "w8a8": {"scheme": "w8a8", "fallback": 2, "kv_cache": {}, "observer": "histogram"},
    "rotate": {"scheme": "w8a8", "rotate": {}, "smooth": {"method": "smoothquant"}},
    "iterative": {"scheme": "w8a8_dynamic", "smooth": {"method": "iterative"}},
    "flex": {"scheme": "w8a8", "smooth": {"method": "flex"}},
    "cbq": {"scheme": "w8a8", "smooth": {"method": "cbq"}},
    "awq": {"scheme": "w4a16_g32", "smooth": {"method": "awq"}, "method": "hqq"},
    "attention": {"scheme": "w8a8", "attention": {"fallback": 1}},
    "gptq": {"scheme": "w4a16_g32", "method": "gptq"},
    "gptq in turn": {
        "scheme": "w4a16_g32",
        "method": {"name": "gptq", "order": "group", "static_groups": False},
    },
    "ssz": {"scheme": "w4a8_dynamic", "method": "ssz"},
    "nf4": {"scheme": "nf4", "method": "clip"},
    "mxfp4": {"scheme": "w4a8_mxfp", "method": "gptq"},
    "sparse": {"scheme": "w8a8s", "method": "sparse"},
    "signround": {"scheme": "w4a16", "method": {"name": "signround", "iterations": 4}},
    "flatquant": {
        "scheme": "w4a4_flatquant_dynamic",
        "method": {"name": "flatquant", "epochs": 1},
    },
}
SOME = {
    "qwen3_moe": ("weights", "w8a8", "gptq", "signround"),
    "gpt2": ("weights", "w8a8", "iterative", "gptq"),
}
CASES = [(model, recipe) for model in MODELS for recipe in SOME.get(model, RECIPES)]
ALIKE = ("weights", "ssz", "nf4")  # on the CPU and the stand-in: no activation has a part in them

needs_stand_in = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="transformers 4 makes masks by vmap, which takes no tensors of the stand-in",
)

_QUANTIZE = """
import json, sys
from pathlib import Path

import torch
import transformers.modeling_utils  # before there is a package torch_npu, which it would use

sys.path.insert(0, sys.argv[1])
from slim_core.recipe import Recipe
from slim_ptq import quantize
from slim_ptq.calibration.text import TokenWindows

model, folder, ids, recipes = Path(sys.argv[2]), Path(sys.argv[3]), *map(json.loads, sys.argv[4:])
data = TokenWindows(tuple(torch.tensor(batch) for batch in ids), "random ids")
for name, values in recipes.items():
    calibration = None if name == "weights" else data
    recipe = Recipe.build(**values)
    quantize(model, folder / name, recipe=recipe, calibration=calibration, device="npu")
"""
_CLASSIC = """
import json, sys
from pathlib import Path

import torch
import transformers.modeling_utils

sys.path.insert(0, sys.argv[1])
import torch_npu
from slim_ptq import AntiOutlier, AntiOutlierConfig, Calibrator, QuantConfig, analyze, load_model
from slim_ptq.calibration.text import TokenWindows

source, folder, ids = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
batches = [torch.tensor(batch) for batch in ids]
there = [[batch.to("npu:0")] for batch in batches]
model = transformers.AutoModelForCausalLM.from_pretrained(source).to("npu:0")
AntiOutlier(
    model, calib_data=there, cfg=AntiOutlierConfig(anti_method="m4", dev_type="npu", dev_id=0)
).process()
config = QuantConfig(mm_tensor=False, act_method=3, dev_type="npu", dev_id=0)
calibrator = Calibrator(model, config, calib_data=there)
calibrator.run()
assert model(there[0][0]).logits.device == torch.device("npu:0")
calibrator.save(str(folder / "classic"), save_type=["safe_tensor"])
assert list((folder / "classic").glob("*.safetensors"))
data = TokenWindows(tuple(batches), "random ids")
analyze(source, calibration=data, metric="layer_error", device="npu")
loaded = load_model(Path(sys.argv[5]), device="npu")
assert isinstance(loaded(there[0][0]).logits, torch_npu.DeviceTensor)
torch.save(loaded(there[0][0]).logits.cpu(), folder / "logits.pt")
"""


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., torch.Tensor]) -> TokenWindows:
    return TokenWindows(tuple(tiny_ids(16, seed=seed, batch=2) for seed in range(4)), "random ids")


def ids_of(data: TokenWindows) -> str:
    return json.dumps([batch.tolist() for batch in data.batches])


def run_script(script: str, *arguments: str, processes: int = 1) -> None:
    """Run a script with the stand-in, in one process or in several that share the work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"WORLD_SIZE": str(processes)}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(STAND_IN), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    errors = [process.communicate()[1] for process in begun]
    assert not any(process.returncode for process in begun), "\n".join(e[-4000:] for e in errors)


@pytest.fixture(scope="module")
def on_stand_in(
    tmp_path_factory: pytest.TempPathFactory, saved_model: Callable[..., Path], data: TokenWindows
) -> Callable[[str], Path]:
    """Return a function that gives the folder of what was quantized on the stand-in, once a model.

    In a process of its own, as a device cannot be taken back.
    """
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"npu-{name}")
            recipes = {recipe: RECIPES[recipe] for model, recipe in CASES if model == name}
            values = str(saved_model(name)), str(made[name]), ids_of(data), json.dumps(recipes)
            run_script(_QUANTIZE, *values)
        return made[name]

    return folder


def run(source: Path, out: Path, recipe: str, data: TokenWindows, **options: Any) -> Path:
    quantize(
        source,
        out,
        recipe=Recipe.build(**RECIPES[recipe]),
        calibration=None if recipe == "weights" else data,
        **options,
    )
    return out


def check_alike(recipe: str, found: Path, expected: Path) -> None:
    """Compare what is the same but for the last bits of sums.

    GPTQ carries a code at a tie on to later columns, learning from step to step.
    """
    assert verify_checkpoint(found).sound
    new, old = open_checkpoint(found), open_checkpoint(expected)
    assert {n: (i.dtype, i.shape) for n, i in new.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in old.tensors.items()
    }
    if recipe in ("flatquant", "signround"):
        return
    codes = [name for name, info in old.tensors.items() if info.dtype in (np.int8, np.uint8)]
    moved = sum(int((new.load(name) != old.load(name)).sum()) for name in codes)
    by_gptq = "gptq" in str(RECIPES[recipe])
    assert moved <= (1e-2 if by_gptq else 1e-3) * sum(old.load(name).size for name in codes)
    for name in old.tensors:
        if name.endswith("input_scale"):
            np.testing.assert_allclose(new.load(name), old.load(name), rtol=1e-4)


@needs_stand_in
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_a_stand_in_gives_what_the_cpu_gives(
    saved_model: Callable[..., Path],
    on_stand_in: Callable[[str], Path],
    data: TokenWindows,
    tmp_path: Path,
    model: str,
    recipe: str,
) -> None:
    expected = run(saved_model(model), tmp_path / "cpu", recipe, data)
    found = on_stand_in(model) / recipe
    check_alike(recipe, found, expected)
    for file in expected.glob("*.safetensors") if recipe in ALIKE else ():
        assert file.read_bytes() == (found / file.name).read_bytes()


@needs_stand_in
def test_the_classic_interface_ranking_and_loading_on_a_stand_in(
    saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
) -> None:
    source = saved_model("llama")
    quantized = run(source, tmp_path / "w8a8", "w8a8", data)
    run_script(_CLASSIC, str(source), str(tmp_path), ids_of(data), str(quantized))
    from slim_ptq import load_model

    expected = load_model(quantized)(data.batches[0]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-3, atol=1e-4)


@needs_stand_in
def test_two_processes_with_a_stand_in_each(
    saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path
) -> None:
    """Statistics of one process meet those of the other on its own device.

    Caches are left out: torch finds gradients on the first stand-in only.
    """
    names = ["rotate", "awq", "attention", "gptq"]
    for model, some in (("llama", names), ("qwen3_moe", ["gptq"])):
        folder = tmp_path / model
        recipes = json.dumps({name: RECIPES[name] for name in some})
        values = str(saved_model(model)), str(folder), ids_of(data), recipes
        folder.mkdir()
        run_script(_QUANTIZE, *values, processes=2)
        for name in some:
            expected = run(saved_model(model), tmp_path / "cpu" / model / name, name, data)
            check_alike(name, folder / name, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_a_gpu_gives_what_the_cpu_gives(
    saved_model: Callable[..., Path], data: TokenWindows, tmp_path: Path, model: str, recipe: str
) -> None:
    expected = run(saved_model(model), tmp_path / "cpu", recipe, data)
    found = run(saved_model(model), tmp_path / "gpu", recipe, data, device="cuda", dtype="float32")
    check_alike(recipe, found, expected)
