# SPDX-License-Identifier: Apache-2.0
r"""factor-linear: a Linear becomes two thin ones, fitted on calibration statistics.

::

    y = x W + b    becomes    y = (x A) B + c,    A [d_in, r], B [r, d_out],    r (d_in + d_out) < d_in d_out

Reduced-rank regression (Izenman 1975) of what the original yields on what the model reads: with G = Cov(x) and W the
ridge fit, V the leading right singular vectors of G^1/2 W D, A = W D V and B = V' D^-1, where D^2 says what an error of
each output counts for the hidden layer that it feeds (1 where it feeds none). Linears that read one tensor, such as
gate and up or query, key and value, share A. With D = 1 and y = x W this is the truncation-aware singular value
decomposition of SVD-LLM (arXiv 2403.07378).

What a rank saves and what narrower layers before and behind it save overlap; both are chosen together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxcollapse.passes.importance import hidden_behind, importance
from onnxcollapse.passes.narrow_ffn import POSITIONS
from scipy import linalg

from onnxcollapse.calibration.leastsquares import PRIOR_RIDGES, Problem, leading, relative_error, ridge_fit
from onnxcollapse.calibration.statistics import (
    Cross,
    CrossMoments,
    Gram,
    GramMatrix,
    Ref,
    Request,
    Statistics,
)
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, scratch, weights
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import (
    HiddenLayer,
    Linear,
    build_linear,
    hidden_layers,
    linear_at,
    linears,
    operator_of,
)
from onnxcollapse.structure.constants import is_shared

SHARES = (0.9, 0.75, 0.6, 0.48, 0.38, 0.3, 0.24, 0.19, 0.15, 0.12, 0.09, 0.06, 0.04)
"""Ranks that are offered, as shares of the one from which on nothing is saved."""

LEAST = 32
"""Channels that a Linear reads and yields at least: below, two products take longer than one."""

MOST = 32768
"""Channels of one site at most; their moments with the input take as many rows of doubles."""

EMPTY = 1e-7
"""Share of the largest singular value below which a direction is nothing but rounding."""

FAINT = 1e-3
"""What an output counts at least, against the mean: one that is never on may be on tomorrow."""


@dataclass(frozen=True, eq=False)
class Readers:
    """Linears that read one tensor, in graph order.

    Attributes:
        linears: The Linears.
        behind: The hidden layer that the only one of them feeds, or None.
    """

    linears: tuple[Linear, ...]
    behind: HiddenLayer | None = None

    @property
    def name(self) -> str:
        """The first Linear's name."""
        return self.linears[0].name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The Linears' nodes."""
        return tuple(node for linear in self.linears for node in linear.nodes)

    @property
    def d_in(self) -> int:
        """Channels read."""
        return self.linears[0].in_features

    @property
    def d_out(self) -> int:
        """Channels yielded by all."""
        return sum(linear.out_features for linear in self.linears)

    @property
    def pays_below(self) -> float:
        """The rank from which on nothing is saved."""
        return self.d_in * self.d_out / (self.d_in + self.d_out)

    @property
    def biased(self) -> bool:
        """Whether there is a bias for a fitted offset to go to."""
        return all(linear.bias is not None for linear in self.linears)


@dataclass(frozen=True)
class Factors:
    """Two thin matrices; they wait on disk until the choice is made.

    Attributes:
        first: A [d_in, r].
        second: B [r, d_out], outputs of all Linears in order.
        offset: [d_out].
    """

    first: ir.TensorProtocol
    second: ir.TensorProtocol
    offset: np.ndarray


