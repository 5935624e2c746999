"""A small residual network in four stages, open at the input of the last one."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 96, 224)


class Activations(NamedTuple):
    """One pass of the network."""

    middle: Tensor  # [N, WIDTHS[2], 12, 12], input of the last stage
    last: Tensor  # [N, last_width, 6, 6], or 12 x 12 where the last stage keeps the size
    pooled: Tensor  # [N, last_width]


class Network(nn.Module):
    def __init__(self, num_classes: int, last_width: int = WIDTHS[3], last_stride: int = 2) -> None:
        super().__init__()
        stem, *_ = WIDTHS
        self.trunk = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False),  # 48 x 48
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            Block(stem, WIDTHS[0], stride=1),
            Block(WIDTHS[0], WIDTHS[1], stride=2),  # 24 x 24
            Block(WIDTHS[1], WIDTHS[2], stride=2),  # 12 x 12
        )
        self.last_stage = Block(WIDTHS[2], last_width, last_stride)
        self.classifier = nn.Linear(last_width, num_classes)

    def activations(self, images: Tensor) -> Activations:
        middle = self.trunk(images)
        last = self.last_stage(middle)
        return Activations(middle, last, last.mean((-2, -1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [N, num_classes]."""
        logits: Tensor = self.classifier(self.activations(images).pooled)
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)
