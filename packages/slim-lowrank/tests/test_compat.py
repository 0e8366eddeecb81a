import json
import math
import stat

import pytest
import torch
from lowrank_models import ResNet50, SampleNet
from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_lowrank import Decompose, count_parameters


@pytest.fixture(scope="module")
def resnet50():
    return ResNet50().eval()


def test_sample_net_tables():
    net = SampleNet()
    assert count_parameters(net) == 1_038_346
    table = Decompose(net).from_ratio(0.5).decompose_config
    assert table == {"feature.0": (64, 64), "inner": 192, "classifier.0": 128}
    assert Decompose(net).from_ratio(0.5, divisor=16).decompose_config == {
        "embedding.1": 16,
        "feature.0": (64, 64),
        "feature.2": (32, 32),
        "inner": 192,
        "classifier.0": 80,
    }
    decomposer = Decompose(net).from_ratio(0.5, excludes=["inner", "classifier.0"], divisor=3)
    assert decomposer.decompose_config == {
        "embedding.0": 6,
        "embedding.1": 9,
        "feature.0": (54, 54),
        "feature.2": (18, 18),
        "classifier.1": 6,
    }
    assert Decompose(net).from_fixed(16).decompose_config == {
        "feature.0": (64, 64),
        "inner": 64,
        "classifier.0": 64,
    }


def test_decomposed_counts_and_names():
    net = SampleNet()
    decomposer = Decompose(net)
    decomposer.decompose_config = {
        "embedding.1": 16,
        "feature.0": (16, 16),
        "feature.2": (16, 16),
        "inner": 16,
        "classifier.0": 16,
    }
    assert count_parameters(decomposer.decompose_network()) == 60_426
    decomposer.decompose_config = {"feature.0": (32, 16), "feature.2": [16, 32]}
    small = decomposer.decompose_network(do_decompose_weight=False)
    assert count_parameters(small) == 971_786
    names = [name for name in small.state_dict() if name.startswith("feature.0")]
    assert names == [f"feature.0.{part}" for part in ("0.weight", "1.weight", "2.weight", "2.bias")]
    assert isinstance(small.feature[0], nn.Sequential)


def test_embedding_count_and_names():
    decomposer = Decompose(nn.Sequential(nn.Embedding(64, 32, padding_idx=3)))
    small = decomposer.from_fixed(8, divisor=1).decompose_network()
    assert count_parameters(small) == 768
    assert list(small.state_dict()) == ["0.0.weight", "0.1.weight"]
    assert small[0].padding_idx == 3
    assert not small(torch.tensor([3])).any()


@pytest.mark.parametrize(
    ("choose", "layers", "params"),
    [
        (lambda d: d.from_ratio(0.5), 39, 15_116_840),
        (lambda d: d.from_ratio(0.5, excludes=["fc"]), 38, 16_189_480),
        (lambda d: d.from_ratio(0.5, divisor=16), 53, 12_905_128),
        (lambda d: d.from_ratio(0.25, divisor=16), 53, 6_351_400),
        (lambda d: d.from_fixed(64, divisor=16), 43, 4_051_496),
        (lambda d: d.from_dict({"fc": 0.5, ".*.conv1": 64, ".*.conv2": 128}), 23, 12_773_928),
    ],
)
def test_resnet50_structure(resnet50, choose, layers, params):
    decomposer = choose(Decompose(resnet50))
    assert len(decomposer.decompose_config) == layers
    small = decomposer.decompose_network(do_decompose_weight=False)
    assert count_parameters(small) == params
    assert count_parameters(resnet50) == 25_557_032


def test_stem_ranks_stay_within_the_channels(resnet50):
    decomposer = Decompose(resnet50).from_ratio(0.5, divisor=1)
    assert len(decomposer.decompose_config) == 54
    assert decomposer.decompose_config["conv1"] == (9, 3)
    small = decomposer.decompose_network(do_decompose_weight=False).eval()
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_structure_only_needs_no_weights():
    with torch.device("meta"):
        net = ResNet50()
    small = Decompose(net).from_ratio(0.5).decompose_network(do_decompose_weight=False)
    assert count_parameters(small) == 15_116_840
    assert all(parameter.is_meta for parameter in small.parameters())


def test_weights_are_the_best_of_their_rank():
    net = SampleNet().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = Decompose(net).from_ratio(0.5, divisor=16).decompose_network()
    weight = net.inner.weight.detach().double()
    product = small.inner[1].weight.double() @ small.inner[0].weight.double()
    tail = torch.linalg.svdvals(weight)[192:].norm().item()
    assert (weight - product).norm().item() == pytest.approx(tail, rel=1e-5)
    norms = small.inner[0].weight.norm(dim=1), small.inner[1].weight.norm(dim=0)
    torch.testing.assert_close(norms[0], norms[1])
    assert torch.equal(small.inner[1].bias, net.inner.bias)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_full_ranks_reproduce_the_model():
    net = SampleNet().eval()
    decomposer = Decompose(net)
    decomposer.decompose_config = {
        "embedding.0": 16,
        "embedding.1": 32,
        "feature.0": (128, 64),
        "feature.2": (64, 128),
        "inner": 512,
        "classifier.1": 10,
    }
    ids = torch.randint(0, 16, (4, 7, 7))
    torch.testing.assert_close(decomposer.decompose_network()(ids), net(ids), rtol=1e-4, atol=1e-5)


