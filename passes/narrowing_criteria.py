# SPDX-License-Identifier: Apache-2.0
"""Which hidden channels stay, and the weights that read them: one function for each criterion of narrow-ffn."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg

from onnxcollapse.calibration.leastsquares import RIDGES, leading, relative_error
from onnxcollapse.calibration.statistics import GramMatrix, MomentSums
from onnxcollapse.calibration.subset import SubsetFit, eliminate, refit_subset
from onnxcollapse.structure import FeedForward, HiddenLayer, prelu_slope

FEW = 256
"""Channels up to which a path is offered at every width that it pays at, beyond at every third."""

RANK_SHARE = 4
"""A path of limited rank has this fraction of full rank."""


@dataclass(frozen=True)
class Choice:
    """A width, and the linear path beside it.

    Attributes:
        count: Channels that stay.
        path: "none", "full" (d_in x d_out) or "low" (two factors).
    """

    count: int
    path: str = "none"

    @property
    def variant(self) -> str:
        """What the engine calls it."""
        return f"keep {self.count}" + ("" if self.path == "none" else f", {self.path} path")

    @property
    def beside(self) -> str:
        """The path in words."""
        words = {
            "none": "",
            "full": " with a linear path beside",
            "low": " with a path of limited rank beside",
        }
        return words[self.path]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Channels that stay and the weights that read them.

    Attributes:
        choice: Width and path.
        keep: The channels, sorted.
        matrix: The consumer's weights, float64 [len(keep) * group, d_out].
        offset: float64 [d_out].
        error: Relative error at the consumer's output on held-out data, in closed form.
        detail: In words.
        skip: The path: nothing, one matrix [d_in, d_out], or two factors.
    """

    choice: Choice
    keep: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray
    error: float
    detail: str
    skip: tuple[np.ndarray, ...] = field(default=())


def pays_from(layer: HiddenLayer) -> float:
    """How many channels have to leave until a path of full rank pays (METHODS 0: d_in d_out / (d_in + d_out + 1))."""
    block = layer.block
    if block is None:
        return float("inf")
    incoming = sum(source.in_features + 1 for source in layer.sources)
    return block.d_in * block.d_out / (incoming + block.d_out)


