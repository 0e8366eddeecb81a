import pytest
import torch
from lowrank_models import SampleNet
from torch import nn
from torch.nn import functional as F

from slim_core.errors import (
    CalibrationError,
    InvalidTypeError,
    InvalidValueError,
    NumericalError,
    PatternError,
    PlanError,
)
from slim_lowrank import Budget, Decomposer, count_parameters
from slim_lowrank.calibrate import collect
from slim_lowrank.trust import SHARES


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1] if isinstance(batch, list) else output.argmax(-1))


def skewed(count, width, decay=1.0):
    """Inputs of decaying spectrum, away from zero, through a ReLU."""
    scales = torch.arange(1, width + 1) ** (-decay / 2)
    x = torch.randn(count, width) * scales + 0.3
    rotation = torch.linalg.qr(torch.randn(width, width))[0]
    return torch.relu(x @ rotation)


@torch.no_grad()
def errors_of(small, net, x):
    return float((small(x) - net(x)).norm() / net(x).norm())


def images(count):
    """Images of correlated channels and pixels."""
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("bihw,io->bohw", torch.randn(count, 16, 10, 10), mix)
    return F.avg_pool2d(mixed, 3, 1)


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 24),
    ).eval()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
def test_bias_correction(shape):
    out, inp = shape
    x = skewed(6000, inp)
    train, test = x[:4000], x[4000:]
    net = nn.Sequential(nn.Linear(inp, out))
    bare = nn.Sequential(nn.Linear(inp, out, bias=False))
    with torch.no_grad():
        bare[0].weight.copy_(net[0].weight)
        net[0].bias.zero_()
    fixed, report = Decomposer(net, divisor=1).calibrate([train]).fixed(64).apply(measure_on=[test])
    kept, _ = Decomposer(bare, divisor=1).calibrate([train]).fixed(64).apply()
    assert errors_of(fixed, net, test) <= errors_of(kept, bare, test)
    mean = (fixed(train) - net(train)).mean(0).detach()
    assert float(mean.abs().max()) < 1e-5
    (line,) = report.layers
    assert line.measured_error == pytest.approx(errors_of(fixed, net, test), rel=1e-4)
    assert line.predicted_error == pytest.approx(errors_of(fixed, net, train), rel=1e-3)
    added, _ = Decomposer(bare, divisor=1, bias="add").calibrate([train]).fixed(64).apply()
    torch.testing.assert_close(added(test), fixed(test), rtol=1e-4, atol=1e-5)


def test_too_few_positions_are_refused_and_none_named():
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    few = Decomposer(net, divisor=1).calibrate([torch.randn(100, 512)])
    small, _ = few.fixed(64).apply()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in small.parameters())
    with pytest.raises(CalibrationError, match="layer '0' saw 100 positions"):
        few.fixed(128)
    with pytest.raises(CalibrationError, match="layer '0'"):
        Decomposer(net).calibrate([torch.zeros(0, 512)])


def test_unreached_layers_and_bad_data_are_named():
    net = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    net.forward = lambda x: net["used"](x)
    with pytest.raises(CalibrationError, match="'idle'"):
        Decomposer(net).calibrate([torch.randn(4, 8)])
    with pytest.raises(NumericalError, match="'used'"):
        Decomposer(net, exclude=["idle"]).calibrate([torch.full((4, 8), torch.nan)])
    for data in ([], iter(())):
        with pytest.raises(CalibrationError, match="no batches"):
            Decomposer(net).calibrate(data)
    for data in ("text", 3, {"x": 1}):
        with pytest.raises(InvalidTypeError, match="iterable of batches"):
            Decomposer(net).calibrate(data)
    with pytest.raises(InvalidTypeError, match="batch 0"):
        Decomposer(net).calibrate(["text"])


