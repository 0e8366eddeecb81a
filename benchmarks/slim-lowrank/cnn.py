"""A small residual network: accuracy after decomposition, and after a little fine-tuning.

    python benchmarks/slim-lowrank/cnn.py

Trains on generated images (oriented gratings with noise and a distracting second grating, 12
classes), keeps 50 and 20 % of the weights of all convolutions but the first, and fine-tunes each
result for one pass over 1024 of the training images.
"""

# ruff: noqa: E402 - the number of threads is read when BLAS is loaded

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slim_core.files import write_json
from slim_lowrank import Budget, Decompose, Decomposer, count_parameters

RESULTS = Path(__file__).parent / "results"
CLASSES, SIZE = 12, 24
SHARES = (0.5, 0.2)
TUNING = 1024  # images


def gratings(angle: Tensor, frequency: Tensor) -> Tensor:
    """Return images ``(n, SIZE, SIZE)`` of waves of random phase."""
    grid = torch.linspace(-1, 1, SIZE)
    along = angle.cos()[:, None, None] * grid[:, None] + angle.sin()[:, None, None] * grid
    phase = 2 * math.pi * torch.rand(len(angle), 1, 1)
    return torch.sin(2 * math.pi * frequency[:, None, None] * along + phase)


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images ``(count, 3, SIZE, SIZE)`` and labels: 6 orientations by 2 frequencies."""
    torch.manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,))
    signal = gratings((labels % 6) * math.pi / 6, 2.0 + 1.5 * (labels // 6))
    other = gratings(math.pi * torch.rand(count), 1.0 + 4 * torch.rand(count))
    colour = torch.rand(count, 3, 1, 1) + 0.3
    mixed = colour * signal[:, None] + 0.6 * torch.rand(count, 3, 1, 1) * other[:, None]
    return mixed + 1.6 * torch.randn(count, 3, SIZE, SIZE), labels


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(inp, out, 1, stride, bias=False) if inp != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map images to activations or scores."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class SmallResNet(nn.Module):
    """Three stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, inp = [], 16
        for out, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            blocks.append(Block(inp, out, stride))
            inp = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to activations or scores."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def train(net: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rate: float) -> None:
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(data[0]) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data[0]))[: len(data[0]) // 64 * 64].view(-1, 64):
            optimiser.zero_grad()
            F.cross_entropy(net(data[0][index]), data[1][index]).backward()
            optimiser.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    found = torch.cat([net(part).argmax(1) for part in data[0].split(256)])
    return float((found == data[1]).double().mean())


def methods(net: nn.Module, batches: Any) -> dict[str, Callable[[float], nn.Module]]:
    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, labels[id(batch[0])])

    labels = {id(x): y for x, y in batches}
    inputs = [(x,) for x, _ in batches]
    choices: dict[str, Any] = {"exclude": ["stem", "fc"], "divisor": 1}
    plain = Decomposer(net, **choices)
    output = Decomposer(net, **choices).calibrate(inputs)
    lossy = Decomposer(net, **choices).calibrate(inputs, loss=loss)
    compatible = Decompose(net)

    def face(share: float) -> Decompose:
        return compatible.from_ratio(share, excludes=["stem", "fc"], divisor=1)

    return {
        "Decompose, Tucker-2": lambda share: face(share).decompose_network(),
        "plain, best form": lambda share: plain.ratio(share).apply()[0],
        "Decompose with data": lambda share: face(share).decompose_network(datasets=inputs),
        "output, best form": lambda share: output.ratio(share).apply()[0],
        "loss, budget": lambda share: lossy.budget(Budget(params=share)).apply()[0],
        "loss, budget, sequential": lambda share: lossy.budget(share).apply(sequential=True)[0],
    }


def main() -> None:
    torch.set_num_threads(1)
    data, test = make_images(4096, 1), make_images(2048, 2)
    torch.manual_seed(0)
    net = SmallResNet()
    train(net, data, epochs=4, rate=4e-3)
    dense = accuracy(net, test)
    print(f"dense: {count_parameters(net):,} parameters, accuracy {dense:.4f}", flush=True)
    batches = [(data[0][i : i + 64], data[1][i : i + 64]) for i in range(0, 512, 64)]
    rows = []
    for title, method in methods(net, batches).items():
        for share in SHARES:
            small = method(share)
            row = {"method": title, "kept": share, "parameters": count_parameters(small)}
            row["accuracy"] = accuracy(small, test)
            tuned = copy.deepcopy(small)
            train(tuned, (data[0][:TUNING], data[1][:TUNING]), epochs=1, rate=1e-3)
            row["fine_tuned"] = accuracy(tuned, test)
            rows.append(row)
            print(
                f"{title:26} {share:.0%} {row['parameters']:7,} {row['accuracy']:.4f} "
                f"-> {row['fine_tuned']:.4f}",
                flush=True,
            )
    result = {
        "command": "python benchmarks/slim-lowrank/cnn.py",
        "torch": torch.__version__,
        "dense": {"parameters": count_parameters(net), "accuracy": dense},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "cnn.json", result, 0o644)


if __name__ == "__main__":
    main()
