# SPDX-License-Identifier: Apache-2.0
"""Trains the Fashion-MNIST MLPs: plainly with ReLU, or with PReLUs under the LayerCollapse regularizer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.fashion_data import Images
from onnxcollapse.training import (
    OneParameterPReLU,
    Schedule,
    activations,
    alpha_report,
    collapse_penalty,
    parameter_groups,
    swap_activations,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training set.
        batch: images a step.
        lr: AdamW's highest learning rate (one cycle).
        alpha_lr: the alphas' own.
        weight_decay: of all parameters but the alphas.
        collapse: which activations are driven to the identity, counted from 0; none for a ReLU network.
        strength: the regularizer's lc over the run.
    """

    epochs: int = 8
    batch: int = 256
    lr: float = 1e-3
    alpha_lr: float = 1e-2
    weight_decay: float = 0.02
    collapse: tuple[int, ...] = ()
    strength: Schedule = field(default_factory=lambda: Schedule(peak=1.0, start=0.1, end=0.5))


def train(widths: tuple[int, ...], images: Images, recipe: Recipe, seed: int) -> nn.Sequential:
    """A trained MLP: Linear, activation, ..., Linear.

    Args:
        widths: of the input, the hidden layers and the output.
        images: the training set.
        recipe: how to train.
        seed: of the weights and of the order of the images.
    """
    torch.manual_seed(seed)
    network = _mlp(widths)
    if recipe.collapse:
        swap_activations(network, lambda _, child: isinstance(child, nn.ReLU), alpha=0.0)
    optimizer = torch.optim.AdamW(
        parameter_groups(network, recipe.weight_decay, recipe.alpha_lr), lr=recipe.lr
    )
    steps = recipe.epochs * (len(images.pixels) // recipe.batch)
    peaks = [group["lr"] for group in optimizer.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.2)
    chosen = [
        activation for index, (_, activation) in enumerate(activations(network)) if index in recipe.collapse
    ]
    for step, (inputs, labels) in enumerate(_batches(images, recipe, seed)):
        loss = functional.cross_entropy(network(inputs), labels)
        if chosen:
            loss = loss + recipe.strength(step / steps) * collapse_penalty(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if (step + 1) % (steps // recipe.epochs) == 0:
            _report(network, loss.item(), (step + 1) * recipe.epochs // steps)
    return network.eval()


def weights(network: nn.Sequential) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[float] | None]:
    """Each Linear's weight [out, in] and bias [out], rounded to fp16, and the PReLUs' alphas if any."""
    layers = [
        (child.weight.detach().numpy().astype(np.float16), child.bias.detach().numpy().astype(np.float16))
        for child in network
        if isinstance(child, nn.Linear)
    ]
    alphas = [child.alpha.item() for child in network if isinstance(child, OneParameterPReLU)]
    return layers, alphas or None


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _batches(images: Images, recipe: Recipe, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    inputs, labels = torch.from_numpy(images.inputs()), torch.from_numpy(images.labels.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(order) // recipe.batch * recipe.batch].split(recipe.batch):
            yield inputs[rows], labels[rows]


def _report(network: nn.Module, loss: float, epoch: int) -> None:
    alphas = " ".join(f"{row.alpha:.4f}" for row in alpha_report(network))
    _LOG.info("epoch %d, loss %.3f%s", epoch, loss, f", alpha {alphas}" if alphas else "")
