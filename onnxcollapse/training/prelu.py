# SPDX-License-Identifier: Apache-2.0
"""The activation that LayerCollapse trains towards the identity (arXiv 2311.17943)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from onnxcollapse.errors import OptionError


class OneParameterPReLU(nn.Module):
    """f(z) = max(z, 0) + alpha min(z, 0) with one alpha for the whole tensor (arXiv 2311.17943).

    At alpha = 0 it is ReLU, at alpha = 1 the identity, and the two Linears around it are then one.

    Args:
        alpha: the slope for negative values at the start; 0 keeps a ReLU network as it is, 0.01 suits others.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Applies the activation to a tensor of any shape; exported to ONNX it is one PRelu node."""
        return functional.prelu(z, self.alpha.reshape(1))

    def extra_repr(self) -> str:
        """Shows alpha when the module is printed."""
        return f"alpha={self.alpha.item():.4g}"


def swap_activations(
    module: nn.Module, select: Callable[[str, nn.Module], bool], alpha: float = 0.01
) -> dict[str, OneParameterPReLU]:
    """Replaces the submodules that `select` picks by one-parameter PReLUs, in place.

    Replacing a GELU without training afterwards ruins a model, so this belongs before a training run only.
    An activation module that several blocks share becomes one PReLU for each place, so that each gets an
    alpha of its own.

    Args:
        module: the model to edit.
        select: takes a submodule's dotted name and the submodule, and answers whether to replace it.
        alpha: the slope that the new activations start with.

    Returns:
        The new activations by dotted name, in the model's order.

    Raises:
        OptionError: nothing was selected.
    """
    chosen = [
        name for name, child in module.named_modules(remove_duplicate=False) if name and select(name, child)
    ]
    if not chosen:
        raise OptionError(
            "no submodule was selected: print named_modules() and select its activations by name or type"
        )
    like = next((one for one in module.parameters() if one.is_floating_point()), torch.zeros(()))
    swapped = {}
    for name in chosen:
        swapped[name] = OneParameterPReLU(alpha).to(like)
        module.set_submodule(name, swapped[name])
    return swapped


def activations(module: nn.Module) -> Iterator[tuple[str, OneParameterPReLU]]:
    """The one-parameter PReLUs of a model by dotted name, in its order."""
    for name, child in module.named_modules():
        if isinstance(child, OneParameterPReLU):
            yield name, child
