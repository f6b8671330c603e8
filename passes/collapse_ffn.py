# SPDX-License-Identifier: Apache-2.0
r"""collapse-ffn: a feed-forward block becomes one linear map (LayerCollapse, arXiv 2311.17943, METHODS 1).

::

    x -- Linear(W1, b1) -- f -- Linear(W2, b2) -- y     becomes     x -- Linear(W, b) -- y

``fold`` is the published rewrite: where f is a PReLU whose slope is nearly 1, W = W1 diag(g) W2, with g whatever
affine operators stand between. ``fit`` solves y ~ x W + b by ridge on calibration sums instead, so it works
for every activation and for gated blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.leastsquares import LinearFit, rank_path, ridge_fit
from onnxcollapse.calibration.statistics import Gram, Moments, MomentSums, Ref, Request, Statistics
from onnxcollapse.model import Model, edit, scratch, weights
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import (
    FeedForward,
    affine_of,
    build_linear,
    feedforwards,
    hidden_layer_at,
    prelu_slope,
)

SLACKS = (0.01, 0.1)
"""How much more held-out error than full rank the maps of limited rank may have, relatively."""

ALIGN = 8
"""Ranks are multiples of what tensor cores take whole."""


@dataclass(frozen=True)
class LinearMap:
    """What a block becomes: the matrices of one Linear, or of two when the rank is limited, and the bias.

    Matrices wait on disk: there is one for every variant of every site until the choice is made.
    """

    matrices: tuple[ir.TensorProtocol, ...]
    offset: np.ndarray

    @classmethod
    def of(cls, matrices: Iterable[np.ndarray], offset: np.ndarray) -> LinearMap:
        """Puts float64 matrices aside."""
        kept = (
            scratch.hold(np.array(matrix, np.float64, order="C"), ir.DataType.DOUBLE, "map")
            for matrix in matrices
        )
        return cls(tuple(kept), offset)

    @property
    def params(self) -> int:
        """Parameters of the map."""
        return sum(matrix.size for matrix in self.matrices) + self.offset.size


@dataclass(frozen=True)
class Fold:
    """A region that is affine but for one PReLU with slopes near 1.

    Attributes:
        scale: g, scalar or [h]: what the affine operators multiply by.
        shift: What they add, likewise.
        input: The tensor that the PReLU reads.
        deviation: |1 - alpha|, scalar or [h].
        after: |g| of the affine operators behind the PReLU alone.
    """

    scale: np.ndarray
    shift: np.ndarray
    input: str
    deviation: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class CollapseFfn(Pass):
    """Replaces a feed-forward block by one linear map.

    Attributes:
        method: ``fold``, ``fit``, or ``auto`` for whichever costs less at the outputs.
        tolerance: Largest |1 - alpha| that ``fold`` takes for linear (the paper's code: 0.05).
        ranks: Whether ``fit`` also offers maps of limited rank where these pay.
    """

    name: ClassVar[str] = "collapse-ffn"
    method: Literal["auto", "fold", "fit"] = "auto"
    tolerance: float = 0.05
    ranks: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tolerance {self.tolerance} must lie in [0, 1)")

    def sites(self, model: Model) -> Iterator[FeedForward | Decline]:
        """Finds every feed-forward block; those that cannot be rewritten come with the reason."""
        found, refused = feedforwards(model.graph, model.ir.functions.values())
        for refusal in refused:
            yield Decline(refusal.name, refusal.reason)
        for site in found:
            reason = self._objection(site)
            yield site if reason is None else Decline(site.name, reason)

    def site(self, model: Model, name: str) -> FeedForward | None:
        """Finds one feed-forward block."""
        layer = hidden_layer_at(model.graph, name)
        return None if layer is None else layer.block

    def requests(self, site: FeedForward) -> Sequence[Request]:
        """Asks for the Gram matrix of [x, y], and for a fold for the moments that bound its error."""
        wanted: list[Request] = []
        if self.method != "fold":
            wanted.append(_gram(site))
        fold = self._fold(site)
        if fold is not None:
            wanted += [Moments(Ref(fold.input, axis=site.up.axis)), _after(site)]
        return wanted

    def propose(self, site: FeedForward, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers the fold where the slopes allow it, and fits of full and of limited rank."""
        if statistics is None:
            yield Decline(site.name, "no statistics were collected")
            return
        fold = self._fold(site)
        if fold is not None:
            before = statistics.heldout(Moments(Ref(fold.input, axis=site.up.axis)))
            yield _fold_proposal(site, fold, before, statistics.heldout(_after(site)))
        if self.method != "fold":
            yield from self._fits(site, statistics)

    def rewrite(self, model: Model, site: FeedForward, proposal: Proposal) -> None:
        """Puts the linear map in the block's place; its output keeps the name."""
        found: LinearMap = proposal.payload
        value = site.input
        for index, matrix in enumerate(found.matrices):
            last = index == len(found.matrices) - 1
            anchor = site.down.node
            offset = found.offset if last else None
            value = build_linear(model.graph, anchor, site.down, value, weights.array(matrix), offset)
            weights.release(matrix)
        edit.substitute(model, site.output, value)

    def _fold(self, site: FeedForward) -> Fold | None:
        return None if self.method == "fit" else _fold(site, self.tolerance)

    def _objection(self, site: FeedForward) -> str | None:
        """Says why no variant can pay or apply, or None."""
        if self.method == "fold" and _fold(site, self.tolerance) is None:
            why = _why_not_linear(site)
            return f"activation {site.activation} cannot be folded: {why} (tolerance {self.tolerance:g})"
        if site.up.axis != site.down.axis:
            return "input and output have their channels on different axes"
        if site.up.dtype != site.down.dtype:
            return f"input is {site.up.dtype.name.lower()}, output {site.down.dtype.name.lower()}: no one map is both"
        h, p, q = site.d_hidden, site.d_in, site.d_out
        if h * (p + q + 1) <= p * q:
            return (
                f"does not pay: {h} hidden neurons are no more than d_in d_out / (d_in + d_out + 1) = "
                f"{p * q / (p + q + 1):.1f}, so one {p} x {q} map is no smaller"
            )
        return None

    def _fits(self, site: FeedForward, statistics: Statistics) -> Iterator[Proposal]:
        request = _gram(site)
        fit, heldout = statistics.fit(request), statistics.heldout(request)
        features, targets = request.features, request.targets
        p, q = site.d_in, site.d_out
        full = ridge_fit(fit, heldout, features, targets)
        yield _fit_proposal(site, full, LinearMap.of((full.matrix,), full.offset), "fit")
        if not self.ranks:
            return
        path, seen = rank_path(fit, heldout, features, targets, full), set[int]()
        for slack in SLACKS:
            rank = -(-path.within(slack) // ALIGN) * ALIGN
            if rank * (p + q) < p * q and rank not in seen:
                seen.add(rank)
                limited = path.at(rank)
                found = LinearMap.of(limited.factors(), limited.offset)
                yield _fit_proposal(site, limited, found, f"fit, low rank within {slack:.0%}")


def _gram(site: FeedForward) -> Gram:
    return Gram(
        (Ref(site.input.name or "", axis=site.up.axis),),
        (Ref(site.output.name or "", source="reference", axis=site.down.axis),),
    )


def _after(site: FeedForward) -> Moments:
    return Moments(Ref(site.output.name or "", axis=site.down.axis))


def _saving(site: FeedForward, found: LinearMap) -> Saving:
    params = site.params - found.params
    return Saving(params=params, bytes=params * site.up.dtype.bitwidth // 8)


def _fit_proposal(site: FeedForward, fit: LinearFit, found: LinearMap, variant: str) -> Proposal:
    detail = (
        f"{site.d_in} -> {site.d_hidden} -> {site.d_out} ({site.activation}) becomes one {site.d_in} x {site.d_out} map"
        + (f" of rank {fit.rank}" if fit.rank else "")
        + f", ridge {fit.ridge:g}"
    )
    return Proposal(site.name, variant, detail, fit.error, _saving(site, found), found)


def _fold(site: FeedForward, tolerance: float) -> Fold | None:
    """Composes the region as an affine map with its PReLU taken for the identity; None when it is nothing like it."""
    if site.gate is not None:
        return None
    one, zero = np.ones(()), np.zeros(())
    found: Fold | None = None
    scale, shift = one, zero
    for node in site.region:
        slope = prelu_slope(node)
        affine = affine_of(node)
        if slope is not None and found is None and np.max(np.abs(1.0 - slope)) <= tolerance:
            found = Fold(one, zero, node.inputs[0].name or "", np.abs(1.0 - slope), one)  # type: ignore[union-attr]
        elif affine is not None:
            scale, shift = scale * affine.scale, shift * affine.scale + affine.shift
            if found is not None:
                found = replace(found, after=found.after * np.abs(affine.scale))
        else:
            return None
    return None if found is None else replace(found, scale=scale, shift=shift)


def _why_not_linear(site: FeedForward) -> str:
    slopes = [slope for node in site.region if (slope := prelu_slope(node)) is not None]
    if not slopes or site.gate is not None:
        return "it is no PReLU"
    return f"its largest |1 - alpha| is {max(float(np.max(np.abs(1.0 - slope))) for slope in slopes):.4g}"


def _fold_proposal(site: FeedForward, fold: Fold, before: MomentSums, after: MomentSums) -> Proposal:
    """W = W1 diag(g) W2, b = (b1 g + s) W2 + b2, and the bound on what it costs.

    The error identity of METHODS 1, y - y_fold = (1 - alpha) relu(-z) W2 (up to its sign), gives
    sqrt(E|y - y_fold|^2) <= |W2|_2 sqrt(sum_j (1 - alpha_j)^2 E relu(-z_j)^2), from moments alone.
    """
    up, down = site.up.matrix(), site.down.matrix()
    matrix = (up * fold.scale) @ down
    offset = (site.up.offset() * fold.scale + fold.shift) @ down + site.down.offset()
    lost = float(np.sum(np.square(fold.deviation * fold.after) * before.negative_square))
    power = float(np.sum(after.variance + np.square(after.mean)))
    bound = float(np.linalg.norm(down, 2)) * lost**0.5
    relative = bound / power**0.5 if power > 0 else (0.0 if bound == 0 else float("inf"))
    found = LinearMap.of((matrix,), offset)
    detail = (
        f"{site.d_in} -> {site.d_hidden} -> {site.d_out} folded: largest |1 - alpha| is "
        f"{float(np.max(fold.deviation)):.4g}, output error bounded by {bound:.4g} ({relative:.4g} relative)"
    )
    return Proposal(site.name, "fold", detail, relative, _saving(site, found), found)
