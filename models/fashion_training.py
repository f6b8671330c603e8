# SPDX-License-Identifier: Apache-2.0
"""Trains the Fashion-MNIST networks: plainly, or with PReLUs under the LayerCollapse regularizer.

All training is on one thread, so that the number of cores changes neither a digit nor a neighbour's job.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models import fashion_networks, recipe
from models.fashion_data import Images
from models.fetch import cache_folder
from onnxcollapse.training import (
    OneParameterPReLU,
    Schedule,
    activations,
    alpha_report,
    collapse_penalty,
    parameter_groups,
    swap_activations,
)

Network = TypeVar("Network", bound=nn.Module)

_LOG = logging.getLogger(__name__)
_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training set, at most.
        batch: images a step.
        lr: AdamW's highest learning rate (one cycle), or SGD's constant one.
        alpha_lr: the alphas' own.
        weight_decay: of all parameters but the alphas.
        collapse: which activations are driven to the identity, counted from 0; none for a ReLU network.
        strength: the regularizer's lc over the run.
        momentum: SGD with this momentum in place of AdamW.
        softmax: whether the loss, which has a softmax of its own, is given probabilities for logits.
        validation: training images kept back to see when to stop.
        patience: epochs without a better accuracy on those after which to stop.
    """

    epochs: int = 8
    batch: int = 256
    lr: float = 1e-3
    alpha_lr: float = 1e-2
    weight_decay: float = 0.02
    collapse: tuple[int, ...] = ()
    strength: Schedule = field(default_factory=lambda: Schedule(peak=1.0, start=0.1, end=0.5))
    momentum: float | None = None
    softmax: bool = False
    validation: int = 0
    patience: int = 3


PUBLISHED_LINEARITY = Recipe(  # the Fashion-MNIST network of the code published with arXiv 2506.21146
    epochs=20, batch=32, lr=5e-3, weight_decay=0.0, momentum=0.9, softmax=True, validation=10_000, patience=3
)


def train(widths: tuple[int, ...], images: Images, how: Recipe, seed: int) -> nn.Sequential:
    """A trained MLP: Linear, activation, ..., Linear.

    Args:
        widths: of the input, the hidden layers and the output.
        images: the training set.
        how: the way to train it.
        seed: of the weights and of the order of the images.
    """
    torch.manual_seed(seed)
    network = fashion_networks.mlp(widths)
    if how.collapse:
        swap_activations(network, lambda _, child: isinstance(child, nn.ReLU), alpha=0.0)
    fit(network, images, how, seed)
    return network


def trained(name: str, make: Callable[[], Network], images: Images, how: Recipe, seed: int) -> Network:
    """A network trained now, or the same one from the cache.

    The cache's key is made of the untrained network (its sizes and its first weights), of `how`, the seed, the
    images and the code of this module and `fashion_networks` without comments and docstrings.

    Args:
        name: what the file in the cache is called by.
        make: builds the network; called with torch's seed set.
        images: the training set.
        how: the way to train it.
        seed: of the weights and of the order of the images.
    """
    torch.manual_seed(seed)
    network = make()
    place = cache_folder() / "trained" / f"{name}-{_key(network, images, how, seed)}.npz"
    if place.exists():
        _LOG.info("weights from %s", place)
        arrays = recipe.read_npz(place)
        network.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    else:
        fit(network, images, how, seed)
        recipe.write_npz(place, {key: value.numpy() for key, value in network.state_dict().items()})
    return network.eval()


def fit(network: nn.Module, images: Images, how: Recipe, seed: int) -> None:
    """Trains a network in place and leaves it in evaluation mode.

    Args:
        network: takes images [batch, 1, side, side].
        images: the training set.
        how: the way to train it.
        seed: of the order of the images and of what is kept back.
    """
    images, kept = images.split(how.validation, seed) if how.validation else (images, images)
    optimizer, cycle = _optimizer(network, how, how.epochs * (len(images.pixels) // how.batch))
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    with one_thread():
        for epoch in range(how.epochs):
            network.train()
            for share, inputs, labels in _batches(images, how.batch, generator):
                loss = _loss(network, inputs, labels, how, (epoch + share) / how.epochs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if cycle is not None:
                    cycle.step()
            network.eval()
            _report(network, loss.item(), epoch + 1)
            if how.validation:
                accuracies.append(accuracy(network, kept))
                _LOG.info("accuracy on images kept back %.4f", accuracies[-1])
                if len(accuracies) - 1 - accuracies.index(max(accuracies)) >= how.patience:
                    break


def accuracy(network: nn.Module, images: Images) -> float:
    """The share of images that a network classes right."""
    inputs = torch.from_numpy(images.squares())
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in inputs.split(_EVALUATION_BATCH)])
    return float((found.numpy() == images.labels).mean())


def weights(network: nn.Sequential) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[float] | None]:
    """Each Linear's weight [out, in] and bias [out], rounded to fp16, and the PReLUs' alphas if any."""
    layers = [
        (child.weight.detach().numpy().astype(np.float16), child.bias.detach().numpy().astype(np.float16))
        for child in network
        if isinstance(child, nn.Linear)
    ]
    alphas = [child.alpha.item() for child in network if isinstance(child, OneParameterPReLU)]
    return layers, alphas or None


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _optimizer(
    network: nn.Module, how: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    groups = parameter_groups(network, how.weight_decay, how.alpha_lr)
    if how.momentum is not None:
        return torch.optim.SGD(groups, lr=how.lr, momentum=how.momentum), None
    optimizer = torch.optim.AdamW(groups, lr=how.lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.2)
    return optimizer, cycle


def _loss(
    network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, how: Recipe, progress: float
) -> torch.Tensor:
    logits = network(inputs)
    loss = functional.cross_entropy(logits.softmax(-1) if how.softmax else logits, labels)
    if not how.collapse:
        return loss
    chosen = [
        activation for index, (_, activation) in enumerate(activations(network)) if index in how.collapse
    ]
    return loss + how.strength(progress) * collapse_penalty(chosen)


def _batches(
    images: Images, batch: int, generator: torch.Generator
) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """One epoch: the share of it that is over, images and labels; a last batch that isn't full is left out."""
    inputs, labels = torch.from_numpy(images.squares()), torch.from_numpy(images.labels.astype(np.int64))
    order = torch.randperm(len(labels), generator=generator)
    steps = len(order) // batch
    for step, rows in enumerate(order[: steps * batch].split(batch)):
        yield step / steps, inputs[rows], labels[rows]


def _report(network: nn.Module, loss: float, epoch: int) -> None:
    alphas = " ".join(f"{row.alpha:.4f}" for row in alpha_report(network))
    _LOG.info("epoch %d, loss %.3f%s", epoch, loss, f", alpha {alphas}" if alphas else "")


def _key(network: nn.Module, images: Images, how: Recipe, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([asdict(how), seed, repr(network)]).encode())
    for module in (__file__, fashion_networks.__file__):
        digest.update(_code(Path(module).read_text(encoding="utf-8")).encode())
    arrays = [value.numpy() for value in network.state_dict().values()]
    for array in (*arrays, images.pixels, images.labels):
        digest.update(repr((array.shape, array.dtype.str)).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _code(source: str) -> str:
    """What a module does: its syntax tree without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