def test_calibration_leaves_the_model_alone():
    net = Classifier().train()
    net.net[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Decomposer(net).calibrate([torch.randn(8, 64)], loss=cross_entropy)
    assert net.training
    assert not net.net[0].weight.requires_grad
    assert net.net[2].weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.net[0]._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_failing_forward_removes_the_hooks():
    net = Classifier()
    with pytest.raises(RuntimeError):
        Decomposer(net).calibrate([torch.randn(8, 3)])
    assert not net.net[0]._forward_hooks
    assert not net.net[0]._forward_pre_hooks


def test_masked_tokens_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.fc(x)

    net, x = Masked(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = Decomposer(net, divisor=1).calibrate([{"x": x, "attention_mask": mask}])
    rows = x[mask.bool()].double().numpy()
    seen = masked.statistics["fc"]
    assert seen.rows == 8
    assert seen.input_second == pytest.approx(rows.T @ rows / 8, abs=1e-6)


def test_gradients_match_autograd():
    net = Classifier()
    x = torch.randn(32, 64)
    decomposer = Decomposer(net).calibrate([x], loss=lambda out, _: out.square().sum())
    hidden = net.net[:3](x)
    expected = torch.autograd.grad(net.net[3:](hidden).square().sum(), hidden)[0].double()
    entry = decomposer.statistics["net.2"]
    assert entry.gradient == pytest.approx(float(entry.gamma.trace()) / 96, rel=1e-6)
    gamma = entry.gamma
    assert gamma == pytest.approx((expected.T @ expected).numpy(), rel=1e-4, abs=1e-4)


def test_gradients_can_serve_the_budget_alone():
    net = Classifier().eval()
    x = skewed(2000, 64)
    both = Decomposer(net, divisor=1).calibrate([x], loss=cross_entropy, method="output")
    assert both.method == "output"
    bare = Decomposer(net, divisor=1).calibrate([x])
    first, last = both.ratio(0.5).apply()[0], bare.ratio(0.5).apply()[0]
    torch.testing.assert_close(first(x), last(x))
    by_gradient, by_energy = both.budget(0.5), both.budget(Budget(0.5, sensitivity="energy"))
    assert by_gradient.table != by_energy.table
    assert by_energy.table == bare.budget(0.5).table
    with pytest.raises(InvalidValueError, match="needs a loss"):
        Decomposer(net).calibrate([x], method="loss")


def drifting(count, decay, drift):
    """Inputs whose energy wanders over the directions from the first row to the last."""
    scales = torch.arange(1, 97) ** -decay
    steps = torch.linspace(0, drift, count).long()
    rows = torch.randn(count, 96) * torch.stack([scales.roll(int(step)) for step in steps])
    return rows @ torch.linalg.qr(torch.randn(96, 96)).Q


def test_shrinkage_goes_from_the_calibration_to_the_plain_weight():
    torch.manual_seed(0)
    net = nn.Linear(96, 96, bias=False)
    steady, wandering = drifting(4000, 1.0, 0), drifting(4000, 0.5, 40)

    def decomposed(data, **options):
        return Decomposer(net, divisor=1).calibrate([data], **options).fixed(24).apply()[0]

    def weight(model):
        return model[1].weight @ model[0].weight

    plain = Decomposer(net, divisor=1).fixed(24).apply()[0]
    torch.testing.assert_close(
        weight(decomposed(steady, shrinkage=1e6)), weight(plain), atol=1e-3, rtol=0
    )
    shares = {}
    for name, data in (("steady", steady), ("wandering", wandering)):
        calibrated = Decomposer(net, divisor=1).calibrate(data.split(500), shrinkage="auto")
        entry = calibrated.statistics[""]
        assert entry.first_half is None  # not kept once the choice is made
        shares[name] = entry.shrinkage
    assert shares["steady"] < shares["wandering"] == max(SHARES)
    for wrong, error in ((-0.1, InvalidValueError), ("most", InvalidTypeError)):
        with pytest.raises(error, match="shrinkage"):
            Decomposer(net).calibrate([steady], shrinkage=wrong)


def test_first_half_of_the_batches():
    """Whatever the batches: half of the positions, the first ones, and the middle batch shared."""
    net = nn.Linear(8, 8)
    x = torch.randn(90, 8)
    for sizes in ([90], [45, 45], [30, 30, 30], [10] * 9):
        entry = collect(net, [""], x.split(sizes), halves=True)[""]
        assert entry.first_rows == 45
        torch.testing.assert_close(entry.first_half, x[:45].T @ x[:45])


def test_wide_outputs_keep_a_scalar_gradient(monkeypatch):
    from slim_lowrank import watch

    monkeypatch.setattr(watch, "GRADIENT_LIMIT", 50)
    net = Classifier().eval()
    decomposer = Decomposer(net, divisor=1).calibrate([skewed(500, 64)], loss=cross_entropy)
    assert decomposer.statistics["net.0"].gamma is None
    assert decomposer.statistics["net.0"].gradient > 0
    assert decomposer.statistics["net.4"].gamma is not None
    assert decomposer.budget(0.5).apply()[1].method == "loss"


def test_budget_is_met_from_below_and_beats_uniform():
    net = Classifier().eval()
    x, test = skewed(5000, 64).split([4000, 1000])
    losses = {}
    for share in (0.8, 0.6, 0.4):
        decomposer = Decomposer(net, divisor=1).calibrate([x], loss=cross_entropy)
        plan = decomposer.budget(Budget(params=share))
        dense = 64 * 96 + 96 * 96 + 96 * 10
        kept = dense - sum(entry.dense_params - entry.params for entry in plan.table.values())
        assert share - 0.01 <= kept / dense <= share
        for title, found in (
            ("budget", plan),
            ("uniform", Decomposer(net, divisor=1).ratio(share)),
        ):
            small, _ = found.apply()
            logs = [F.log_softmax(model(test), -1) for model in (net, small)]
            lost = F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
            losses[title, share] = float(lost.detach())
        assert losses["budget", share] < losses["uniform", share]


@pytest.mark.parametrize("unit", ["params", "flops", "bytes"])
def test_units(unit):
    net = small_cnn()
    decomposer = Decomposer(net, divisor=1).calibrate([images(600)])
    plan = decomposer.budget(Budget(**{unit: 0.5}))
    before = after = 0.0
    for layer, candidates in decomposer._candidates():
        cost = decomposer._cost(unit, layer, candidates)
        before += cost(None)
        after += cost(plan.table.get(layer.name))
    assert 0.48 * before <= after <= 0.5 * before  # kernels have a coarse choice of ranks
    assert plan.apply()[0](images(2)).shape == (2, 24)


def test_flops_count_positions():
    net = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1))
    decomposer = Decomposer(net, divisor=1).calibrate([torch.randn(2, 8, 8, 8)])
    ((_, candidates),) = decomposer._candidates()
    assert candidates.flops(None) == 16 * 8 * 9 * 2 * 16
    forms = {form: candidates._at(form, 4) for form in ("out", "in", "spatial", "tucker2")}
    assert candidates.flops(forms["out"]) == (4 * 72 + 16 * 4) * 32
    assert candidates.flops(forms["in"]) == 8 * 4 * 128 + 4 * 9 * 16 * 32
    assert candidates.flops(forms["spatial"]) == 8 * 4 * 3 * 64 + 4 * 16 * 3 * 32
    assert candidates.flops(forms["tucker2"]) == 8 * 4 * 128 + (16 * 9 + 64) * 32


