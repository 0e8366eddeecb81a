"""Whole directories, by function and by command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from slim_compress import CompressConfig, CorruptStreamError, VerificationError
from slim_compress.checkpoint import (
    compress_checkpoint,
    decompress_checkpoint,
    open_compressed,
    verify_checkpoint,
)
from slim_compress.cli import main
from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError, OutputExistsError, PatternError


def equal(directory, other):
    first, second = open_checkpoint(directory), open_checkpoint(other)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        a, b = first.load(name), second.load(name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def damage(directory):
    """Change one byte in the middle of the largest compressed weight."""
    file = next(directory.glob("*.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    info = open_checkpoint(directory).load(name)
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    start = data.find(info.tobytes())
    data[start + info.size // 2] ^= 4
    file.write_bytes(data)


def test_a_tied_head_goes_through(checkpoint, tmp_path):
    """Described, not stored: the embedding is the output head."""
    file = checkpoint / "quant_model_description.json"
    tied = {**json.loads(file.read_text()), "lm_head.weight": "FLOAT"}
    file.write_text(json.dumps(tied))
    small, back = tmp_path / "small", tmp_path / "back"
    compress_checkpoint(checkpoint, small, verify=True)
    assert verify_checkpoint(small, checkpoint) == 3
    decompress_checkpoint(small, back)
    equal(checkpoint, back)
    after = json.loads((back / "quant_model_description.json").read_text())
    assert after["lm_head.weight"] == "FLOAT"


def test_there_and_back(checkpoint, tmp_path):
    small, back = tmp_path / "small", tmp_path / "back"
    summary = compress_checkpoint(checkpoint, small, CompressConfig(), verify=True)
    assert summary.tensors == 3
    assert summary.raw_bytes == 200 * 300 + 129 * 257 + 64 * 512
    assert summary.stored_bytes < summary.raw_bytes
    assert verify_checkpoint(small, checkpoint, jobs=2) == 3
    decompress_checkpoint(small, back, jobs=2)
    equal(checkpoint, back)
    before = json.loads((checkpoint / "quant_model_description.json").read_text())
    after = json.loads((back / "quant_model_description.json").read_text())
    assert after == {**before, "metadata": {}}
    assert {file.name for file in small.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "quant_model_description.json",
        "quant_model_weight_w8a8sc.safetensors",
    }


def test_loader_gives_the_original_tensors(checkpoint, tmp_path):
    compress_checkpoint(checkpoint, tmp_path / "small")
    loader = open_compressed(tmp_path / "small")
    source = open_checkpoint(checkpoint)
    found = dict(loader.tensors())
    assert list(found) == list(loader.types)
    assert set(found) == set(source.tensors)
    for name, array in found.items():
        assert np.array_equal(array, source.load(name))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(loader.tile(name, 1, 1), source.load(name)[128:, 256:])
    assert loader.facts(name).shape == (200, 300)
    assert loader.types[name] == "W8A8S"
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.weigh'"):
        loader.load("model.norm.weigh")


def test_transposed_streams_come_back_as_they_were(checkpoint, tmp_path):
    from slim_compress import Compressor

    source = open_checkpoint(checkpoint)
    weights = {name: source.load(name) for name in source.tensors}
    description = json.loads((checkpoint / "quant_model_description.json").read_text())
    compressor = Compressor(CompressConfig(), None, weights, description)
    compressor.run(weight_transpose=True)
    compressor.export_safetensors(tmp_path / "t")
    for name, array in open_compressed(tmp_path / "t").tensors():
        assert np.array_equal(array, weights[name])


def test_disabled_weights_stay(checkpoint, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    config = CompressConfig(compress_disable_layers=[name])
    assert compress_checkpoint(checkpoint, tmp_path / "small", config).tensors == 2
    assert open_checkpoint(tmp_path / "small").tensors[name].shape == (129, 257)
    assert verify_checkpoint(tmp_path / "small", checkpoint) == 2


def test_a_disabled_weight_must_exist(checkpoint, tmp_path):
    config = CompressConfig(compress_disable_layers=["model.layers.1.mlp.up_proj.wait"])
    with pytest.raises(PatternError, match=r"up_proj\.wait.*\nHint: did you mean.*up_proj\.weight"):
        compress_checkpoint(checkpoint, tmp_path / "small", config)


def test_shards(checkpoint, tmp_path):
    compress_checkpoint(checkpoint, tmp_path / "small", max_shard_bytes=20000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert verify_checkpoint(tmp_path / "small", checkpoint) == 3


def test_existing_output_is_kept(checkpoint, tmp_path):
    target = tmp_path / "small"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(OutputExistsError):
        compress_checkpoint(checkpoint, target)
    assert (target / "precious").read_text() == "x"
    compress_checkpoint(checkpoint, target, overwrite=True)
    assert not (target / "precious").exists()


def test_a_failure_leaves_what_was_there(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "small"
    compress_checkpoint(checkpoint, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slim_core.checkpoint.part.PartFile.finish", full)
    with pytest.raises(OSError, match="No space left"):
        compress_checkpoint(checkpoint, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small", "w8a8s"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gone.weight": "W8A8S"}, r"gone\.weight is in the description but not"),
        ({"model.norm.weight": "W9"}, r"model\.norm\.weight has the type 'W9'"),
        ({"model.layers.0.mlp.up_proj.weight": "W16A16S"}, "W16A16S"),
    ],
)
def test_a_wrong_description_is_named_before_any_work(checkpoint, tmp_path, change, words):
    file = checkpoint / "quant_model_description.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((CheckpointError, TypeError), match=words):
        compress_checkpoint(checkpoint, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_directory_without_sparse_weights(checkpoint, tmp_path):
    compress_checkpoint(checkpoint, tmp_path / "small")
    with pytest.raises(CheckpointError, match="no sparse weight"):
        compress_checkpoint(tmp_path / "small", tmp_path / "again")
    (checkpoint / "quant_model_description.json").unlink()
    with pytest.raises(CheckpointError, match="must have one quant_model_description"):
        compress_checkpoint(checkpoint, tmp_path / "x")


def test_damage_is_named(checkpoint, tmp_path):
    compress_checkpoint(checkpoint, tmp_path / "small")
    damage(tmp_path / "small")
    with pytest.raises(CorruptStreamError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight, tile"):
        verify_checkpoint(tmp_path / "small")


def test_another_original_is_noticed(checkpoint, tmp_path, sparse):
    compress_checkpoint(checkpoint, tmp_path / "small")
    compress_checkpoint(checkpoint, tmp_path / "other")
    with pytest.raises(VerificationError, match="only in one of"):
        verify_checkpoint(tmp_path / "small", tmp_path / "other")


class TestCommandLine:
    def test_the_whole_job(self, checkpoint, tmp_path, capsys):
        small, back = str(tmp_path / "small"), str(tmp_path / "back")
        assert main(["compress", str(checkpoint), small, "--verify", "--jobs", "2"]) == 0
        assert "3 weights compressed, all decoded and compared" in capsys.readouterr().out
        assert main(["verify", small, "--original", str(checkpoint)]) == 0
        assert "3 compressed weights decode without error and every" in capsys.readouterr().out
        assert main(["info", small]) == 0
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 5
        assert table[1].split()[0] == "model.layers.0.mlp.up_proj.weight"
        assert table[-1].startswith("total")
        assert main(["decompress", small, back]) == 0
        assert "3 weights restored" in capsys.readouterr().out
        equal(checkpoint, back)

    def test_fast_disable_shards(self, checkpoint, tmp_path, capsys):
        small = tmp_path / "small"
        arguments = ["--fast", "--disable", "model.layers.1.mlp.up_proj.weight"]
        assert main(["compress", str(checkpoint), str(small), *arguments]) == 0
        assert "2 weights compressed" in capsys.readouterr().out
        assert main(["info", str(small / "quant_model_weight_w8a8sc.safetensors")]) == 0
        assert "nib:" in capsys.readouterr().out
        assert main(["compress", str(checkpoint), str(small), "--overwrite", "--shard-size=1"]) == 0
        assert main(["compress", str(checkpoint), str(small), "--shard-size", "-1"]) == 1
        assert "--shard-size" in capsys.readouterr().err

    def test_errors_go_to_stderr_without_a_traceback(self, checkpoint, tmp_path, capsys):
        small = tmp_path / "small"
        assert main(["compress", str(tmp_path / "absent"), str(small)]) == 1
        assert "absent" in capsys.readouterr().err
        assert main(["info", str(checkpoint)]) == 1
        assert "no weight that was compressed" in capsys.readouterr().err
        assert main(["compress", str(checkpoint), str(small), "--codec", "device"]) == 1
        assert "needs executor" in capsys.readouterr().err
        assert main(["compress", str(checkpoint), str(small)]) == 0
        damage(small)
        capsys.readouterr()
        assert main(["verify", str(small)]) == 1
        assert "up_proj.weight, tile" in capsys.readouterr().err
        assert main(["decompress", str(small), str(tmp_path / "back")]) == 1
        assert not (tmp_path / "back").exists()

    def test_help_does_not_load_numpy(self):
        code = (
            "import sys\nfrom slim_compress.cli import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
            "assert 'numpy' not in sys.modules, 'numpy was imported'"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "compress a W8A8S directory" in done.stdout

    @pytest.mark.parametrize("arguments", [[], ["zip"], ["compress"], ["info", "x", "--jobs", "y"]])
    def test_wrong_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage" in capsys.readouterr().err
