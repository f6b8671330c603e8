# SPDX-License-Identifier: Apache-2.0
"""Requests for statistics: which tensors, and which sums over their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from onnxcollapse.structure.convolution import Window


@dataclass(frozen=True)
class Patches:
    """Says that a tensor is read as a convolution reads it: a row holds the patch of one position.

    Attributes:
        window: Where the patches lie; their columns are channel-major, as in a Conv's weight.
        channels: Channels of the tensor.
    """

    window: Window
    channels: int


@dataclass(frozen=True)
class Ref:
    """A tensor of a model by its value name; its rows are all axes but the channel axis.

    Attributes:
        value: Name of the value in the model's main graph.
        source: "model" for the model the statistics are collected on, "reference" for the one beside it. A
            tensor that the reference does not have, or without a reference, is read from the model.
        axis: The channel axis; -1 for MatMul-like tensors, 1 for Conv's.
        patches: Set where the rows are patches of the tensor.
        positions: About how many rows of each sample to take, evenly spaced; None for all.
        minus: Name of a tensor of the model, of the same shape, that is subtracted; None for none.
    """

    value: str
    source: Literal["model", "reference"] = "model"
    axis: int = -1
    patches: Patches | None = None
    positions: int | None = None
    minus: str | None = None

    @property
    def parts(self) -> tuple[Ref, ...]:
        """The tensors that have to be there: this one, and the one that is subtracted."""
        whole = replace(self, minus=None, patches=None, positions=None)
        return (self,) if self.minus is None else (self, replace(whole, value=self.minus, source="model"))


@dataclass(frozen=True)
class Gram:
    """Asks for the sums of all products between the columns [1, features..., targets...]."""

    features: tuple[Ref, ...]
    targets: tuple[Ref, ...] = ()

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The tensors in column order."""
        return self.features + self.targets


@dataclass(frozen=True)
class Moments:
    """Asks for the per-channel moments of one tensor."""

    tensor: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The tensor."""
        return (self.tensor,)


@dataclass(frozen=True)
class Cross:
    """Asks for the products of the columns of two tensors with each other, and for the spread of each column.

    Half the work and a quarter of the memory of their Gram matrix: enough for correlations between two layers.
    """

    left: Ref
    right: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Both tensors."""
        return (self.left, self.right)


@dataclass(frozen=True)
class Cosine:
    """Asks for the mean cosine between the rows of two tensors of equal width."""

    left: Ref
    right: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Both tensors."""
        return (self.left, self.right)


Request = Gram | Moments | Cross | Cosine
