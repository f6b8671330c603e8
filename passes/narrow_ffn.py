# SPDX-License-Identifier: Apache-2.0
r"""narrow-ffn: hidden channels leave, and what remains is fitted again (arXiv 2506.21146, METHODS 2).

::

    y = f(x W1 + b1) W2 + b2     becomes     y = a V + c     or     y = [a, x] V + c,     a = f(x W1[:,K] + b1[K])

``residual`` chooses the kept channels K, the path beside them and V, c as one least-squares problem on calibration
sums: the optimal brain surgeon on features (METHODS 0). It works for every activation, for gated blocks, for chains of
Linears, and for the channels of a Conv, each of which owns the taps of the Conv (or the positions of the Linear) that
reads it. ``activation-rate`` is the published rewrite: neurons that are on at a rate of at least `threshold` are taken
for linear and move to a skip path. ``magnitude`` and ``random`` are controls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnxcollapse.passes.importance import hidden_behind, importance
from onnxcollapse.passes.narrowing_criteria import (
    Choice,
    Fitted,
    by_rate,
    by_residual,
    by_score,
    pays_from,
    rate_objection,
)

from onnxcollapse.calibration.statistics import Gram, Moments, Patches, Ref, Request, Statistics
from onnxcollapse.model import Model, scratch, weights
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import Convolution, HiddenLayer, hidden_layer_at, hidden_layers, narrow

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.12, 0.08, 0.05)
"""Shares of a layer's channels that are offered."""

WIDE_SHARES = (0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)
"""The same where a layer has more than WIDE features: each takes a solution of that size."""

WIDE = 768

POSITIONS = 64
"""Rows of each image that sums are gathered from: neighbouring positions say much the same."""

MOST_FEATURES = 16384
"""Features of the sums of one site; their Gram matrix takes 2 GB."""


@dataclass(frozen=True, eq=False)
class Channels:
    """A hidden layer as a site.

    Attributes:
        layer: The hidden layer.
        chained: Whether its source is the consumer of another site, so that its input may be cut as well.
        after: The hidden layer whose source its consumer is, if there is one.
    """

    layer: HiddenLayer
    chained: bool
    after: HiddenLayer | None = None

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """What makes the channels; the consumer may be the source of a neighbour, and is not claimed."""
        consumer = set(self.layer.consumer.nodes)
        return tuple(node for node in self.layer.nodes if node not in consumer)

    @property
    def skippable(self) -> bool:
        """Whether a linear path can lie beside it."""
        layer = self.layer
        block = layer.block
        return (
            block is not None
            and layer.input is not None
            and layer.in_axis == layer.out_axis
            and block.up.dtype == block.down.dtype
        )


@dataclass(frozen=True)
class Narrowing:
    """What a hidden layer becomes; matrices wait on disk until the choice is made.

    Attributes:
        keep: The channels that stay, sorted.
        matrices: The consumer's weights for them, then those of the path beside: none, one matrix or two factors.
        offset: The consumer's bias.
        choice: How many channels stay and which path lies beside, to fit the same again.
    """

    keep: np.ndarray
    matrices: tuple[ir.TensorProtocol, ...]
    offset: np.ndarray
    choice: Choice


