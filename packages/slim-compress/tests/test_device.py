"""The hand-off to a user's executor, with a stub in its place."""

import stat
import sys
import textwrap

import numpy as np
import pytest

from slim_compress import CompressConfig, Compressor, ExecutorError, nd_to_nz
from slim_compress.checkpoint import compress_checkpoint, open_compressed
from slim_compress.device import MAX_FRACTALS, index_bytes
from slim_core.checkpoint import open_checkpoint
from slim_core.errors import FormatError

COPY = """
    log = open(here / "calls", "a")
    print(*sys.argv[1:], oct(os.stat(sys.argv[8]).st_mode & 0o777), file=log)
    k1, n1 = int(sys.argv[1]), int(sys.argv[2])
    data = open(sys.argv[8], "rb").read()
    assert len(data) == k1 * n1 * 512 and sys.argv[3:8] == ["1", "1", "1", "0", "0"]
    open(sys.argv[9], "wb").write(data)
    open(sys.argv[10], "wb").write(bytes(8 * -(-k1 // 8) * -(-n1 // 8)))
    open(sys.argv[11], "wb").write(struct.pack("<3I", 8, 8, len(data)))
"""


@pytest.fixture
def executor(tmp_path):
    def make(body=COPY):
        path = tmp_path / "compress_excutor"
        head = f"#!{sys.executable}\nimport os, pathlib, struct, sys, time\n"
        path.write_text(f"{head}here = pathlib.Path(__file__).parent\n{textwrap.dedent(body)}")
        path.chmod(0o700)
        return path

    return make


def compressor(sparse, executor, tmp_path, **settings):
    weights = {f"l{i}.weight": sparse(40 + 50 * i, 300, i) for i in range(3)}
    description = {"model_quant_type": "W8A8S", **dict.fromkeys(weights, "W8A8S")}
    root = tmp_path / "temporary"
    config = CompressConfig(
        record_detail_root=str(root), codec="device", executor=executor, **settings
    )
    return Compressor(config, weight=weights, quant_model_description=description)


def test_results_and_command_line(sparse, executor, tmp_path):
    job = compressor(sparse, executor(), tmp_path, multiprocess_num=2)
    weight, index, info = job.run()
    for key, matrix in job.weights.items():
        n, k = matrix.shape
        assert np.array_equal(weight[key], nd_to_nz(matrix).ravel())
        assert index[key].size == index_bytes(n, k) == 8 * -(-k // 256) * -(-n // 128)
        assert info[key].tolist() == [8, 8, k, n, 1]
        assert info[key].dtype == np.int64
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert [call.split()[:7] for call in calls] == [
        ["10", n1, "1", "1", "1", "0", "0"] for n1 in ("3", "6", "9")
    ]
    names = [part.rsplit("/", 1)[-1] for part in calls[0].split()[7:11]]
    assert names == [
        "input_weight_path.bin",
        "compress_output.bin",
        "compress_index.bin",
        "compress_info.bin",
    ]
    assert calls[0].endswith("0o600")
    root = tmp_path / "temporary"
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert list(root.iterdir()) == []
    with pytest.raises(FormatError, match="only its hardware"):
        job.verify()


def test_type_is_that_of_the_device(sparse, executor, tmp_path):
    job = compressor(sparse, executor(), tmp_path)
    job.run()
    job.export_safetensors(tmp_path / "out")
    stored = open_checkpoint(tmp_path / "out")
    assert stored.tensors["l0.info"].shape == (5,)
    text = (tmp_path / "out" / "quant_model_description_w8a8sc.json").read_text()
    assert '"W8A8SC"' in text
    assert "SLC1" not in text
    assert "slc1" not in text
    assert open_compressed(tmp_path / "out").compressed == []


def test_whole_directory(checkpoint, executor, tmp_path):
    config = CompressConfig(codec="device", executor=executor())
    target = tmp_path / "out"
    assert compress_checkpoint(checkpoint, target, config).tensors == 3
    assert sorted(file.suffix for file in target.iterdir()) == [".json"] * 3 + [".safetensors"]
    with pytest.raises(ValueError, match="verify is not possible"):
        compress_checkpoint(checkpoint, tmp_path / "x", config, verify=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('to out'); sys.exit('no device 0')", "exit status 1\nstdout: to out\n\nstderr: no"),
        ("time.sleep(60)", "did not end within 0.5 s"),
        ("pass", "wrote no compress_output.bin, compress_index.bin, compress_info.bin"),
        (COPY + "open(sys.argv[11], 'wb').write(b'1234')", "1 info values"),
        (COPY + "open(sys.argv[9], 'ab').write(b'1')", "bytes"),
        (COPY + "open(sys.argv[10], 'ab').write(b'1')", "index bytes"),
    ],
)
def test_failures_carry_what_the_program_said(body, words, sparse, executor, tmp_path):
    body = "\n".join(line.strip() for line in body.splitlines())
    job = compressor(
        sparse, executor(body), tmp_path, executor_timeout=0.5 if "sleep" in body else 60
    )
    with pytest.raises(ExecutorError, match="(?s)l0.weight.*" + words.replace(".", r"\.")):
        job.run()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_program_that_cannot_be_run(sparse, executor, tmp_path):
    path = executor()
    job = compressor(sparse, path, tmp_path)
    path.write_bytes(b"\x7fELF is not enough")
    with pytest.raises(ExecutorError, match="cannot be run"):
        job.run()
    path.unlink()
    with pytest.raises(ValueError, match="executor must be an executable file"):
        CompressConfig(codec="device", executor=path)


def test_the_limit_of_the_program_is_kept(executor, tmp_path):
    rows = 16 * MAX_FRACTALS + 1
    tall = np.zeros((rows, 1), np.int8)
    config = CompressConfig(
        record_detail_root=str(tmp_path), codec="device", executor=executor("pass")
    )
    job = Compressor(
        config,
        weight={"t.weight": tall},
        quant_model_description={"model_quant_type": "W8A8S", "t.weight": "W8A8S"},
    )
    with pytest.raises(FormatError, match=r"t\.weight has 50001 x 1 fractals"):
        job.run()
