"""The compatible face: what scripts written for it rely on."""

import json
import logging
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from slim_compress import (
    CompressConfig,
    Compressor,
    UntrustedDataError,
    VerificationError,
    decompress,
    nd_to_nz,
)
from slim_compress.checkpoint import open_compressed
from slim_compress.compressor import pseudo_sparse_mask
from slim_core.checkpoint import open_checkpoint
from slim_core.errors import CheckpointError, FileSecurityError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def weights(sparse):
    return {f"layer{i}": sparse(100 + i, 300, i) for i in range(3)}


@pytest.fixture
def npy(tmp_path, weights):
    path = tmp_path / "quant_weight.npy"
    np.save(path, weights)
    path.chmod(0o600)
    return path


@pytest.fixture
def tensors(sparse):
    """Return weights and description as a quantizer hands them over."""
    values = {
        "q.weight": sparse(40, 64),
        "q.deq_scale": np.arange(40),
        "q.bias": np.zeros(40, np.float32),
        "input_norm.weight": sparse(1, 8)[0],
        "lm_head.weight": np.ones((4, 4), np.float32),
        "v.weight": sparse(40, 64, 1),
    }
    types = {name: "FLOAT" if name in ("lm_head.weight", "q.bias") else "W8A8S" for name in values}
    return values, {"model_quant_type": "W8A8S", "version": "1.0.0", "group_size": "0", **types}


class TestConfig:
    def test_names_order_and_defaults(self):
        config = CompressConfig()
        assert not config.do_pseudo_sparse
        assert config.sparse_ratio == 1
        assert not config.is_debug
        assert config.compress_disable_layers == []
        assert config.record_detail_root == "./"
        assert config.multiprocess_num == 1
        config = CompressConfig(True, 0.5, True, ("a.weight",), "x", 1)
        assert config.compress_disable_layers == ["a.weight"]
        assert config.record_detail_root == "x"
        assert isinstance(config.logger, logging.Logger)

    @pytest.mark.parametrize(
        ("error", "arguments"),
        [
            (TypeError, {"do_pseudo_sparse": 1}),
            (TypeError, {"do_pseudo_sparse": True, "sparse_ratio": True}),
            (TypeError, {"do_pseudo_sparse": True, "sparse_ratio": "1"}),
            (ValueError, {"do_pseudo_sparse": True, "sparse_ratio": 1.1}),
            (ValueError, {"do_pseudo_sparse": True, "sparse_ratio": -0.1}),
            (TypeError, {"is_debug": "yes"}),
            (TypeError, {"compress_disable_layers": "a"}),
            (ValueError, {"compress_disable_layers": [1]}),
            (ValueError, {"compress_disable_layers": ["a;b"]}),
            (ValueError, {"record_detail_root": 1}),
            (TypeError, {"multiprocess_num": True}),
            (TypeError, {"multiprocess_num": 2.0}),
            (ValueError, {"multiprocess_num": 0}),
            (ValueError, {"codec": "zip"}),
            (ValueError, {"codec": "device"}),
            (ValueError, {"executor": "/bin/true"}),
            (TypeError, {"fast": 1}),
            (ValueError, {"seed": -1}),
        ],
    )
    def test_refuses_and_names(self, error, arguments):
        with pytest.raises(error, match=list(arguments)[-1]):
            CompressConfig(**arguments)

    def test_more_threads_than_processors_are_lowered_and_said(self, caplog):
        with caplog.at_level(logging.INFO, "slim"):
            config = CompressConfig(multiprocess_num=100000)
        assert config.multiprocess_num == os.cpu_count()
        assert "100000" in caplog.text


