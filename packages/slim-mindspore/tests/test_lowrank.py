import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError, PlanError
from slim_mindspore import Decompose, count_parameters, next_token_loss
from slim_mindspore.evaluate import perplexity, relative_error
from slim_mindspore.hub import load_llama
from slim_mindspore.linears import cell_at
from slim_mindspore.moments import collect_moments

HEAD = ["lm_head"]


class Sample(nn.Cell):
    """The sample network of the reference tests, by its published sizes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.SequentialCell([nn.Embedding(16, 32), nn.Dense(32, 64)])
        self.feature = nn.SequentialCell(
            [nn.Conv2d(64, 128, 3, has_bias=True), nn.ReLU(), nn.Conv2d(128, 64, 1, has_bias=True)]
        )
        self.inner = nn.Dense(1600, 512, activation="relu")
        self.classifier = nn.SequentialCell([nn.Dense(512, 256), nn.Dense(256, 10)])

    def construct(self, ids):
        x = self.embedding(ids).transpose(0, 3, 1, 2)
        return self.classifier(self.inner(self.feature(x).reshape(ids.shape[0], -1)))


@pytest.fixture
def sample():
    ms.set_seed(0)
    return Sample()


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    return [[ms.Tensor(random.integers(0, 16, (64, 5, 5)).astype(np.int32))] for _ in range(6)]


def test_ranks_of_the_reference(sample):
    assert count_parameters(sample) == 1_038_346
    assert Decompose(sample).from_ratio(0.5).decompose_config == {
        "feature.0": (64, 64),
        "inner": 192,
        "classifier.0": 128,
    }
    assert Decompose(sample).from_ratio(0.5, divisor=16).decompose_config == {
        "embedding.1": 16,
        "feature.0": (64, 64),
        "feature.2": (32, 32),
        "inner": 192,
        "classifier.0": 80,
    }
    assert Decompose(sample).from_fixed(16).decompose_config == {
        "feature.0": (64, 64),
        "inner": 64,
        "classifier.0": 64,
    }


def test_structure_and_names(sample, batches):
    table = {"feature.0": (32, 16), "feature.2": (16, 32)}
    network = Decompose(sample).from_dict(table, divisor=16).decompose_network()
    assert network is sample
    assert count_parameters(network) == 971_786
    Decompose(network).from_dict({"inner": 64, "embedding.1": 16}, divisor=16).decompose_network()
    names = [parameter.name for parameter in network.get_parameters()]
    assert names[0] == "embedding.0.embedding_table"
    for part in ("feature.0.0.weight", "feature.0.2.bias", "inner.0.weight", "inner.1.bias"):
        assert part in names
    assert "inner.weight" not in names
    assert network(*batches[0]).shape == (64, 10)


def test_count_with_rank_16_everywhere(sample):
    ranks = {"embedding.1": 16, "feature.0": 16, "feature.2": 16, "inner": 16, "classifier.0": 16}
    network = Decompose(sample).from_dict(ranks, divisor=16).decompose_network(False)
    kept = 16 * 32 + 256 * 10 + 10  # embedding.0 and classifier.1 would not get smaller
    linear = sum(16 * (i + o) + o for i, o in ((32, 64), (1600, 512), (512, 256)))
    conv = sum(16 * (i + o) + 16 * 16 * k * k + o for i, o, k in ((64, 128, 3), (128, 64, 1)))
    assert count_parameters(network) == kept + linear + conv == 60_426


def test_count_of_the_reference():
    """The count reported for a decomposed network is that with rank 8 behind the embedding."""
    ranks = {"embedding.1": 8, "feature.0": 16, "feature.2": 16, "inner": 16, "classifier.0": 16}
    decompose = Decompose(Sample())
    decompose.decompose_config = ranks
    assert count_parameters(decompose.decompose_network(do_decompose_weight=False)) == 59_658


def test_a_language_model(tiny_dir, shared_model, calib_ids, eval_ids):
    datasets = [[ms.Tensor(ids.astype(np.int32))] for ids in calib_ids[:4]]

    def uniform(datasets):
        decompose = Decompose(load_llama(tiny_dir)).from_ratio(0.75, excludes=HEAD, divisor=16)
        return decompose.decompose_network(datasets=datasets)

    def budget():
        decompose = Decompose(load_llama(tiny_dir))
        decompose.from_budget(0.7, datasets, loss=next_token_loss, excludes=HEAD, divisor=16)
        return decompose.decompose_network()

    def elements(network):
        names = network.parameters_dict().items()
        return sum(p.size for n, p in names if ".attention." in n or ".feed_forward." in n)

    networks = uniform(None), uniform(datasets), budget()
    for network in networks:
        share = elements(network) / elements(shared_model)
        assert share <= 0.7025
        assert share == pytest.approx(0.70, abs=0.005)
    dense, *found = (
        perplexity(network, eval_ids[:1024], window=128, batch=4)
        for network in (shared_model, *networks)
    )
    by_weight, by_data, by_loss = (each / dense - 1 for each in found)
    assert by_data < 0.7 * by_weight
    assert by_loss < 0.5 * by_data
    assert by_loss <= 0.08


def test_embedding():
    network = nn.SequentialCell([nn.Embedding(32, 64)])
    Decompose(network).from_fixed(16, divisor=16).decompose_network()
    assert count_parameters(network) == 1536
    names = [parameter.name for parameter in network.get_parameters()]
    assert names == ["0.0.embedding_table", "0.1.weight"]


class Twin(nn.Cell):
    """The network in ``data/README.md``."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(100, 64)
        self.d = nn.SequentialCell([nn.Dense(64, 256), nn.ReLU(), nn.Dense(256, 64)])
        self.c = nn.Conv2d(64, 64, 3, pad_mode="pad", padding=1, has_bias=False)
        self.h = nn.Dense(64, 10)

    def construct(self, ids):
        x = self.d(self.emb(ids)).transpose(0, 3, 1, 2)
        return self.h(self.c(x).mean((2, 3)))


