# SPDX-License-Identifier: Apache-2.0
"""The torch networks of the Fashion-MNIST recipes; what is written here is part of their caches' key."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from models.fashion_data import CLASSES, SIDE

POOL = 0  # among the channels of `vgg`: a MaxPool
HEAD_WIDTH = 16


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Flatten, Linear, ReLU, ..., Linear; `widths` are of the input, the hidden layers and the output."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg(channels: Sequence[int], hidden: Sequence[int], side: int = SIDE) -> nn.Sequential:
    """Conv3x3-BatchNorm-ReLU and 2x2 MaxPool, then an MLP, on [batch, 1, side, side].

    Args:
        channels: of the convolutions in order, with `POOL` where a MaxPool stands.
        hidden: widths of the dense head's hidden layers.
        side: height and width of the images.
    """
    layers: list[nn.Module] = []
    depth = 1
    for count in channels:
        if count == POOL:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        else:
            layers += [nn.Conv2d(depth, count, 3, padding=1, bias=False), nn.BatchNorm2d(count), nn.ReLU()]
            depth = count
    return nn.Sequential(*layers, *mlp((depth * side * side, *hidden, CLASSES)))


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer on [batch, 1, side, side]: the classes are read off the patches' mean.

    Reshapes name every size but the batch's, so that an export has no shape arithmetic.

    Attributes:
        width: of the residual stream.
        tokens: patches an image.
        blocks: the layers.
    """

    def __init__(self, depth: int, width: int, patch: int, side: int = SIDE) -> None:
        super().__init__()
        self.width, self.tokens = width, (side // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(self.tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(self.tokens, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits [batch, classes] of images [batch, 1, side, side]."""
        patches = self.patches(images).reshape(-1, self.width, self.tokens).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.positions)).mean(1))


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with four times the width and the exact (erf) GELU."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.split = (-1, tokens, width // HEAD_WIDTH, HEAD_WIDTH)
        self.joined = (-1, tokens, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.reshape(self.split).transpose(1, 2) for part in self.qkv(x).split(self.joined[-1], -1)
        )
        weights = (q * HEAD_WIDTH**-0.5 @ k.transpose(2, 3)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(self.joined))