class TestNpy:
    def test_the_documented_script(self, npy, weights, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr("builtins.input", lambda _: "yes")
        save_path = str(tmp_path / "compress")
        config = CompressConfig(
            do_pseudo_sparse=False,
            sparse_ratio=1,
            is_debug=True,
            record_detail_root=save_path,
            multiprocess_num=8,
        )
        with caplog.at_level(logging.INFO, "slim"):
            compressor = Compressor(config, str(npy))
            weight, index, info = compressor.run()
        assert "The final compression ratio is" in caplog.text
        assert compressor.verify() == 3
        compressor.export(weight, f"{save_path}/weight")
        compressor.export(index, f"{save_path}/index")
        compressor.export(info, f"{save_path}/info", dtype=np.int64)
        for name, matrix in weights.items():
            parts = [
                np.fromfile(tmp_path / "compress" / part / f"{name}.dat", dtype)
                for part, dtype in (("weight", np.int8), ("index", np.int8), ("info", np.int64))
            ]
            assert np.array_equal(decompress(*parts), matrix)
        assert mode(tmp_path / "compress/weight/layer0.dat") == 0o400
        assert mode(tmp_path / "compress/weight") == 0o750

    def test_transposed(self, npy, weights):
        compressor = Compressor(CompressConfig(), npy, trusted=True)
        weight, index, info = compressor.run(weight_transpose=True)
        assert compressor.verify() == 3
        for name, matrix in weights.items():
            decoded = decompress(weight[name], index[name], info[name])
            assert np.array_equal(decoded, matrix.T)
            assert info[name][:5].tolist() == [8, 8, *matrix.shape, 1]

    def test_disabled_layers_are_handed_back_in_nz(self, npy, weights):
        config = CompressConfig(compress_disable_layers=["layer1"])
        weight, index, info = Compressor(config, npy, trusted=True).run()
        assert np.array_equal(weight["layer1"], nd_to_nz(weights["layer1"]))
        assert index["layer1"].size == 0
        assert list(info) == ["layer0", "layer2"]

    @pytest.mark.parametrize("answer", ["no", "YES", "y", ""])
    def test_anything_but_yes_stops(self, npy, answer, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda _: answer)
        with pytest.raises(UntrustedDataError, match="prohibited"):
            Compressor(CompressConfig(), npy)

    def test_end_of_input_stops(self, npy, monkeypatch):
        def closed(_):
            raise EOFError

        monkeypatch.setattr("builtins.input", closed)
        with pytest.raises(UntrustedDataError, match="prohibited"):
            Compressor(CompressConfig(), npy)

    def test_malicious_pickle_does_not_run(self, tmp_path):
        sentinel = tmp_path / "executed"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(sentinel),)

        path = tmp_path / "evil.npy"
        np.save(path, {"a": Evil()})
        path.chmod(0o600)
        with pytest.raises(FileSecurityError, match="mkdir"):
            Compressor(CompressConfig(), path, trusted=True)
        assert not sentinel.exists()
        assert pickle.loads(pickle.dumps(1)) == 1  # pickle itself is as it was

    def test_unsafe_or_missing_files(self, npy, tmp_path):
        with pytest.raises(FileNotFoundError):
            Compressor(CompressConfig(), tmp_path / "absent.npy", trusted=True)
        with pytest.raises(FileSecurityError, match=r"\.npy"):
            Compressor(CompressConfig(), tmp_path / "weights.bin", trusted=True)
        npy.chmod(0o666)
        with pytest.raises(FileSecurityError, match="written by others"):
            Compressor(CompressConfig(), npy, trusted=True)

    def test_a_weight_that_is_no_matrix_is_named_before_any_work(self, tmp_path, weights):
        path = tmp_path / "w.npy"
        np.save(path, {**weights, "zz": np.zeros(5, np.int8)})
        path.chmod(0o600)
        with pytest.raises(ValueError, match="zz must have 2 dimensions, not 1"):
            Compressor(CompressConfig(), path, trusted=True).run()
        np.save(path, {"wide": np.full((4, 4), 300)})
        with pytest.raises(ValueError, match="wide has the value 300"):
            Compressor(CompressConfig(), path, trusted=True).run()