def twin():
    random = np.random.default_rng(0)
    network = Twin()
    for parameter in network.get_parameters():
        values = random.standard_normal(parameter.shape, np.float32) / 8
        parameter.set_data(ms.Tensor(values))
    ids = [random.integers(0, 100, (8, 6, 6)).astype(np.int32) for _ in range(4)]
    return network, [[ms.Tensor(each)] for each in ids]


def test_a_network_gets_what_its_torch_twin_gets():
    with np.load(Path(__file__).parent / "data" / "torch_decompose.npz") as file:
        stored = dict(file)
    network, datasets = twin()
    assert count_parameters(network) == 77_002
    decompose = Decompose(network).from_ratio(0.5, divisor=8)
    assert decompose.decompose_config == {"emb": 24, "d.0": 24, "d.2": 24, "c": (40, 40), "h": 8}
    decompose.decompose_network()
    assert count_parameters(network) == 39_738
    for name, parameter in network.parameters_dict().items():
        found = parameter.asnumpy().reshape(len(parameter), -1)[:, :2]
        expected = stored[name.replace("embedding_table", "weight")]
        np.testing.assert_allclose(abs(found), abs(expected), rtol=0, atol=1e-5, err_msg=name)
    network, datasets = twin()
    Decompose(network).from_ratio(0.5, divisor=8).decompose_network(datasets=datasets)
    for name in ("d.0", "d.2", "h"):
        first, last = cell_at(network, name).cell_list
        product = last.weight.asnumpy() @ first.weight.asnumpy()[:, :4]
        np.testing.assert_allclose(product, stored[f"{name}|product"], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(last.bias.asnumpy(), stored[f"{name}|bias"], atol=1e-4)


def test_full_rank_keeps_the_outputs(sample, batches):
    before = sample(*batches[0]).asnumpy()
    decompose = Decompose(sample)
    decompose.decompose_config = {
        "embedding.0": 16,
        "embedding.1": 32,
        "feature.0": (128, 64),
        "feature.2": (64, 128),
        "classifier.0": 256,
    }
    after = decompose.decompose_network()(*batches[0]).asnumpy()
    assert relative_error(after, before) <= 1e-5


def test_data_beats_the_plain_weight(batches):
    errors = []
    for datasets in (None, batches[1:]):
        ms.set_seed(0)
        network = Sample()
        before = network(*batches[0]).asnumpy()
        Decompose(network).from_ratio(0.5, divisor=16).decompose_network(datasets=datasets)
        errors.append(relative_error(network(*batches[0]).asnumpy(), before))
    assert errors[1] < 0.5 * errors[0]


def test_budget_needs_gradients_of_the_cells():
    """What the hooks see is the gradient that the network has, frozen parameters or not."""
    ms.set_seed(0)
    network = nn.SequentialCell([nn.Dense(12, 24), nn.ReLU(), nn.Dense(24, 12)])
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    network[1].set_train(True)
    x = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    seen = collect_moments(
        network,
        {"0": network[0], "2": network[2]},
        [[ms.Tensor(x)]],
        loss=lambda y, batch: (y * y).sum() / 2,
    )
    y = network(ms.Tensor(x)).asnumpy().astype(np.float64)
    hidden = x @ network[0].weight.asnumpy().T + network[0].bias.asnumpy()
    back = (y @ network[2].weight.asnumpy()) * (hidden > 0)
    np.testing.assert_allclose(seen["2"].gradients, y.T @ y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["0"].gradients, back.T @ back, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["0"].mean, x.mean(0), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in network.get_parameters())
    assert network[1].training
    assert not network[0].training


def test_the_bias_makes_up_for_the_mean_error():
    ms.set_seed(0)
    network = nn.SequentialCell([nn.Dense(64, 48)])
    random = np.random.default_rng(0)
    x = ms.Tensor((random.standard_normal((300, 64)) + 2).astype(np.float32))
    before = network(x).asnumpy()
    Decompose(network).from_fixed(8, divisor=8).decompose_network(datasets=[[x]])
    np.testing.assert_allclose(network(x).asnumpy().mean(0), before.mean(0), atol=1e-5)


def test_a_budget_leaves_statistics_for_its_own_ranks_only(batches, sample, tmp_path):
    config = str(tmp_path / "ranks.json")
    decompose = Decompose(sample, config).from_budget(0.5, batches, divisor=16)
    assert set(decompose.decompose_config) <= {"embedding.1", "inner", "classifier.0"}
    assert json.loads((tmp_path / "ranks.json").read_text()) == decompose.decompose_config
    plain = Decompose(Sample(), config).from_file().decompose_network(do_decompose_weight=False)
    assert count_parameters(plain) == count_parameters(decompose.decompose_network())


def test_graph_mode(sample, batches, graph_mode):
    Decompose(sample).from_ratio(0.5).decompose_network()
    graph = sample(*batches[0]).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert np.abs(graph - sample(*batches[0]).asnumpy()).max() <= 1e-6


def test_structure_first_weights_later(sample, batches, tmp_path):
    config = str(tmp_path / "ranks.json")
    other = Sample()
    Decompose(sample, config).from_ratio(0.5).decompose_network()
    assert json.loads((tmp_path / "ranks.json").read_text())["feature.0"] == [64, 64]
    Decompose(other, config).from_file().decompose_network(do_decompose_weight=False)
    ms.save_checkpoint(sample, str(tmp_path / "w.ckpt"))
    left = ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "w.ckpt")))
    assert left == ([], [])
    np.testing.assert_array_equal(other(*batches[0]).asnumpy(), sample(*batches[0]).asnumpy())


