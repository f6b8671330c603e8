# SPDX-License-Identifier: Apache-2.0
r"""merge-ffn: feed-forward blocks in a row share their weights (arXiv 2501.06126; METHODS 3).

::

    x_i -- W1_i, b1_i -- f -- W2_i, b2_i -- y_i      becomes, for all i of a window,
    x_i -- W1,   b1   -- f -- W2,   b2   -- y_i                          (average, anchor)
    x_i -- W1,   b1   -- f -- diag(s_i) -- W2, b2_i -- y_i               (fit)

Neurons are aligned first: a block computes the same with its neurons in any order. ``average`` (as published) aligns by
the correlation of what the activations read with that of the first block and takes the mean, ``anchor`` takes the first
block's weights. ``fit`` is ours: each shared neuron is that of the block where it matters most, and the last Linear, a
scale for each neuron and an offset for each block solve one least-squares problem on what the shared neurons really
give on every block's input. Without training, blocks that compute different things have to be fitted again.

What is shared is stored once: parameters and bytes fall, FLOPs stay. Weights and sums are read block by block, so a fit
takes the memory of one block's, however many a window has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnxcollapse.passes import ffn_ties
from onnxcollapse.passes.ffn_ties import BlockSums

from onnxcollapse.calibration.statistics import Cross, Gram, Moments, Ref, Request, Statistics
from onnxcollapse.model import Model, scratch
from onnxcollapse.model import weights as stored
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import FeedForward, feedforwards, folded
from onnxcollapse.structure.constants import Array
from onnxcollapse.structure.tying import (
    FfnWindow,
    Shelf,
    Weights,
    block_weights,
    probe_hidden,
    tie,
    windows,
)

TIE = {"average": "the mean of aligned weights", "anchor": "the first block's weights", "fit": "fitted"}


@dataclass(frozen=True, eq=False)
class Held:
    """Weights that wait on disk: shared ones once, and those of each block.

    Attributes:
        matrices: Shared, of the Linears in order.
        offsets: Shared, of all Linears but the last; None for none.
        last: Offset of the last Linear of each block; None for none.
        scales: [k, h], or None.
    """

    matrices: tuple[ir.TensorProtocol, ...]
    offsets: tuple[Array | None, ...]
    last: tuple[Array | None, ...]
    scales: Array | None

    @classmethod
    def of(cls, weights: Sequence[Weights]) -> Held:
        """Puts weights aside."""
        first = weights[0]
        matrices = tuple(
            scratch.hold(np.array(matrix, np.float64, order="C"), ir.DataType.DOUBLE, "tied")
            for matrix in first.matrices
        )
        scales = [own.scale for own in weights if own.scale is not None]
        last = tuple(own.offsets[-1] for own in weights)
        return cls(matrices, first.offsets[:-1], last, np.stack(scales) if scales else None)

    def weights(self) -> list[Weights]:
        """Those of each block."""
        matrices = tuple(stored.array(matrix) for matrix in self.matrices)
        scales = [None] * len(self.last) if self.scales is None else list(self.scales)
        return [
            Weights(matrices, (*self.offsets, offset), scale)
            for offset, scale in zip(self.last, scales, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Trial:
    """A window with the weights that its blocks may share, and what the shared neurons are called in a scratch copy.

    Attributes:
        window: The window.
        held: The weights.
        hidden: Names of the hidden tensors with the shared weights, block by block.
        own: bool [k, h]: whether a neuron is the block's own; None where no block has one of its own.
    """

    window: FfnWindow
    held: Held
    hidden: tuple[str, ...]
    own: Array | None = None

    @property
    def name(self) -> str:
        """The window's name."""
        return self.window.name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The window's nodes."""
        return self.window.nodes

    def gram(self, place: int) -> Gram:
        """Asks for what a block has to give, by the shared neurons."""
        block = self.window.blocks[place]
        features = Ref(self.hidden[place], axis=block.down.axis)
        return Gram((features,), (Ref(block.name, source="reference", axis=block.down.axis),))