class TestDictionaries:
    def test_arguments(self, tensors):
        weights, description = tensors
        config = CompressConfig()
        for arguments in ((), (None, weights), (None, None, description), (None, {}, {})):
            with pytest.raises(ValueError, match="Weight Loading failed"):
                Compressor(config, *arguments)
        with pytest.raises(ValueError, match="config must be"):
            Compressor({}, weight=weights, quant_model_description=description)
        with pytest.raises(TypeError, match="weight must be dict"):
            Compressor(config, None, [1], description)
        with pytest.raises(TypeError, match="quant_model_description must be dict"):
            Compressor(config, None, weights, [1])
        with pytest.raises(TypeError, match=r"q\.bias must be a torch\.Tensor"):
            Compressor(config, None, {**weights, "q.bias": 3}, description)
        with pytest.raises(TypeError, match="must be str"):
            Compressor(config, None, {**weights, 5: weights["q.weight"]}, description)
        with pytest.raises(TypeError, match=r"q\.bias has the type 'W9'"):
            Compressor(config, None, weights, {**description, "q.bias": "W9"})
        del description["model_quant_type"]
        with pytest.raises(ValueError, match="model_quant_type"):
            Compressor(config, None, weights, description)

    def test_names_must_match_both_ways(self, tensors):
        weights, description = tensors
        config = CompressConfig()
        with pytest.raises(CheckpointError, match=r"x\.weight is in the description but not"):
            Compressor(config, None, weights, {**description, "x.weight": "W8A8S"})
        with pytest.raises(CheckpointError, match=r"do not match: y\.bias is not in the descr"):
            Compressor(config, None, {**weights, "y.bias": weights["q.bias"]}, description)

    def test_a_tied_head_is_described_and_not_stored(self, tensors, tmp_path):
        weights, description = tensors
        config = CompressConfig()
        tied = Compressor(config, None, weights, {**description, "embed_out.weight": "FLOAT"})
        tied.run()
        tied.export_safetensors(tmp_path / "small")
        stored = open_compressed(tmp_path / "small")
        assert set(stored.types) == set(weights)
        assert stored.description["embed_out.weight"] == "FLOAT"
        assert dict(stored.tensors()).keys() == weights.keys()
        with pytest.raises(
            CheckpointError, match=r"embed_out\.weight is in the description but not"
        ):
            Compressor(config, None, weights, {**description, "embed_out.weight": "W8A8S"})

    def test_16_bit_sparse_weights_are_refused(self, tensors):
        weights, description = tensors
        with pytest.raises(CheckpointError, match=r"q\.weight has the type W16A16S"):
            Compressor(CompressConfig(), None, weights, {**description, "q.weight": "W16A16S"})

    def test_nothing_sparse(self, tensors):
        weights, description = tensors
        plain = {k: "FLOAT" if v == "W8A8S" else v for k, v in description.items()}
        compressor = Compressor(CompressConfig(), None, weights, plain)
        assert compressor.sparse_type is None
        with pytest.raises(ValueError, match="No sparse weight found"):
            compressor.run()

    def test_run_checks_its_argument(self, tensors):
        compressor = Compressor(CompressConfig(), None, *tensors)
        with pytest.raises(TypeError, match="weight_transpose"):
            compressor.run(1)

    def test_verify_sees_a_changed_original(self, tensors):
        weights, description = tensors
        compressor = Compressor(CompressConfig(), None, weights, description)
        compressor.run()
        weights["v.weight"][3, 4] ^= 1
        with pytest.raises(VerificationError, match=r"v\.weight: the decoded weight differs"):
            compressor.verify()

    def test_torch_tensors(self, tensors):
        torch = pytest.importorskip("torch")
        weights, description = tensors
        as_torch = {k: torch.from_numpy(v) for k, v in weights.items()}
        as_torch["lm_head.weight"] = as_torch["lm_head.weight"].to(torch.bfloat16)
        compressor = Compressor(CompressConfig(), None, as_torch, description)
        compressor.run()
        assert compressor.verify() == 2


class TestPseudoSparse:
    def test_keeps_the_share_and_depends_on_the_seed_only(self, npy):
        def run(seed):
            config = CompressConfig(True, 0.3, seed=seed)
            compressor = Compressor(config, npy, trusted=True)
            results = compressor.run()
            assert compressor.verify() == 3
            return [array.tobytes() for result in results for array in result.values()]

        assert run(1) == run(1)
        assert run(1) != run(2)
        mask = pseudo_sparse_mask((1000, 1000), 0.3, 0)
        assert mask.shape == (1000, 1000)
        assert abs(mask.mean() - 0.3) < 0.005

    def test_ratio_one_keeps_everything(self, npy):
        plain = Compressor(CompressConfig(), npy, trusted=True).run()
        kept = Compressor(CompressConfig(True, 1), npy, trusted=True).run()
        for a, b in zip(plain, kept, strict=True):
            assert all(np.array_equal(a[key], b[key]) for key in a)


class TestExport:
    def test_wrong_arguments(self, tmp_path):
        arrays = {"a": np.zeros(3, np.int8)}
        with pytest.raises(ValueError, match="dtype"):
            Compressor.export(arrays, str(tmp_path / "x"), dtype=np.float32)
        with pytest.raises(TypeError, match="arr must be dict"):
            Compressor.export([1], str(tmp_path / "x"))
        with pytest.raises(TypeError, match="path must be str"):
            Compressor.export(arrays, 3)
        for key in ("a/b", "", "x" * 300):
            with pytest.raises(ValueError, match="name of a file"):
                Compressor.export({key: arrays["a"]}, str(tmp_path / "x"))
        with pytest.raises(ValueError, match="info has the value 5000, which int8 cannot hold"):
            Compressor.export({**arrays, "info": np.array([5000])}, str(tmp_path / "x"))
        assert not (tmp_path / "x").exists()

    def test_replaces_a_file_that_is_read_only(self, tmp_path):
        for value in (1, 2):
            Compressor.export({"a": np.full((2, 2), value)}, str(tmp_path))
            assert (tmp_path / "a.dat").read_bytes() == bytes([value]) * 4
            assert mode(tmp_path / "a.dat") == 0o400