def test_data_aware_beats_plain_on_its_data():
    net = SampleNet().eval()
    train, test = torch.randint(0, 16, (2, 32, 7, 7))
    decomposer = Decompose(net).from_ratio(0.5, divisor=16)
    plain = decomposer.decompose_network()
    for batches in ([(train,)], [{"ids": train}], iter([[train]])):
        aware = decomposer.decompose_network(datasets=batches)
        errors = [(small(test) - net(test)).norm() for small in (aware, plain)]
        assert errors[0] < errors[1]


def test_max_iter_limits_the_batches():
    net = SampleNet().eval()
    batches = [(torch.randint(0, 16, (32, 7, 7)),) for _ in range(3)]
    decomposer = Decompose(net).from_ratio(0.5)
    states = [
        decomposer.decompose_network(datasets=batches, max_iter=limit).state_dict()
        for limit in (-1, 0, 1)
    ]
    assert torch.equal(states[0]["inner.0.weight"], states[1]["inner.0.weight"])
    assert not torch.equal(states[0]["inner.0.weight"], states[2]["inner.0.weight"])


def test_config_file_round_trip(tmp_path):
    path = tmp_path / "ranks.json"
    net = SampleNet()
    written = Decompose(net, str(path)).from_ratio(0.5)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["feature.0"] == [64, 64]
    read = Decompose(net, str(path)).from_file()
    assert read.decompose_config == written.decompose_config


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"nothing": 8}, "nothing"),
        ({"inner": 4000}, "inner"),
        ({"inner": 8.0}, "inner"),
        ({"feature.0": [4, 999]}, "in rank of layer 'feature.0'"),
        ({}, "non-empty"),
        ([1], "non-empty"),
    ],
)
def test_bad_config_files(tmp_path, table, match):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(table))
    with pytest.raises(InvalidValueError, match=match):
        Decompose(SampleNet(), str(path)).from_file()


def test_first_matching_pattern_decides():
    net = SampleNet()
    table = Decompose(net).from_dict({"inner": 64, "in": 0.9, r"classifier\.0": "VBMF"}, divisor=16)
    assert table.decompose_config["inner"] == 64
    assert "feature.0" not in table.decompose_config
    assert table.decompose_config["classifier.0"] % 16 == 0
    pair = Decompose(net).from_dict({"feature.0": (16, 32), "inner": [8, 24]}, divisor=8)
    assert pair.decompose_config == {"feature.0": (16, 32), "inner": 24}


def test_vbmf_of_trained_like_weights():
    net = nn.Sequential(nn.Linear(256, 128))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(128, 12) @ torch.randn(12, 256))
        net[0].weight.add_(torch.randn(128, 256), alpha=0.1)
    assert Decompose(net).from_vbmf(divisor=1).decompose_config == {"0": 12}
    assert Decompose(net).from_vbmf(divisor=8).decompose_config == {"0": 16}


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, 1.5, -0.5, True, "0.5", None, math.nan])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match="channel_ratio"):
        Decompose(SampleNet()).from_ratio(ratio)


@pytest.mark.parametrize("fixed", [0, -1, True, 1.0, "8"])
def test_bad_fixed(fixed):
    with pytest.raises(ValueError, match="channel_fixed"):
        Decompose(SampleNet()).from_fixed(fixed)


@pytest.mark.parametrize("value", ["svd", (1, 2, 3), -1, None, 0])
def test_bad_dict_values_name_their_key(value):
    with pytest.raises(ValueError, match="inner"):
        Decompose(SampleNet()).from_dict({"feature": 0.5, "inner": value})


def test_bad_arguments(tmp_path):
    net = SampleNet()
    with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
        Decompose({"not": "a model"})
    for name in ("ranks.txt", 3, tmp_path):
        with pytest.raises(ValueError, match="config_file"):
            Decompose(net, name)
    with pytest.raises(ValueError, match="config_file"):
        Decompose(net).from_file()
    with pytest.raises(ValueError, match="config_file"):
        Decompose(net, str(tmp_path / "absent.json")).from_file()
    for excludes in ("fc", [1], {"fc"}):
        with pytest.raises(ValueError, match="excludes"):
            Decompose(net).from_ratio(0.5, excludes=excludes)
    for divisor in (0, -1, 1.5, True, "8"):
        with pytest.raises(ValueError, match="divisor"):
            Decompose(net).from_ratio(0.5, divisor=divisor)
    for table in ({}, [], "fc", None):
        with pytest.raises(ValueError, match="channel_dict"):
            Decompose(net).from_dict(table)
    with pytest.raises(ValueError, match="regular expression"):
        Decompose(net).from_dict({"(": 0.5})
    with pytest.raises(TypeError, match="channel_dict"):
        Decompose(net).from_dict({3: 0.5})
    with pytest.raises(ValueError, match="no layer would become smaller"):
        Decompose(nn.Linear(4, 4)).from_ratio(0.5)


def test_bad_calls():
    with pytest.raises(ValueError, match="from_"):
        Decompose(SampleNet()).decompose_network()
    decomposer = Decompose(SampleNet()).from_ratio(0.5)
    with pytest.raises(InvalidTypeError, match="do_decompose_weight"):
        decomposer.decompose_network(1)
    for value in (True, 1.0, "1"):
        with pytest.raises(InvalidTypeError, match="max_iter"):
            decomposer.decompose_network(max_iter=value)
    with pytest.raises(InvalidValueError, match="max_iter"):
        decomposer.decompose_network(max_iter=-2)
    with pytest.raises(ValueError, match="no batches"):
        decomposer.decompose_network(datasets=[])
    with pytest.raises(TypeError, match="batch 1"):
        decomposer.decompose_network(datasets=[(torch.zeros(1, 7, 7, dtype=int),), 3])
