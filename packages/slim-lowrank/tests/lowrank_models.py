"""Models that the tests share, written from the published architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleNet(nn.Module):
    """Embedding, Linear and Conv2d layers; 1,038,346 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 64))
        self.feature = nn.Sequential(
            nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 1), nn.ReLU()
        )
        self.inner = nn.Linear(1600, 512)
        self.classifier = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 10))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids ``(batch, 7, 7)`` to scores ``(batch, 10)``."""
        x = self.embedding(ids).permute(0, 3, 1, 2)
        x = self.feature(x).flatten(1)
        return self.classifier(torch.relu(self.inner(x)))


class Bottleneck(nn.Module):
    """Residual block of ResNet-50: 1x1, 3x3, 1x1."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + identity)


class ResNet50(nn.Module):
    """He et al. 2016, version with the stride in the 3x3; 25,557,032 parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for index, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            blocks = []
            for block in range(count):
                stride = 2 if block == 0 and index > 0 else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))