class TestSafetensors:
    def run(self, tensors, **settings):
        compressor = Compressor(CompressConfig(**settings), None, *tensors)
        compressor.run()
        return compressor

    def test_files_names_types_and_modes(self, tensors, tmp_path):
        out = tmp_path / "out"
        self.run(tensors).export_safetensors(out)
        assert sorted(file.name for file in out.iterdir()) == [
            "quant_model_description.json",
            "quant_model_weight_w8a8sc.safetensors",
        ]
        assert mode(out) == 0o750
        assert mode(out / "quant_model_weight_w8a8sc.safetensors") == 0o400
        assert mode(out / "quant_model_description.json") == 0o600
        description = json.loads((out / "quant_model_description.json").read_text())
        assert description["model_quant_type"] == "W8A8SC_SLC1"
        assert description["metadata"]["compress_codec"] == "slc1"
        assert description["q.weight"] == description["q.info"] == "W8A8SC_SLC1"
        assert description["q.deq_scale"] == description["input_norm.weight"] == "W8A8S"
        assert description["group_size"] == "0"
        stored = open_checkpoint(out)
        assert sorted(stored.tensors) == sorted(
            [*tensors[0], "q.index", "q.info", "v.index", "v.info"]
        )
        assert stored.tensors["q.info"].dtype == np.int64
        for part in ("weight", "index"):
            assert stored.tensors[f"q.{part}"].dtype == np.int8
            assert len(stored.tensors[f"q.{part}"].shape) == 1

    def test_name_without_version(self, tensors, tmp_path):
        weights, description = tensors
        for version in (None, "0.0.0"):
            changed = {**description, "version": version}
            self.run((weights, changed)).export_safetensors(tmp_path / "o")
        assert (tmp_path / "o" / "quant_model_description_w8a8sc.json").is_file()

    def test_given_names(self, tensors, tmp_path, caplog):
        compressor = self.run(tensors)
        compressor.export_safetensors(tmp_path, "a.safetensors", "b.json")
        assert (tmp_path / "a.safetensors").is_file()
        assert (tmp_path / "b.json").is_file()
        compressor.export_safetensors(tmp_path, "a.bin", 7)
        assert "safetensors_name" in caplog.text
        assert (tmp_path / "quant_model_weight_w8a8sc.safetensors").is_file()
        assert (tmp_path / "quant_model_description.json").is_file()

    def test_disabled_layers_and_norms_survive(self, tensors, tmp_path):
        compressor = self.run(tensors, compress_disable_layers=["q.weight"])
        compressor.export_safetensors(tmp_path)
        stored = open_checkpoint(tmp_path)
        for name in ("q.weight", "input_norm.weight"):
            assert np.array_equal(stored.load(name), tensors[0][name])
        description = json.loads((tmp_path / "quant_model_description.json").read_text())
        assert description["q.weight"] == "W8A8S"
        assert "q.index" not in description

    def test_needs_a_description_and_a_run(self, npy, tensors, tmp_path):
        compressor = Compressor(CompressConfig(), npy, trusted=True)
        compressor.run()
        with pytest.raises(ValueError, match="quant_model_description"):
            compressor.export_safetensors(tmp_path)
        with pytest.raises(ValueError, match=r"before run\(\)"):
            Compressor(CompressConfig(), None, *tensors).export_safetensors(tmp_path)

    def test_read_by_the_library(self, tensors, tmp_path):
        numpy = pytest.importorskip("safetensors.numpy")
        self.run(tensors).export_safetensors(tmp_path)
        stored = numpy.load_file(tmp_path / "quant_model_weight_w8a8sc.safetensors")
        decoded = decompress(stored["v.weight"], stored["v.index"], stored["v.info"])
        assert np.array_equal(decoded, tensors[0]["v.weight"])

    def test_ranks_write_into_one_directory(self, tensors, tmp_path):
        def rank(number):
            weights = dict(tensors[0])
            name = f"model-rank-{number}-part-0.safetensors"
            compressor = Compressor(
                CompressConfig(), weight=weights, quant_model_description=dict(tensors[1])
            )
            compressor.run()
            del weights
            for _ in range(20):
                compressor.export_safetensors(tmp_path, safetensors_name=name)
                json.loads((tmp_path / "quant_model_description.json").read_text())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(rank, range(4)))
        assert len(list(tmp_path.iterdir())) == 5

    def test_a_loader_for_the_device_refuses_the_shapes(self, tensors, tmp_path):
        self.run(tensors).export_safetensors(tmp_path)
        stored = open_checkpoint(tmp_path)
        n, k = tensors[0]["q.weight"].shape
        device_index = 8 * -(-k // 256) * -(-n // 128)
        parameters = {"index": np.zeros(device_index, np.int8), "info": np.zeros(5, np.int64)}
        for part, parameter in parameters.items():
            with pytest.raises(ValueError, match="broadcast"):
                parameter[:] = stored.load(f"q.{part}")