def test_conv_form_is_chosen_by_predicted_error():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval()
    vertical = torch.randn(32, 4, 3, 1) @ torch.randn(1, 1, 1, 3)
    with torch.no_grad():
        net[0].weight.copy_(torch.einsum("orhw,ri->oihw", vertical, torch.randn(4, 32)))
        net[0].weight.add_(torch.randn(32, 32, 3, 3), alpha=0.05)
    x = torch.randn(8, 32, 10, 10)
    errors = {}
    for conv in ("auto", "out", "in", "spatial", "tucker2"):
        decomposer = Decomposer(net, divisor=1, conv=conv).calibrate([x])
        _, report = decomposer.ratio(0.3).apply(measure_on=[x])
        (line,) = report.layers
        assert line.measured_error == pytest.approx(line.predicted_error, rel=0.01)
        assert line.params_after <= 0.33 * line.params_before
        errors[conv] = line.measured_error
        assert conv in ("auto", line.form)
    assert errors["auto"] == min(errors.values())


def test_pivot_storage_keeps_more_for_the_same_parameters():
    net = nn.Sequential(nn.Linear(64, 96)).eval()
    x = skewed(2000, 64)
    errors = {}
    for storage in ("factors", "pivot"):
        small, report = (
            Decomposer(net, divisor=1, storage=storage).calibrate([x]).ratio(0.5).apply()
        )
        assert report.layers[0].params_after <= 0.5 * 64 * 96
        assert report.layers[0].params_after == count_parameters(small) - 96
        errors[storage] = errors_of(small, net, x)
    assert errors["pivot"] < errors["factors"]


def test_energy_and_vbmf_and_mapping():
    net = Classifier()
    plan = Decomposer(net, divisor=1).energy(0.9)
    for name, entry in plan.table.items():
        s = torch.linalg.svdvals(net.get_submodule(name).weight.detach()).square()
        assert s[: entry.ranks[0]].sum() >= 0.9 * s.sum() > s[: entry.ranks[0] - 1].sum()
    assert all(entry.ranks == (1,) for entry in Decomposer(net, divisor=1).vbmf().table.values())
    table = Decomposer(net, divisor=1).mapping({"net.0": 0.5, "net.*": 7}).table
    assert {name: entry.ranks[0] for name, entry in table.items()} == {
        "net.0": 19,
        "net.2": 7,
        "net.4": 7,
    }
    with pytest.raises(PatternError, match="missing"):
        Decomposer(net).mapping({"missing": 0.5})


def test_selection():
    net = Classifier()
    assert list(Decomposer(net, exclude=["net.4"], divisor=1).ratio(0.5).table) == [
        "net.0",
        "net.2",
    ]
    assert list(Decomposer(net, include=["*.2"], divisor=1).ratio(0.5).table) == ["net.2"]
    assert list(Decomposer(net, protect_ends=True, divisor=1).ratio(0.5).table) == ["net.2"]
    _, report = Decomposer(net, exclude=["net.4"], divisor=1).ratio(0.5).apply()
    assert report.layers[2].reason == "excluded"
    with pytest.raises(PatternError, match=r"net\.9"):
        Decomposer(net, exclude=["net.9"])
    with pytest.raises(PlanError, match="excluded"):
        Decomposer(net, exclude=["*"])