@dataclass(frozen=True)
class FactorLinear(Pass):
    """Factors Linears into two of limited rank.

    Attributes:
        align: Ranks are multiples of this.
    """

    name: ClassVar[str] = "factor-linear"
    align: int = 8

    def __post_init__(self) -> None:
        if self.align < 1:
            raise ValueError(f"align {self.align} must be 1 or more")

    def sites(self, model: Model) -> Iterator[Readers | Decline]:
        """Finds all Linears, those that read one tensor as one site."""
        layers = hidden_layers(model.graph)[0]
        feeding = {layer.sources[0].output: layer for layer in layers if len(layer.sources) == 1}
        found = linears(model.graph)
        shared = [(linear, _shared(linear)) for linear in found]
        for linear, value in shared:
            if value is not None:
                yield Decline(linear.name, f"others read {value.name}, too, which would be stored twice")
        for group in _groups(linear for linear, value in shared if value is None):
            site = Readers(group, feeding.get(group[0].output) if len(group) == 1 else None)
            reason = self._objection(site)
            yield site if reason is None else Decline(site.name, reason)

    def site(self, model: Model, name: str) -> Readers | None:
        """Finds one of them."""
        start = operator_of(model.graph, name)
        if not isinstance(start, Linear):
            return None
        readers = set(start.input.consumers())
        found = (linear_at(node) for node in model.graph if node in readers)
        groups = _groups(x for x in found if isinstance(x, Linear) and _shared(x) is None)
        group = next((group for group in groups if group[0].name == name), None)
        if group is None:
            return None
        return Readers(group, hidden_behind(model, start.output) if len(group) == 1 else None)

    def requests(self, site: Readers) -> Sequence[Request]:
        """Asks for the Gram matrix of x, and the cross moments of x and each output of the original."""
        return [_gram(site), *_crosses(site)]

    def propose(self, site: Readers, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers ranks, each with its closed-form held-out error."""
        if statistics is None:
            yield Decline(site.name, "no statistics were collected")
            return
        yield from self._offers(site, statistics, self._ranks(site))

    def outline(self, site: Readers, proposal: Proposal) -> Proposal:
        """Factors of the shapes that the site has now, filled with nothing."""
        rank = int(proposal.variant.split()[-1])
        first, second = (ir.tensor(np.zeros(shape)) for shape in ((site.d_in, rank), (rank, site.d_out)))
        return replace(proposal, payload=Factors(first, second, np.zeros(site.d_out)))

    def refit(self, site: Readers, proposal: Proposal, statistics: Statistics) -> Proposal | None:
        """Fits the same rank again to other statistics."""
        rank = int(proposal.variant.split()[-1])
        return next(self._offers(site, statistics, [rank], again=True), None)

    def rewrite(self, model: Model, site: Readers, proposal: Proposal) -> None:
        """Puts both factors in; outputs keep their names."""
        found: Factors = proposal.payload
        first, second = weights.array(found.first), weights.array(found.second)
        if (len(first), second.shape[1]) != (site.d_in, site.d_out):
            raise ModelError(
                f"{self.name}: {site.name}: factors for {len(first)} x {second.shape[1]} are none of what is "
                f"{site.d_in} x {site.d_out} behind other rewrites"
            )
        start = site.linears[0]
        thin = build_linear(model.graph, start.node, start, start.input, first, None)
        place = 0
        for linear in site.linears:
            columns = slice(place, place := place + linear.out_features)
            offset = found.offset[columns] if linear.bias is not None else None
            value = build_linear(model.graph, linear.nodes[-1], linear, thin, second[:, columns], offset)
            edit.substitute(model, linear.output, value)
        for tensor in (found.first, found.second):
            weights.release(tensor)

    def _objection(self, site: Readers) -> str | None:
        """Says why a site cannot be factored or would not pay, or None."""
        if min(site.d_in, site.d_out) < LEAST:
            return f"{site.d_in} x {site.d_out} is small: two products would take longer than one"
        if max(site.d_in, site.d_out) > MOST:
            return f"{site.d_in} x {site.d_out} is more than the {MOST} channels whose moments can be held"
        return None if self._ranks(site) else f"no multiple of {self.align} is a rank that saves anything"

    def _ranks(self, site: Readers) -> list[int]:
        """Ranks below the one from which on nothing is saved, the largest first."""
        below = site.pays_below
        ranks = {max(round(below * share / self.align), 1) * self.align for share in SHARES}
        return sorted((rank for rank in ranks if rank < below), reverse=True)

    def _offers(
        self, site: Readers, statistics: Statistics, ranks: Sequence[int], *, again: bool = False
    ) -> Iterator[Proposal]:
        """Fits ranks that have as much to say; `again` one that was chosen, however little is left of its input."""
        kept = np.zeros(site.d_out)
        if not site.biased:  # a fit through the origin, with what biases there are as they were
            kept = np.concatenate([linear.offset() for linear in site.linears])
        fit = _assembled(site, kept, statistics.fit(_gram(site)), [statistics.fit(x) for x in _crosses(site)])
        heldout = _assembled(
            site, kept, statistics.heldout(_gram(site)), [statistics.heldout(x) for x in _crosses(site)]
        )
        counts = None if site.behind is None else importance(site.behind, fit)
        if not site.biased:
            fit, heldout = fit.through_origin(), heldout.through_origin()
        own = np.concatenate([linear.matrix() for linear in site.linears], axis=1)
        base = ridge_fit(fit, heldout, 1, 2, PRIOR_RIDGES, prior=own)
        problem = Problem.of(fit, 1, 2)
        scale = np.ones(site.d_out)
        if counts is not None:
            scale = np.sqrt(np.maximum(counts, FAINT * counts.mean()))
        basis = _directions(problem.G, base.matrix * scale, max(ranks, default=0))
        for rank in ranks:
            if rank > basis.shape[1] and not again:
                continue
            first = (base.matrix * scale) @ basis[:, :rank]
            second = basis[:, :rank].T / scale
            offset = kept + problem.y_mean - (problem.x_mean @ first) @ second
            error = relative_error(heldout, 1, 2, first @ second, offset - kept)
            detail = f"{site.d_in} x {site.d_out} of rank {rank}, ridge {base.ridge:g}"
            payload = Factors(_held(first), _held(second), offset)
            yield Proposal(
                site.name, f"rank {rank}", detail, error, _saving(site, rank), payload, cuts="rank"
            )


def _groups(found: Iterable[Linear]) -> list[tuple[Linear, ...]]:
    """Linears by what they read, where its channels lie and the type they compute in, in graph order.

    However each is spelled: gate and up of a block have to go on reading one tensor.
    """
    groups: dict[object, list[Linear]] = {}
    for linear in found:
        groups.setdefault((linear.input, linear.axis, linear.dtype), []).append(linear)
    return [tuple(group) for group in groups.values()]


def _shared(linear: Linear) -> ir.Value | None:
    """A weight or bias that something else reads, too."""
    operands = (value for value in (linear.weight, linear.bias) if value is not None)
    return next((value for value in operands if is_shared(value, frozenset(linear.nodes))), None)


def _gram(site: Readers) -> Gram:
    return Gram((_input(site),))


def _crosses(site: Readers) -> list[Cross]:
    return [
        Cross(_input(site), Ref(linear.name, "reference", linear.axis, positions=_positions(linear)))
        for linear in site.linears
    ]


def _input(site: Readers) -> Ref:
    linear = site.linears[0]
    return Ref(linear.input.name or "", axis=linear.axis, positions=_positions(linear))


def _positions(linear: Linear) -> int | None:
    """Rows of each image that sums are gathered from, where the channels are not last."""
    return POSITIONS if linear.kind == "conv" and (linear.rank or 0) > 2 else None


def _assembled(
    site: Readers, kept: np.ndarray, features: GramMatrix, crosses: Sequence[CrossMoments]
) -> GramMatrix:
    """The sums of [1, x, all outputs less what biases are kept]."""
    first = crosses[0]
    beside = CrossMoments(
        first.count,
        (first.means[0], np.concatenate([cross.means[1] for cross in crosses]) - kept),
        (first.variances[0], np.concatenate([cross.variances[1] for cross in crosses])),
        np.concatenate([cross.covariance for cross in crosses], axis=1),
    )
    return GramMatrix.assembled(features, beside, Ref(site.name, "reference"))


def _directions(G: np.ndarray, matrix: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` leading right singular vectors [d_out, rank] of G^1/2 W, from the smaller of both squares."""
    d_in, d_out = matrix.shape
    if d_out <= d_in:
        return leading(matrix.T @ G @ matrix, rank)
    values, vectors = linalg.eigh(G, driver="evd", check_finite=False)
    rooted = (vectors * np.sqrt(np.maximum(values, 0.0))).T @ matrix
    found = rooted.T @ leading(rooted @ rooted.T, rank)
    lengths = np.linalg.norm(found, axis=0)
    solid = lengths > lengths.max(initial=0.0) * EMPTY
    return found[:, solid] / lengths[solid]


def _held(matrix: np.ndarray) -> ir.TensorProtocol:
    return scratch.hold(np.array(matrix, np.float64, order="C"), ir.DataType.DOUBLE, "factors")


def _saving(site: Readers, rank: int) -> Saving:
    params = site.d_in * site.d_out - rank * (site.d_in + site.d_out)
    return Saving(params=params, bytes=params * site.linears[0].dtype.bitwidth // 8)