def path_rank(d_in: int) -> int:
    """The limited rank of a path, a multiple of 8 where it is that large."""
    return max(d_in // RANK_SHARE // 8 * 8, 1)


def by_residual(
    layer: HiddenLayer,
    fit: GramMatrix,
    heldout: GramMatrix,
    counts: Sequence[int],
    *,
    with_input: bool,
    only: Choice | None,
    importance: np.ndarray | None = None,
) -> list[Fitted]:
    """Subset and refit (METHODS 0) without a path, and with one where that pays.

    What stays is held near its own outgoing weights: only what the others took along has to be made up for.

    Args:
        layer: The hidden layer.
        fit: Sums of [x?, features, y] that are fitted to.
        heldout: The same on held-out rows.
        counts: Widths to offer.
        with_input: Whether x is the first of the tensors.
        only: The one choice wanted, None for all.
        importance: float64 [d_out]: what an error of each output counts in the choice of channels.
    """
    place, own = 2 if with_input else 1, layer.matrix()
    fitted = functools.partial(
        eliminate,
        fit,
        heldout,
        group=layer.group,
        weights=importance,
        one_ridge=only is None,
        prior=own,
    )
    plain = counts if only is None else [c for c in counts if only.path == "none"]
    fits = fitted(place, place + 1, plain) if plain else []
    found = [_of(Choice(count), fit) for count, fit in zip(plain, fits, strict=True)]
    if not with_input:
        return found
    paying = [count for count in counts if layer.width - count > pays_from(layer)]
    if only is not None:
        paying = list(counts)
    elif layer.width > FEW:
        paying = paying[::-1][::3]
    if paying and (only is None or only.path != "none"):
        fits = fitted(2, 3, paying, fixed=1)
        for count, whole in zip(paying, fits, strict=True):
            if only is None or only.path == "full":
                found.append(_with_path(count, whole, fit.widths[0]))
            if layer.d_out > path_rank(fit.widths[0]) and (only is None or only.path == "low"):
                found.append(_limited(own, whole, fit, heldout))
    return found


def by_score(
    layer: HiddenLayer,
    fit: GramMatrix,
    heldout: GramMatrix,
    counts: Sequence[int],
    criterion: str,
    *,
    refit: bool,
    seed: int,
) -> list[Fitted]:
    """Controls: the channels with the largest weights, or drawn ones.

    Args:
        layer: The hidden layer.
        fit: Sums of [features, y] that are fitted to.
        heldout: The same on held-out rows.
        counts: Widths to offer.
        criterion: ``magnitude`` or ``random``.
        refit: Whether the outgoing weights are fitted again; else they stay.
        seed: Of the draw; each layer has a stream of its own.
    """
    outgoing = layer.matrix()
    if criterion == "magnitude":
        rows = outgoing.reshape(layer.width, -1)
        scores = np.linalg.norm(layer.source_weights(), axis=0) * np.linalg.norm(rows, axis=1)
    else:
        scores = np.random.default_rng([seed, zlib.crc32(layer.name.encode())]).random(layer.width)
    order = np.argsort(-scores, kind="stable")
    found = []
    for count in counts:
        keep = np.sort(order[:count])
        if refit:
            found.append(
                _of(Choice(count), refit_subset(fit, heldout, 1, 2, keep, group=layer.group, prior=outgoing))
            )
            continue
        matrix, offset = (
            outgoing.reshape(layer.width, layer.group, -1)[keep].reshape(-1, layer.d_out),
            layer.offset(),
        )
        columns = heldout.columns(1).reshape(layer.width, -1)[keep].ravel()
        error = relative_error(heldout, columns, 2, matrix, offset)
        found.append(
            Fitted(Choice(count), keep, matrix, offset, error, f"by {criterion}, weights as they were")
        )
    return found


def rate_objection(layer: HiddenLayer) -> str | None:
    """Says why the published criterion does not apply to a layer, or None."""
    block = layer.block
    if block is None:
        return (
            "the published criterion knows Linears: a linear path across a window would need a wider kernel, and the "
            "border makes it inexact; criterion=residual narrows it"
        )
    if block.gate is not None:
        return "a gated block is not linear where it is on; criterion=residual narrows it"
    nodes = block.region
    if len(nodes) != 1 or prelu_slope(nodes[0]) is None:
        return f"activation {layer.activation} is not linear above zero; criterion=residual narrows it"
    return None


def by_rate(block: FeedForward, heldout: GramMatrix, rates: MomentSums, threshold: float) -> Fitted | str:
    """The published rewrite (arXiv 2506.21146): neurons on at a rate of `threshold` or more are taken for linear.

    For S the set of them U = W1[:,S] W2[S,:] and b2 + b1[S] W2[S,:] take their place; a layer of nothing but linear
    neurons becomes one linear map and keeps its bias. The rewrite is made iff |S| (p + q + 1) > p q, p the width of
    all that the layer reads, an earlier skip included.

    Args:
        block: A plain block whose activation has the slope 1 above zero.
        heldout: Sums of [z, a, y] on held-out rows, z = x W1 + b1.
        rates: Moments of the pre-activations over all calibration rows.
        threshold: Of the rate, in (0, 1].

    Returns:
        The rewrite, or why there is none.
    """
    linear = rates.positive_rate >= threshold
    p, q, h, count = block.d_in, block.d_out, block.d_hidden, int(linear.sum())
    if count * (p + q + 1) <= p * q:
        return (
            f"does not pay: {count} of {h} neurons have an activation rate of {threshold:g} or more, and a skip path "
            f"of {p} x {q} pays from more than p q / (p + q + 1) = {p * q / (p + q + 1):.1f} on"
        )
    up, bias, down = block.up.matrix(), block.up.offset(), block.down.matrix()
    skip = up[:, linear] @ down[linear]
    offset = block.down.offset() + bias[linear] @ down[linear]
    keep = np.flatnonzero(~linear)
    matrix = down[keep]
    features = np.concatenate([heldout.columns(1)[linear], heldout.columns(2)[keep]])
    error = relative_error(heldout, features, 3, np.concatenate([down[linear], matrix]), block.down.offset())
    detail = f"{count} neurons with an activation rate of {threshold:g} or more moved to a skip path"
    return Fitted(Choice(len(keep), "full"), keep, matrix, offset, error, detail, (skip,))


def _of(choice: Choice, found: SubsetFit) -> Fitted:
    return Fitted(choice, found.keep, found.matrix, found.offset, found.error, f"ridge {found.ridge:g}")


def _with_path(count: int, found: SubsetFit, width: int) -> Fitted:
    skip, matrix = found.matrix[:width], found.matrix[width:]
    detail = f"ridge {found.ridge:g}"
    return Fitted(Choice(count, "full"), found.keep, matrix, found.offset, found.error, detail, (skip,))


def _limited(own: np.ndarray, whole: SubsetFit, fit: GramMatrix, heldout: GramMatrix) -> Fitted:
    """Limits the rank of a path by reduced-rank regression given the channels that stay, and fits all again.

    The path x S counts for what the kept features a cannot say: with C = Cov(x | a), the leading eigenvectors V of
    S' C S give the directions x S V that stand for x (Izenman 1975, partial form).
    """
    d_in = fit.widths[0]
    rank = path_rank(d_in)
    path = whole.matrix[:d_in]
    C = _conditional(fit, fit.columns(1), fit.columns(2)[whole.keep])
    basis = path @ leading(path.T @ C @ path, rank)
    here, there = fit.projected(0, basis), heldout.projected(0, basis)
    found = refit_subset(here, there, 2, 3, whole.keep, fixed=1, ridges=(whole.ridge,), prior=own)
    detail = f"rank {rank}, ridge {found.ridge:g}"
    skip = (basis, found.matrix[:rank])
    return Fitted(
        Choice(len(whole.keep), "low"),
        found.keep,
        found.matrix[rank:],
        found.offset,
        found.error,
        detail,
        skip,
    )


def _conditional(gram: GramMatrix, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Cov(x | a) = Cov(x) - Cov(x, a) Cov(a)^-1 Cov(a, x), with a little ridge."""

    def covariance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return gram.block(left, right) - np.outer(gram.mean(left), gram.mean(right))

    inner = covariance(a, a)
    inner[np.diag_indices_from(inner)] += RIDGES[0] * max(float(np.mean(np.diag(inner))), 1e-30)
    cross = covariance(x, a)
    return covariance(x, x) - cross @ linalg.solve(inner, cross.T, assume_a="pos")
