import re
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import FormatError, InvalidValueError, PatternError
from slim_core.layouts import nd_to_nz, nz_to_nd
from slim_core.pickles import load_npy_dict
from slim_mindspore import Calibrator, QuantConfig
from slim_mindspore.ckpt import read_ckpt, write_ckpt
from slim_mindspore.compression import (
    NAME_PATTERN,
    merge_compressed,
    prepare_for_compressor,
    quantized_weights,
)
from slim_mindspore.security import SafeWriteUmask

DISABLED = "model.layers.0.attention.wo"


@pytest.fixture(scope="module")
def sparse(shared_model, float_ckpt, calib_ids, tmp_path_factory):
    calibrator = Calibrator(
        QuantConfig([DISABLED], 0.01), shared_model, float_ckpt, [[calib_ids[0]]]
    )
    calibrator.run()
    path = tmp_path_factory.mktemp("sparse") / "quant_weight.ckpt"
    calibrator.save(str(path))
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".npy"])
def test_files(sparse, tmp_path, suffix):
    target = tmp_path / f"w{suffix}"
    summary = prepare_for_compressor(sparse, target)
    assert len(summary) == 27
    if suffix == ".npz":
        with np.load(target, allow_pickle=False) as stored:
            weights = {name: stored[name] for name in stored.files}
    elif suffix == ".npy":
        weights = load_npy_dict(target)
    else:
        checkpoint = open_checkpoint(target)
        weights = {name: checkpoint.load(name) for name in checkpoint.tensors}
    saved = read_ckpt(sparse)
    assert f"{DISABLED}.weight" not in weights
    for name, weight in weights.items():
        assert weight.dtype == np.int8
        np.testing.assert_array_equal(weight, saved[name])
        assert summary[name].zeros == np.mean(saved[name] == 0)
    total = sum(s.zeros * s.size for s in summary.values()) / sum(s.size for s in summary.values())
    assert total == pytest.approx(0.15, abs=0.01)


def test_what_is_left_out(sparse, tmp_path):
    weights = quantized_weights(sparse, ["model.layers.1.attention.wq"])
    assert len(weights) == 26
    with pytest.raises(PatternError, match=r"has no cell 'model\.layers\.1\.attention\.wx'"):
        quantized_weights(sparse, ["model.layers.1.attention.wx"])
    with pytest.raises(PatternError, match="no quantized weight"):
        quantized_weights(sparse, pattern="nothing")
    with pytest.raises(InvalidValueError, match=r"must end in \.npz"):
        prepare_for_compressor(sparse, tmp_path / "w.bin")
    bad = {"p.weight": np.full((2, 2), 0.5, np.float32), "p.deq_scale": np.ones(2, np.int64)}
    write_ckpt(tmp_path / "bad.ckpt", bad)
    with pytest.raises(FormatError, match=r"p\.weight is no matrix of int8 codes"):
        quantized_weights(tmp_path / "bad.ckpt", pattern="p")


def test_blocks_of_odd_shapes_invert():
    weight = np.random.default_rng(0).integers(-127, 128, (33, 70)).astype(np.int8)
    blocks = nd_to_nz(weight)
    assert blocks.shape == (3, 3, 16, 32)
    np.testing.assert_array_equal(nz_to_nd(blocks, (33, 70)), weight)


def test_merging(sparse, tmp_path):
    name = "model.layers.1.attention.wq.weight"
    parts = [{name: np.arange(n, dtype=t)} for n, t in ((9, np.int8), (3, np.int8), (5, np.int64))]
    merge_compressed(sparse, tmp_path / "m.ckpt", *parts)
    merged = ms.load_checkpoint(str(tmp_path / "m.ckpt"))
    cell = name.removesuffix(".weight")
    for local, part in zip(("weight", "index", "info"), parts, strict=True):
        np.testing.assert_array_equal(merged[f"{cell}.{local}"].asnumpy(), part[name])
    assert len(merged) == len(read_ckpt(sparse)) + 2
    with pytest.raises(FormatError, match="must have the same names"):
        merge_compressed(sparse, tmp_path / "n.ckpt", parts[0], {}, {})
    with pytest.raises(FormatError, match=r"has no weight 'x\.weight'"):
        merge_compressed(sparse, tmp_path / "n.ckpt", *[{"x.weight": np.ones(1)}] * 3)


def test_the_chain_to_the_compressor(sparse, tmp_path):
    """The steps of the compatible flow, each as its script does it."""
    slim_compress = pytest.importorskip("slim_compress", reason="slim-compress is not installed")
    search = re.compile(NAME_PATTERN).search
    loaded = ms.load_checkpoint(str(sparse))
    chosen = {
        name: value.numpy()
        for name, value in loaded.items()
        if search(name) and name.removesuffix(".weight") != DISABLED
    }
    with SafeWriteUmask():
        np.save(tmp_path / "quant_weight.npy", chosen)
    script = f"""
import builtins, numpy as np
builtins.input = lambda prompt: "yes"
from slim_compress import CompressConfig, Compressor
config = CompressConfig(do_pseudo_sparse=False, sparse_ratio=1, is_debug=True,
                        record_detail_root={str(tmp_path)!r}, multiprocess_num=1)
compressor = Compressor(config, {str(tmp_path / "quant_weight.npy")!r})
weight, index, info = compressor.run()
for name, part in (("weight", weight), ("index", index)):
    compressor.export(part, {str(tmp_path)!r} + "/" + name)
compressor.export(info, {str(tmp_path)!r} + "/info", dtype=np.int64)
"""
    assert slim_compress.__version__
    for part in ("weight", "index", "info"):
        (tmp_path / part).mkdir(mode=0o750)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = {part: sorted((tmp_path / part).iterdir()) for part in ("weight", "index", "info")}
    assert [len(files) for files in written.values()] == [27, 27, 27]
    compressed = sum(file.stat().st_size for file in written["weight"])
    assert compressed < sum(weight.nbytes for weight in chosen.values())


def test_umask_is_restored(tmp_path):
    def interrupted():
        with SafeWriteUmask():
            (tmp_path / "f").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    (tmp_path / "g").write_text("")
    assert (tmp_path / "g").stat().st_mode & 0o777 != 0o640
