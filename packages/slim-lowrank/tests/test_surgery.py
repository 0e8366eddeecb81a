import pytest
import torch
from lowrank_models import Bottleneck, ResNet50
from torch import nn
from torch.nn.utils import parametrizations

from slim_core.errors import InvalidValueError, PlanError
from slim_lowrank import Decompose, Decomposer, count_parameters, merge
from slim_lowrank.layers import find_layers
from slim_lowrank.modules import FactoredLinear


class Tied(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        self.head = nn.Linear(256, 1000, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(256, 256)
        self.two = self.one

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class ResNetStage(nn.Sequential):
    def __init__(self):
        super().__init__(Bottleneck(64, 32, 1), Bottleneck(128, 32, 2))


def reason_of(module, **options):
    net = nn.Sequential(module)
    return next(layer.skip for layer in find_layers(net, **options).values())


@pytest.mark.parametrize("face", ["compatible", "new", "calibrated"])
def test_tied_pair_keeps_one_pair_of_factors(face):
    net = Tied().eval()
    ids = torch.randint(0, 1000, (4, 64))
    if face == "compatible":
        small = Decompose(net).from_fixed(96, divisor=1).decompose_network()
    else:
        decomposer = Decomposer(net, divisor=1)
        if face == "calibrated":
            decomposer.calibrate([ids])
        small, report = decomposer.fixed(96).apply()
        assert sum(layer.params_after for layer in report.layers) == 120_576
    assert count_parameters(small) == 120_576
    weight = small.head.weight
    torch.testing.assert_close(small.embed.weight, weight)
    assert small.head[1].weight is small.embed[0].weight
    small(ids).sum().backward()
    assert small.embed[0].weight.grad is not None
    assert count_parameters(merge(small)) == 256_000
    torch.testing.assert_close(merge(small)(ids), small(ids), rtol=1e-4, atol=1e-4)
    if face != "calibrated":
        best = torch.linalg.svdvals(net.head.weight.detach().double())[96:].norm().item()
        assert (weight - net.head.weight).norm().item() == pytest.approx(best, rel=1e-5)


def test_tied_head_keeps_its_own_bias():
    net = Tied(bias=True)
    small = Decompose(net).from_fixed(96, divisor=1).decompose_network()
    assert torch.equal(small.head.bias, net.head.bias)
    assert count_parameters(small) == 121_576


def test_half_of_a_tied_pair_stays_dense():
    decomposer = Decompose(Tied()).from_fixed(96, excludes=["head"], divisor=1)
    assert count_parameters(decomposer.decompose_network()) == 256_000
    with pytest.raises(PlanError, match="shared"):
        Decomposer(Tied(), exclude=["head"])


def test_tied_linears():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net[2].weight = net[0].weight
    small = Decompose(net).from_fixed(8, divisor=1).decompose_network()
    assert small[0][0].weight is small[2][0].weight
    assert torch.equal(small[2].bias, net[2].bias)
    assert count_parameters(small) == 2 * 8 * 64 + 128
    assert count_parameters(merge(small)) == 64 * 64 + 128


def test_shared_module_is_replaced_everywhere():
    small = Decompose(Shared()).from_fixed(64).decompose_network()
    assert small.one is small.two
    assert count_parameters(small) == 33_024
    assert small(torch.randn(2, 256)).shape == (2, 256)
    merged = merge(small)
    assert merged.one is merged.two


def test_root_module():
    root = nn.Linear(256, 256)
    small = Decompose(root).from_ratio(0.5).decompose_network()
    assert isinstance(small, FactoredLinear)
    assert small(torch.randn(3, 256)).shape == (3, 256)
    assert isinstance(merge(small), nn.Linear)
    new, report = Decomposer(root).ratio(0.5).apply()
    assert isinstance(new, FactoredLinear)
    assert "(model)" in str(report)


def test_attention_still_runs():
    net = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    small, report = Decomposer(net, divisor=1).ratio(0.5).apply()
    assert small(x).shape == x.shape
    with torch.no_grad():
        assert small(x).shape == x.shape  # the fast path reads weights directly
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "MultiheadAttention" in reasons["self_attn.out_proj"]
    assert reasons["linear1"] is None
    compat = Decompose(net).from_ratio(0.5, divisor=1)
    assert "self_attn.out_proj" not in compat.decompose_config
    assert compat.decompose_network()(x).shape == x.shape


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    pass


def test_reasons():
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *args: None)
    assert "forward of its own" in reason_of(Scaled(8, 8))
    assert "parametrized" in reason_of(parametrizations.weight_norm(nn.Linear(8, 8)))
    assert "hooks" in reason_of(hooked)
    assert "grouped" in reason_of(nn.Conv2d(8, 8, 3, groups=2))
    assert "max_norm" in reason_of(nn.Embedding(8, 8, max_norm=1.0))
    assert reason_of(Plain(8, 8)) is None
    wrapped = nn.Linear(8, 8)
    wrapped.forward = lambda x: x
    assert "on the instance" in reason_of(wrapped)
    integers = nn.Linear(8, 8)
    integers.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    assert "floating" in reason_of(integers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 9, 64)).eval()
    x = torch.randn(4, 16, 5, 5)
    exact = Decompose(net).from_ratio(0.5, divisor=1).decompose_network()(x)
    for face in ("compatible", "new"):
        cast = nn.Sequential(*net).to(dtype)
        if face == "compatible":
            small = Decompose(cast).from_ratio(0.5, divisor=1).decompose_network()
        else:
            small, _ = Decomposer(cast, divisor=1, conv="tucker2").ratio(0.5).apply()
        assert {parameter.dtype for parameter in small.parameters()} == {dtype}
        y = small(x.to(dtype))
        assert y.dtype == dtype
        limit = 2**-7 if dtype == torch.bfloat16 else 2**-9
        assert (y.float() - exact).norm() < limit * exact.norm()
    net.float()


