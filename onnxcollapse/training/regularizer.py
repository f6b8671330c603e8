# SPDX-License-Identifier: Apache-2.0
"""What drives activations to the identity, how strongly, when, and how far they are (arXiv 2311.17943)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onnxcollapse.errors import OptionError
from onnxcollapse.training.prelu import OneParameterPReLU, activations


def collapse_penalty(modules: Iterable[OneParameterPReLU]) -> torch.Tensor:
    """The regularizer sum (1 - alpha)^2 over activations, a scalar to be scaled by lc and added to the loss.

    Raises:
        OptionError: there are no activations.
    """
    alphas: list[torch.Tensor] = [module.alpha for module in modules]
    if not alphas:
        raise OptionError("no activations to regularize: give those that swap_activations returned")
    return (1 - torch.stack(alphas)).square().sum()


@dataclass(frozen=True)
class Schedule:
    """The strength lc over a run: 0 at first, then a linear ramp, then constant.

    Attributes:
        peak: lc after the ramp.
        start: the share of the run before the ramp, in which the task is learned undisturbed.
        end: the share of the run at which the peak is reached.
    """

    peak: float
    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise OptionError(f"a schedule needs 0 <= start <= end <= 1, got {self.start} and {self.end}")

    def __call__(self, progress: float) -> float:
        """Lc at a point of the run, `progress` in [0, 1]."""
        if progress >= self.end:
            return self.peak
        return self.peak * max(0.0, progress - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class AlphaRow:
    """One activation's distance from the identity.

    Attributes:
        name: its dotted name.
        alpha: its slope for negative values.
        collapsible: whether |1 - alpha| is below the tolerance.
    """

    name: str
    alpha: float
    collapsible: bool


def alpha_report(module: nn.Module, tolerance: float = 0.05) -> list[AlphaRow]:
    """The alphas of a model in its order; those below the tolerance (the paper's 0.05) can be folded."""
    rows = []
    for name, activation in activations(module):
        alpha = activation.alpha.item()
        rows.append(AlphaRow(name, alpha, abs(1 - alpha) < tolerance))
    return rows


def pull_alphas(modules: Iterable[OneParameterPReLU], share: float) -> None:
    """Moves each alpha a share of the way to 1 after a step: the decoupled decay of the paper's AdamW recipe.

    Under Adam the gradient of the penalty is normalised together with the task's, which makes lc lose its
    meaning; a decoupled pull keeps it, as decoupled weight decay does. `share` is 2 lr lc for the same step
    as gradient descent's.

    Raises:
        OptionError: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise OptionError(f"share must be in [0, 1], got {share}")
    with torch.no_grad():
        for module in modules:
            module.alpha.lerp_(torch.ones_like(module.alpha), share)


def parameter_groups(
    module: nn.Module, weight_decay: float = 0.01, alpha_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer such as AdamW: no weight decay on alphas, which would pull them to 0.

    Args:
        module: the model.
        weight_decay: for all other parameters.
        alpha_lr: a learning rate of the alphas' own; the optimizer's when None.
    """
    alphas = [activation.alpha for _, activation in activations(module)]
    known = {id(alpha) for alpha in alphas}
    others = [parameter for parameter in module.parameters() if id(parameter) not in known]
    own: dict[str, Any] = {"params": alphas, "weight_decay": 0.0}
    if alpha_lr is not None:
        own["lr"] = alpha_lr
    return [{"params": others, "weight_decay": weight_decay}, own]