@dataclass(frozen=True)
class NarrowFfn(Pass):
    """Narrows hidden layers.

    Attributes:
        criterion: What decides which channels stay: ``residual``, ``activation-rate`` (arXiv 2506.21146), or one of the
            controls ``magnitude`` (norm of a channel's incoming weights times that of its outgoing ones) and
            ``random``.
        threshold: Activation rate from which ``activation-rate`` takes a neuron for linear, in (0, 1].
        refit_rest: Whether the controls' remaining outgoing weights are fitted again.
        skip: Whether ``residual`` offers a linear path beside the channels, of full and of limited rank.
        align: Widths are multiples of this where the layer is at least eight times as wide.
        seed: Of ``random``.
    """

    name: ClassVar[str] = "narrow-ffn"
    criterion: Literal["residual", "activation-rate", "magnitude", "random"] = "residual"
    threshold: float = 0.95
    refit_rest: bool = True
    skip: bool = True
    align: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold {self.threshold} must lie in (0, 1]")
        if self.align < 1:
            raise ValueError(f"align {self.align} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")

    def sites(self, model: Model) -> Iterator[Channels | Decline]:
        """Finds every hidden layer; those that cannot be narrowed come with the reason."""
        found, refused = hidden_layers(model.graph, model.ir.functions.values())
        for refusal in refused:
            yield Decline(refusal.name, refusal.reason)
        outputs = {layer.output for layer in found}
        readers = {layer.sources[0].output: layer for layer in found if len(layer.sources) == 1}
        for layer in found:
            site = Channels(layer, layer.sources[0].output in outputs, readers.get(layer.output))
            reason = self._objection(site)
            yield site if reason is None else Decline(site.name, reason)

    def site(self, model: Model, name: str) -> Channels | None:
        """Finds one hidden layer."""
        layer = hidden_layer_at(model.graph, name)
        if layer is None:
            return None
        before = hidden_layer_at(model.graph, layer.sources[0].name)
        chained = before is not None and before.output is layer.sources[0].output
        return Channels(layer, chained, hidden_behind(model, layer.output))

    def requests(self, site: Channels) -> Sequence[Request]:
        """Asks for the Gram matrix of [x, features, y], x only where it may get a path of its own.

        The published rewrite takes the pre-activations for x: a neighbour that is rewritten first takes x away, and
        they are linear in whatever stands in its place.
        """
        wanted: list[Request] = [self._gram(site, self._with_input(site))]
        if self.criterion == "activation-rate":
            wanted.append(_moments(site))
        return wanted

    def propose(self, site: Channels, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers widths and paths, or the published rewrite, each with its closed-form held-out error."""
        if statistics is None:
            yield Decline(site.name, "no statistics were collected")
            return
        if self.criterion == "activation-rate":
            yield self._published(site, statistics)
            return
        fits = self._curve(site, statistics, None)
        if not fits:
            yield Decline(site.name, f"{site.layer.width} channel cannot become fewer")
        for fitted in _frontier(site.layer, fits):
            yield self._proposal(site, fitted)

    def refit(self, site: Channels, proposal: Proposal, statistics: Statistics) -> Proposal | None:
        """Fits the same width and path again, to other statistics; which channels stay is chosen anew."""
        if self.criterion == "activation-rate":
            again = self._published(site, statistics)
            return again if isinstance(again, Proposal) else None
        fits = self._curve(site, statistics, proposal.payload.choice)
        return self._proposal(site, fits[0]) if fits else None

    def rewrite(self, model: Model, site: Channels, proposal: Proposal) -> None:
        """Cuts the channels and puts the fitted weights in; the output keeps its name."""
        found: Narrowing = proposal.payload
        matrix, *skip = (weights.array(tensor) for tensor in found.matrices)
        narrow(model, site.layer, found.keep, matrix, found.offset, tuple(skip) or None)
        for tensor in found.matrices:
            weights.release(tensor)

    def _objection(self, site: Channels) -> str | None:
        layer = site.layer
        features = layer.width * layer.group
        if features > MOST_FEATURES:
            return f"{features} features are more than the {MOST_FEATURES} whose sums can be held; pool before it"
        if self.criterion != "activation-rate":
            return None
        return rate_objection(layer) or (
            None
            if site.skippable
            else "a linear path beside it would join tensors of different layout or type"
        )

    def _gram(self, site: Channels, with_input: bool) -> Gram:
        layer = site.layer
        consumer = layer.consumer
        rank = consumer.rank or 0
        positions = POSITIONS if layer.out_axis == 1 and rank > 2 else None
        patches = None
        if isinstance(consumer, Convolution) and consumer.window is not None:
            patches = Patches(consumer.window, layer.width)
        features = [Ref(layer.features.name or "", "model", layer.feature_axis, patches, positions)]
        if self.criterion == "activation-rate":
            features.insert(0, Ref(layer.pre[0].name or "", "model", layer.pre_axis, None, positions))
        elif with_input and layer.input is not None:
            features.insert(0, Ref(layer.input.name or "", "model", layer.in_axis, None, positions))
        target = Ref(layer.output.name or "", "reference", layer.out_axis, None, positions)
        return Gram(tuple(features), (target,))

    def _with_input(self, site: Channels) -> bool:
        """Whether x is among the features, so that ``residual`` can offer a path."""
        layer = site.layer
        threshold = pays_from(layer)
        return (
            self.criterion == "residual"
            and self.skip
            and site.skippable
            and not site.chained
            and threshold < layer.width
        )

    def _curve(self, site: Channels, statistics: Statistics, only: Choice | None) -> list[Fitted]:
        with_input = self._with_input(site)
        if self._gram(site, with_input) not in statistics:
            # asked for before a neighbour was rewritten: one with a path beside it is no hidden layer any more
            with_input = not with_input
        request = self._gram(site, with_input)
        fit, heldout = statistics.fit(request), statistics.heldout(request)
        counts = self._counts(site.layer) if only is None else [only.count]
        if self.criterion == "residual":
            weights = None if site.after is None else importance(site.after, fit)
            return by_residual(
                site.layer, fit, heldout, counts, with_input=with_input, only=only, importance=weights
            )
        return by_score(
            site.layer, fit, heldout, counts, self.criterion, refit=self.refit_rest, seed=self.seed
        )

    def _counts(self, layer: HiddenLayer) -> list[int]:
        """Widths below the layer's, the largest first."""
        width, shares = layer.width, SHARES if layer.width * layer.group <= WIDE else WIDE_SHARES
        align = self.align if width >= 8 * self.align else 1
        counts = {max(round(width * share / align), 1) * align for share in shares}
        return sorted((count for count in counts if count < width), reverse=True)

    def _published(self, site: Channels, statistics: Statistics) -> Proposal | Decline:
        request, moments = self._gram(site, self._with_input(site)), _moments(site)
        rates = statistics.fit(moments) + statistics.heldout(moments)
        if site.layer.block is None:
            return Decline(site.name, rate_objection(site.layer) or "")
        found = by_rate(site.layer.block, statistics.heldout(request), rates, self.threshold)
        return Decline(site.name, found) if isinstance(found, str) else self._proposal(site, found)

    def _proposal(self, site: Channels, fitted: Fitted) -> Proposal:
        layer, choice = site.layer, fitted.choice
        matrices = tuple(
            scratch.hold(np.array(matrix, np.float64, order="C"), ir.DataType.DOUBLE, "narrowed")
            for matrix in (fitted.matrix, *fitted.skip)
        )
        payload = Narrowing(fitted.keep, matrices, fitted.offset, choice)
        detail = (
            f"{layer.width} -> {choice.count} channels ({layer.activation}){choice.beside}, {fitted.detail}"
        )
        return Proposal(
            site.name,
            choice.variant,
            detail,
            fitted.error,
            _saving(layer, fitted),
            payload,
            cuts="both" if fitted.skip else "width",  # a path reads what the sources read
        )


def _moments(site: Channels) -> Moments:
    layer = site.layer
    return Moments(Ref(layer.pre[0].name or "", axis=layer.pre_axis))


def _saving(layer: HiddenLayer, fitted: Fitted) -> Saving:
    """Predicted from the shapes; weights that others share are told apart when the engine measures."""
    taps = sum(source.fan_in + (source.bias is not None) for source in layer.sources)
    params = (layer.width - len(fitted.keep)) * (taps + layer.group * layer.d_out)
    params -= sum(matrix.size for matrix in fitted.skip)
    return Saving(params=params, bytes=params * layer.consumer.dtype.bitwidth // 8)


def _frontier(layer: HiddenLayer, fits: Sequence[Fitted]) -> Iterator[Fitted]:
    """Those that no other one beats in both saving and error."""
    least = float("inf")
    for fitted in sorted(fits, key=lambda fitted: (-_saving(layer, fitted).params, fitted.error)):
        if fitted.error < least:
            least = fitted.error
            yield fitted