def test_sequential_makes_up_for_earlier_errors():
    net = Classifier().eval()
    x, test = skewed(5000, 64).split([4000, 1000])
    decomposer = Decomposer(net, divisor=1).calibrate([x])
    one_shot, _ = decomposer.ratio(0.4).apply()
    compensated, report = decomposer.ratio(0.4).apply(sequential=True)
    assert errors_of(compensated, net, test) < errors_of(one_shot, net, test)
    assert report.sequential
    last = report.layers[-1]
    with torch.no_grad():
        wanted = net(x)
        lost = (compensated(x) - wanted).norm() / (wanted - net.net[4].bias).norm()
    assert last.predicted_error == pytest.approx(float(lost), rel=1e-3)


def test_sequential_does_not_fit_noise():
    """With hardly more positions than channels, compensation must not hurt."""
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    train, test = torch.randn(800, 256).split([300, 500])
    plan = Decomposer(net, divisor=1).calibrate([train]).ratio(0.5)
    one_shot, _ = plan.apply()
    compensated, _ = plan.apply(sequential=True)
    assert errors_of(compensated, net, test) < 1.02 * errors_of(one_shot, net, test)


def test_sequential_through_convolutions():
    net = small_cnn()
    train, test = images(600), images(200)
    plan = Decomposer(net, divisor=1, conv="auto").calibrate([train]).ratio(0.3)
    one_shot, _ = plan.apply()
    compensated, _ = plan.apply(sequential=True)
    assert errors_of(compensated, net, test) < errors_of(one_shot, net, test)


def test_inplace():
    net = Classifier().eval()
    x = torch.randn(200, 64)
    copy, _ = Decomposer(net, divisor=1).calibrate([x]).ratio(0.5).apply(sequential=True)
    plan = Decomposer(net, divisor=1).calibrate([x]).ratio(0.5)
    same, report = plan.apply(inplace=True, sequential=True, measure_on=[x])
    assert same is net
    torch.testing.assert_close(net(x), copy(x))
    assert all(line.measured_error > 0 for line in report.layers)


def test_sequential_needs_calibration():
    with pytest.raises(CalibrationError, match="calibrate"):
        Decomposer(Classifier(), divisor=1).ratio(0.5).apply(sequential=True)


def test_report_adds_up(tmp_path):
    net = Classifier()
    small, report = Decomposer(net, divisor=1).ratio(0.5).apply()
    assert report.params_before == count_parameters(net)
    assert report.params_after == count_parameters(small)
    saved = sum(line.params_before - line.params_after for line in report.layers)
    assert saved == report.params_before - report.params_after
    report.save(tmp_path / "report.json")
    assert "3 of 3 layers decomposed (plain)" in str(report)


def test_gradient_free_losses_fall_back_with_a_note():
    net = Classifier()
    decomposer = Decomposer(net).calibrate([torch.randn(40, 64)], loss=lambda *_: torch.zeros(()))
    assert decomposer.method == "output"
    assert "no gradients" in decomposer.ratio(0.9).apply()[1].notes[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, InvalidValueError),
        ({"params": 0.5, "bytes": 0.5}, InvalidValueError),
        ({"params": 1.0}, InvalidValueError),
        ({"params": 0}, InvalidValueError),
        ({"params": "half"}, InvalidTypeError),
        ({"params": 0.5, "sensitivity": "magic"}, InvalidValueError),
        ({"params": 0.5, "floor": 2.0}, InvalidValueError),
    ],
)
def test_bad_budgets(options, error):
    with pytest.raises(error):
        Budget(**options)


def test_bad_arguments():
    net = Classifier()
    with pytest.raises(InvalidTypeError, match="model"):
        Decomposer("net")
    for options in ({"divisor": 0}, {"storage": "zip"}, {"conv": "magic"}, {"bias": "maybe"}):
        with pytest.raises(InvalidValueError, match=next(iter(options))):
            Decomposer(net, **options)
    for options in ({"include": "net"}, {"exclude": [1]}, {"protect_ends": 1}):
        with pytest.raises(InvalidTypeError, match=next(iter(options))):
            Decomposer(net, **options)
    with pytest.raises(PlanError, match="below the least possible cost"):
        Decomposer(net, divisor=64).budget(0.01)
    with pytest.raises(PlanError, match="does not go with"):
        Decomposer(net).budget(Budget(params=0.5, sensitivity="gradient"))
    with pytest.raises(PlanError, match="image size"):
        Decomposer(SampleNet()).budget(Budget(flops=0.5))
    for share in (0.0, 1.0, "half"):
        with pytest.raises((InvalidValueError, InvalidTypeError), match="share"):
            Decomposer(net).ratio(share)