def test_flags_are_kept():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    net[0].weight.requires_grad_(False)
    net[0].bias.requires_grad_(True)
    net[1].train()
    small = Decompose(net).from_ratio(0.5, divisor=1).decompose_network()
    assert not small[0].training
    assert small[1].training
    plan = Decomposer(net, divisor=1).calibrate([torch.randn(100, 64)]).ratio(0.5)
    for each in (small, plan.apply()[0], plan.apply(sequential=True)[0]):
        flags = [parameter.requires_grad for parameter in each[0].parameters()]
        assert flags == [False, False, True]
        assert all(parameter.requires_grad for parameter in each[1].parameters())
        assert [part.training for part in (each[0], each[0][1], each[1][0])] == [False, False, True]


GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
    "uneven": {"kernel_size": (1, 7), "stride": (2, 1), "padding": (0, 3)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("form", ["out", "in", "spatial", "tucker2"])
def test_conv_geometry_at_full_rank(geometry, form):
    net = nn.Sequential(nn.Conv2d(6, 5, **geometry)).eval()
    if form == "spatial" and min(net[0].kernel_size) == 1:
        with pytest.raises(InvalidValueError, match="2x2"):
            _forced(net, form, 1)
        return
    x = torch.randn(2, 6, 11, 12)
    full = {"out": 5, "in": 6, "tucker2": (5, 6), "spatial": 6 * net[0].kernel_size[0]}[form]
    if form == "spatial":
        full = min(full, 5 * net[0].kernel_size[1])
    small = _forced(net, form, full)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merge(small)(x), net(x), rtol=1e-4, atol=1e-4)
    calibrated = _forced(net, form, full, calibration=[x])
    torch.testing.assert_close(calibrated(x), net(x), rtol=1e-3, atol=1e-3)