@dataclass(frozen=True)
class MergeFfn(Pass):
    """Lets feed-forward blocks in a row share their weights, stored once.

    Attributes:
        tie: What they share: the average of aligned weights (as published), the first one's (anchor), or what is
            fitted to all of them (fit).
        window: Blocks that share one set of weights.
        permute: Whether neurons are aligned before.
        scale: fit: whether each block has a factor of its own for every neuron.
    """

    name: ClassVar[str] = "merge-ffn"
    storage: ClassVar[bool] = True
    tie: Literal["average", "anchor", "fit"] = "fit"
    window: int = 2
    permute: bool = True
    scale: bool = True

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window {self.window} must be at least 2")
        if not self.scale and self.tie != "fit":
            raise ValueError(f"scale is for tie=fit; {self.tie} has none")
        if not self.permute and self.tie == "anchor":
            raise ValueError(
                "permute does nothing for tie=anchor: the first block's weights are what they are"
            )

    def sites(self, model: Model) -> Iterator[FfnWindow | Decline]:
        """Finds the windows of blocks that can have the same weights."""
        blocks, refused = feedforwards(model.graph, model.ir.functions.values())
        for refusal in refused:
            yield Decline(refusal.name, refusal.reason)
        order = {node: index for index, node in enumerate(model.graph)}
        found = list(windows(blocks, self.window, order))
        if not found:
            yield Decline("graph", f"no {self.window} feed-forward blocks of one form follow each other")
        for window in found:
            reason = _objection(window)
            yield window if reason is None else Decline(window.name, reason)

    def requests(self, site: FfnWindow | Trial) -> Sequence[Request]:
        """Asks how the blocks' neurons correlate; then what the shared ones give on every block's input."""
        if isinstance(site, Trial):
            return [site.gram(place) for place in range(self.window)]
        fitted, neurons = self.tie == "fit", [self._neurons(block) for block in site.blocks]
        found: list[Request] = [Moments(ref) for ref in neurons] if fitted else []
        if self.permute and self.tie != "anchor":
            found += [
                Cross(neurons[i], neurons[j]) for i, j in ffn_ties.pairs(self.window) if i == 0 or fitted
            ]
        return found

    def look_closer(self, scratch: Model, site: FfnWindow, statistics: Statistics) -> Trial:
        """Chooses what is shared, and lets a scratch copy compute it on every block's input."""
        own = None
        if self.tie == "fit":
            shared, kept = self._mixed(site, statistics)
            own = np.arange(self.window)[:, None] == kept if self.scale else None
        elif self.tie == "anchor":
            shared = block_weights(site.blocks[0])
        else:
            shared = ffn_ties.average(_ordered(site, self._aligned(site, statistics)))
        shelf = Shelf()
        hidden = tuple(probe_hidden(scratch, block, shared, shelf) for block in site.blocks)
        return Trial(site, Held.of((shared,) * self.window), hidden, own)

    def propose(self, site: FfnWindow | Trial, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers the shared weights with their error in closed form."""
        if statistics is None or not isinstance(site, Trial):
            yield Decline(site.name, "no statistics were collected")
            return
        biased = site.window.biased
        fit, heldout = (
            BlockSums(self.window, lambda place, of=of: of(site.gram(place)), biased)
            for of in (statistics.fit, statistics.heldout)
        )
        weights = site.held.weights()
        held, how = site.held, TIE[self.tie]
        if self.tie == "fit":
            tied = ffn_ties.tied_fit(fit, heldout, weights[0].matrices[-1], site.own)
            offsets = tied.offsets(fit) if biased else [None] * self.window
            weights = _fitted(weights[0], tied, offsets)
            held, how = Held.of(weights), f"{how}, ridge {tied.ridge:g}"
        error = ffn_ties.tied_error(heldout, weights)
        detail = f"{self.window} blocks share one set of weights ({how}); FLOPs stay"
        saving = _saving(site.window, held)
        yield Proposal(site.name, f"{self.tie} {self.window}", detail, error, saving, held)

    def requests_again(self, site: FfnWindow, proposal: Proposal) -> Sequence[Request]:
        """Asks for nothing: what is shared was fitted to the original's inputs, and later projections are refitted."""
        return ()

    def refit(self, site: FfnWindow, proposal: Proposal, statistics: Statistics) -> Proposal:
        """Leaves the fit as it is."""
        return proposal

    def rewrite(self, model: Model, site: FfnWindow, proposal: Proposal) -> None:
        """Gives all blocks the shared weights; outputs keep their names."""
        held: Held = proposal.payload
        tie(model, site.blocks, held.weights())
        for matrix in held.matrices:
            stored.release(matrix)

    # Aligning

    def _neurons(self, block: FeedForward) -> Ref:
        """What tells neurons apart: as published what the activation reads (gated: of up), for fits what down reads."""
        value, axis = (
            (block.hidden, block.down.axis) if self.tie == "fit" else (block.up.output, block.up.axis)
        )
        return Ref(value.name or "", axis=axis)

    def _correlation(self, site: FfnWindow, statistics: Statistics) -> ffn_ties.Correlations:
        def between(i: int, j: int) -> Array:
            request = Cross(self._neurons(site.blocks[i]), self._neurons(site.blocks[j]))
            return statistics.fit(request).correlation()

        return between

    def _aligned(self, site: FfnWindow, statistics: Statistics) -> Array:
        width = site.blocks[0].d_hidden
        if not self.permute:
            return np.tile(np.arange(width), (self.window, 1))
        return ffn_ties.aligned(self.window, width, self._correlation(site, statistics))

    def _mixed(self, site: FfnWindow, statistics: Statistics) -> tuple[Weights, Array]:
        """The shared neurons, and the block that each is of."""
        power = [
            statistics.fit(Moments(self._neurons(block))).variance * np.square(block.down.matrix()).sum(1)
            for block in site.blocks
        ]
        power = [one / max(float(one.sum()), 1e-30) for one in power]
        if self.permute:
            outputs = self._correlation(site, statistics)

            def alike(i: int, j: int) -> Array:  # copies are copies, though their inputs differ
                a, b = (block_weights(site.blocks[place]) for place in (i, j))
                return np.maximum(np.abs(outputs(i, j)), ffn_ties.likeness(a, b))

            order, kept = ffn_ties.matched(power, alike)
        else:
            order = np.tile(np.arange(len(power[0])), (self.window, 1))
            kept = np.argmax(power, axis=0)
        return ffn_ties.mixed(_ordered(site, order), kept), kept


def _objection(window: FfnWindow) -> str | None:
    """Says why its blocks cannot share new weights, or None."""
    first = window.blocks[0]
    uneven = next(
        (v for v, array in first.pointwise.constants.items() if array.ndim and np.ptp(array) != 0), None
    )
    if uneven is not None:
        return f"its activation has a constant for each channel ({uneven.name}), which keeps neurons in their order"
    if any(linear.axis != first.down.axis for linear in first.linears):
        return "input and output have their channels on different axes"
    roots = [{_root(linear.weight) for linear in block.linears} for block in window.blocks]
    if all(one == roots[0] for one in roots[1:]):
        return "its blocks share their weights already"
    return None


def _ordered(window: FfnWindow, order: Array) -> Iterator[Weights]:
    """The weights of each block with its neurons in an order, one block's in memory at a time."""
    for block, row in zip(window.blocks, order, strict=True):
        yield ffn_ties.permuted(block_weights(block), row)


def _root(value: ir.Value) -> ir.Value:
    known = folded(value)
    return value if known is None or known.root is None else known.root


def _fitted(shared: Weights, tied: ffn_ties.Tied, offsets: Sequence[Array | None]) -> list[Weights]:
    """The weights of each block with a fitted last Linear."""
    matrices = (*shared.matrices[:-1], tied.matrix)
    return [
        Weights(matrices, (*shared.offsets[:-1], offset), None if tied.scales is None else tied.scales[place])
        for place, offset in enumerate(offsets)
    ]


def _saving(window: FfnWindow, held: Held) -> Saving:
    """What is stored less; the engine measures it when it applies the rewrite."""
    before = sum(linear.params for block in window.blocks for linear in block.linears)
    shared = sum(matrix.size for matrix in held.matrices)
    shared += sum(offset.size for offset in held.offsets if offset is not None)
    last = {id(offset): offset.size for offset in held.last if offset is not None}
    after = shared + sum(last.values()) + (0 if held.scales is None else held.scales.size)
    width = window.blocks[0].down.dtype.bitwidth // 8
    return Saving(params=before - after, bytes=(before - after) * width)