def test_precision_is_kept():
    network = nn.SequentialCell([nn.Dense(64, 64, dtype=ms.float16)])
    network[0].to_float(ms.float16)
    Decompose(network).from_fixed(16, divisor=16).decompose_network()
    assert network[0][0].weight.dtype == ms.float16
    assert network[0].get_flags()["fp16"]
    assert network(ms.Tensor(np.ones((1, 64), np.float16))).dtype == ms.float16


def test_linear_of_mindformers_style():
    class Linear(nn.Cell):
        def __init__(self):
            super().__init__()
            self.transpose_b = False
            values = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
            self.weight = ms.Parameter(ms.Tensor(values), name="weight")

        def construct(self, x):
            return ms.ops.matmul(x, self.weight)

    network = nn.SequentialCell([Linear()])
    x = ms.Tensor(np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32))
    before = network(x).asnumpy()
    decompose = Decompose(network)
    decompose.decompose_config = {"0": 64}
    after = decompose.decompose_network()(x).asnumpy()
    assert relative_error(after, before) <= 1e-5


def test_bad_arguments(sample, batches):
    with pytest.raises(InvalidValueError, match=r"model must be a mindspore\.nn\.Cell, not int"):
        Decompose(3)
    with pytest.raises(InvalidValueError, match="call one of the from_"):
        Decompose(sample).decompose_network()
    for ratio in (0.0, 1.0, 1, "0.5"):
        with pytest.raises(InvalidValueError, match="channel_ratio"):
            Decompose(sample).from_ratio(ratio)
    ready = Decompose(sample).from_ratio(0.5)
    with pytest.raises(InvalidTypeError, match=r"datasets\[0\] must be dict or list, not int"):
        ready.decompose_network(datasets=[3])
    with pytest.raises(CalibrationError, match="hold no batch"):
        ready.decompose_network(datasets=[])
    with pytest.raises(CalibrationError, match="'inner' saw 64 positions, too few for rank 192"):
        ready.decompose_network(datasets=batches[:1])
    with pytest.raises(CalibrationError, match="saw 64 positions, too few for rank 64"):
        ready.from_budget(0.5, batches[:1], excludes=["embedding.1"])
    ready.from_ratio(0.5)
    with pytest.raises(InvalidTypeError, match="network must be Cell"):
        count_parameters(3)
    with pytest.raises(InvalidValueError, match="share must lie strictly between 0 and 1"):
        ready.from_budget(1.0, batches)
    with pytest.raises(PlanError, match="below the least possible cost"):
        ready.from_budget(0.01, batches)
    with pytest.raises(InvalidValueError, match="loss must return a scalar Tensor"):
        ready.from_budget(0.5, batches, loss=lambda output, batch: output)
    linears = ["embedding.1", "inner", "classifier.0", "classifier.1"]
    with pytest.raises(InvalidValueError, match="no linear cell that is not excluded"):
        ready.from_budget(0.5, batches, excludes=linears)