def _forced(net, form, ranks, calibration=None):
    """Decompose at ranks that save nothing, which the rules would refuse."""
    from slim_lowrank.plan import Plan
    from slim_lowrank.table import LayerRanks

    decomposer = Decomposer(net)
    if calibration is not None:
        decomposer.calibrate(calibration)
    layer = decomposer.layers["0"]
    ranks = ranks if isinstance(ranks, tuple) else (ranks,)
    table = {"0": LayerRanks("0", layer.kind, layer.shape, form, ranks, net[0].bias is not None)}
    return Plan(decomposer, table, {}).apply()[0]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(12, 20, 5, stride=2, padding=2), (2, 12, 30)),
        (nn.Conv3d(6, 10, 3, padding=1), (2, 6, 5, 6, 7)),
        (nn.ConvTranspose1d(12, 10, 4, stride=2, padding=1), (2, 12, 9)),
        (nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, output_padding=1), (2, 12, 6, 7)),
        (nn.ConvTranspose3d(6, 8, 2, stride=2), (1, 6, 3, 4, 5)),
    ],
)
def test_other_convolutions(module, shape):
    net = nn.Sequential(module).eval()
    x = torch.randn(shape)
    full = _forced(net, "out", module.out_channels)
    torch.testing.assert_close(full(x), net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merge(full)(x), net(x), rtol=1e-4, atol=1e-4)
    plain, _ = Decomposer(net, divisor=1, conv="out").ratio(0.5).apply()
    aware, report = Decomposer(net, divisor=1).calibrate([x]).ratio(0.5).apply(measure_on=[x])
    assert count_parameters(aware) < count_parameters(net)
    assert (aware(x) - net(x)).norm() < (plain(x) - net(x)).norm()
    (line,) = report.layers
    assert line.measured_error == pytest.approx(line.predicted_error, rel=1e-3)


def test_uneven_kernels_keep_their_share():
    for kernel in ((1, 7), (7, 1)):
        net = nn.Sequential(nn.Conv2d(64, 64, kernel, bias=False))
        decomposer = Decompose(net).from_ratio(0.5, divisor=1)
        assert decomposer.decompose_config == {"0": (37, 37)}
        share = count_parameters(decomposer.decompose_network()) / count_parameters(net)
        assert share == pytest.approx(0.5, abs=0.02)


def test_grouped_and_depthwise_are_skipped_and_run():
    net = nn.Sequential(nn.Conv2d(128, 128, 3, groups=2), nn.Conv2d(128, 128, 3, groups=128))
    net.append(nn.Conv2d(128, 128, 3))
    small = Decompose(net).from_ratio(0.5, divisor=1).decompose_network()
    assert small(torch.randn(1, 128, 9, 9)).shape == (1, 128, 3, 3)
    assert isinstance(small[0], nn.Conv2d)
    assert not isinstance(small[2], nn.Conv2d)


@pytest.mark.parametrize(("share", "params"), [(0.5, 12_784_417), (0.25, 6_270_113)])
def test_resnet50_with_svd_of_1x1(share, params):
    net = ResNet50().eval()
    plan = Decomposer(net, divisor=16, conv="tucker2").ratio(share)
    with torch.device("meta"):
        meta = plan.structure(ResNet50())
    assert count_parameters(meta) == params
    for entry in plan.table.values():
        assert all(
            rank <= channels for rank, channels in zip(entry.ranks, entry.shape, strict=False)
        )


def test_table_for_another_model(tmp_path):
    path = tmp_path / "ranks.json"
    Decomposer(nn.Sequential(nn.Linear(64, 64)), divisor=1).ratio(0.5).save(path)
    with pytest.raises(InvalidValueError, match="'0' is a linear of shape"):
        Decomposer(nn.Sequential(nn.Linear(64, 32)), divisor=1).load(path)
    with pytest.raises(InvalidValueError, match="names '0'"):
        Decomposer(nn.ModuleDict({"fc": nn.Linear(64, 64)})).load(path)
    same, _ = Decomposer(nn.Sequential(nn.Linear(64, 64)), divisor=1).load(path).apply()
    assert same[0][0].out_features == 16


def test_table_and_state_round_trip(tmp_path):
    net = ResNetStage().eval()
    x = torch.randn(1, 64, 8, 8)
    plan = Decomposer(net, divisor=4).ratio(0.5)
    small, _ = plan.apply()
    plan.save(tmp_path / "ranks.json")
    with torch.device("meta"):
        other = Decomposer(ResNetStage(), divisor=4).load(tmp_path / "ranks.json")
        shell = other.structure(ResNetStage())
    assert all(parameter.is_meta for parameter in shell.parameters())
    shell.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(shell.eval()(x), small(x))
