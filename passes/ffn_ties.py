# SPDX-License-Identifier: Apache-2.0
"""Weights that several feed-forward blocks can share: which neurons correspond, and what all of them become.

Blocks are numbered from 0 in a window. An alignment is [k, h]: row i says which neuron of block i takes each slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import optimize

from onnxcollapse.calibration.leastsquares import RIDGES, Problem, ridge_solve
from onnxcollapse.calibration.statistics import GramMatrix
from onnxcollapse.structure.constants import Array
from onnxcollapse.structure.tying import Weights

ROUNDS = 3
"""How often scales and shared weights are solved for in turns at most."""

Correlations = Callable[[int, int], Array]
"""Pearson's correlation [h, h] of the neurons of two blocks, the first before the second."""


def aligned(count: int, width: int, correlation: Correlations) -> Array:
    """Permutations by largest total correlation with the first block (arXiv 2501.06126, eq. 3), [count, width]."""
    rows = [np.arange(width)]
    for block in range(1, count):
        _, columns = optimize.linear_sum_assignment(correlation(0, block), maximize=True)
        rows.append(columns)
    return np.stack(rows)


def matched(weights: Sequence[Array], correlation: Correlations) -> tuple[Array, Array]:
    """Assigns neurons to slots so that little is lost when each slot keeps the one that matters most.

    A slot that holds neurons of weights p and q that are alike by r loses (1 - r^2) min(p, q): all that the lesser one
    does and the greater one cannot do for it. Copies meet their copies; what corresponds to nothing meets what matters
    least. Blocks join one after the other.

    Args:
        weights: How much each neuron does for its block's output, [h] for each block.
        correlation: How alike the neurons are, in [-1, 1].

    Returns:
        The alignment, and for each slot the block whose neuron it keeps, [h].
    """
    width = len(weights[0])
    slots = np.arange(width)
    rows, kept, best = [slots], np.zeros(width, np.intp), weights[0].copy()
    for block in range(1, len(weights)):
        alike = np.empty((width, width))
        for other in np.unique(kept):
            mine = kept == other
            alike[mine] = correlation(int(other), block)[rows[other][mine]]
        loss = (1.0 - np.square(alike)) * np.minimum(best[:, None], weights[block][None])
        _, columns = optimize.linear_sum_assignment(loss)
        rows.append(columns)
        joined = weights[block][columns]
        kept = np.where(joined > best * (1 + 1e-9), block, kept)
        best = np.maximum(best, joined)
    return np.stack(rows), kept


def likeness(a: Weights, b: Weights) -> Array:
    """How alike the neurons of two blocks are by what they compute from an input: 2 u.v / (|u|^2 + |v|^2), [h, h].

    u and v hold a neuron's weights and biases in the Linears that read the input; 1 says that both are the same.
    """
    u, v = _columns(a), _columns(b)
    sizes = np.square(u).sum(0)[:, None] + np.square(v).sum(0)[None]
    return 2.0 * (u.T @ v) / np.maximum(sizes, 1e-30)


def _columns(weights: Weights) -> Array:
    biases = [offset[None] for offset in weights.offsets[:-1] if offset is not None]
    return np.concatenate([*weights.matrices[:-1], *biases])


def permuted(weights: Weights, order: Array) -> Weights:
    """The same block with its neurons in another order; never its inputs and outputs."""
    first = tuple(matrix[:, order] for matrix in weights.matrices[:-1])
    biases = tuple(None if offset is None else offset[order] for offset in weights.offsets[:-1])
    return Weights((*first, weights.matrices[-1][order]), (*biases, weights.offsets[-1]), weights.scale)


def average(blocks: Sequence[Weights]) -> Weights:
    """The mean of aligned weights, biases too (arXiv 2501.06126, section 3.3)."""
    return Weights(
        tuple(np.mean(group, axis=0) for group in zip(*(block.matrices for block in blocks), strict=True)),
        tuple(
            np.mean(there, axis=0) if (there := _present(group)) else None
            for group in zip(*(block.offsets for block in blocks), strict=True)
        ),
    )


def mixed(blocks: Sequence[Weights], kept: Array) -> Weights:
    """Each slot's neuron from the block that it is kept of; the last offset is the first block's."""
    slots = np.arange(len(kept))
    first = tuple(
        np.stack([block.matrices[place].T for block in blocks])[kept, slots].T
        for place in range(len(blocks[0].matrices) - 1)
    )
    biases = tuple(
        np.stack(there)[kept, slots] if (there := _present(group)) else None
        for group in zip(*(block.offsets[:-1] for block in blocks), strict=True)
    )
    last = np.stack([block.matrices[-1] for block in blocks])[kept, slots]
    return Weights((*first, last), (*biases, blocks[0].offsets[-1]))


def _present(group: Sequence[Array | None]) -> list[Array]:
    return [array for array in group if array is not None]


# The last Linear and what is each block's own


@dataclass(frozen=True, eq=False)
class Sums:
    """What one block has to give, by the shared neurons as they are on its own input.

    Attributes:
        G: E a'a about the mean (about 0 without biases), float64 [h, h].
        C: E a'y, likewise [h, q].
        power: E |y|^2 about 0.
        spread: E |y|^2, about what G is about.
        means: Of a and y; zeros without biases.
    """

    G: Array
    C: Array
    power: float
    spread: float
    means: tuple[Array, Array]

    @classmethod
    def of(cls, gram: GramMatrix, *, biased: bool) -> Sums:
        """The sums of a Gram matrix of [1, a, y]."""
        power = gram.power(2)
        if not biased:
            gram = gram.through_origin()
        problem = Problem.of(gram, 1, 2)
        means = problem.x_mean, problem.y_mean
        spread = max(gram.power(2) - float(means[1] @ means[1]), 0.0)
        return cls(problem.G, problem.C, power, spread, means)

    def error(self, matrix: Array, offset: Array | None) -> float:
        """E |y - a matrix - offset|^2 / E |y|^2; the best offset where none is given."""
        lost = self.spread + float(np.sum(matrix * (self.G @ matrix - 2.0 * self.C)))
        gap = 0.0 if offset is None else self.means[1] - self.means[0] @ matrix - offset
        total = max(lost, 0.0) + float(np.sum(np.square(gap)))
        return total / self.power if self.power > 0 else (0.0 if total == 0 else float("inf"))


def tied_error(sums: Sequence[Sums], weights: Sequence[Weights]) -> float:
    """Root mean relative squared error of the blocks with these last Linears."""
    errors = [
        one.error(
            own.matrices[-1] if own.scale is None else own.scale[:, None] * own.matrices[-1], own.offsets[-1]
        )
        for one, own in zip(sums, weights, strict=True)
    ]
    return float(np.sqrt(np.mean(errors)))


@dataclass(frozen=True, eq=False)
class Tied:
    """Shared weights of the last Linear and what is each block's own.

    Attributes:
        matrix: float64 [h, q].
        scales: What each block multiplies its hidden channels by, [k, h]; None for nothing.
        ridge: The strength chosen on the held-out rows.
        error: Root mean relative squared error on the held-out rows.
    """

    matrix: Array
    scales: Array | None
    ridge: float
    error: float

    def offsets(self, sums: Sequence[Sums]) -> list[Array]:
        """The best offset of each block."""
        return [
            one.means[1]
            - (one.means[0] if self.scales is None else one.means[0] * self.scales[place]) @ self.matrix
            for place, one in enumerate(sums)
        ]


def tied_fit(fit: Sequence[Sums], heldout: Sequence[Sums], prior: Array, own: Array | None) -> Tied:
    """Fits y_i ~ a_i diag(s_i) W + b_i with one W for all blocks, each counted relative to its own output.

    For given scales W solves ridge regression on the sums of s_i G_i s_i and s_i C_i; for a given W the scales of a
    block solve (G_i o W W') s_i = diag(C_i W'). Both in turns; offsets follow from the means. Starts from scales of 1
    and, where blocks may have scales, from those that leave each block the neurons that are its own: then it is no
    worse than blocks that were narrowed to these. Ridges shrink W towards the neurons' own weights and scales
    towards where they started.

    Args:
        fit: Sums of the rows fitted to, block by block.
        heldout: Those of the rows that choose the ridge and the start.
        prior: float64 [h, q]: the weights that the shared neurons have in their own blocks.
        own: bool [k, h]: whether a neuron is the block's own; None for no scales.
    """
    starts = [None] if own is None else [np.ones(own.shape), own.astype(np.float64)]
    found = [_from(fit, heldout, prior, start) for start in starts]
    return min(found, key=lambda tied: tied.error)


def _from(fit: Sequence[Sums], heldout: Sequence[Sums], prior: Array, start: Array | None) -> Tied:
    scales = start
    best = min(
        (_measured(heldout, _shared(fit, scales, prior, ridge), scales, ridge) for ridge in RIDGES),
        key=lambda tied: tied.error,
    )
    if start is None:
        return best
    for _ in range(ROUNDS):
        scales = np.stack(
            [_scale(one, best.matrix, begin, best.ridge) for one, begin in zip(fit, start, strict=True)]
        )
        found = _measured(heldout, _shared(fit, scales, prior, best.ridge), scales, best.ridge)
        if found.error >= best.error:
            break
        best = found
    return best


def _measured(heldout: Sequence[Sums], matrix: Array, scales: Array | None, ridge: float) -> Tied:
    tied = Tied(matrix, scales, ridge, 0.0)
    errors = [
        one.error(matrix if scales is None else scales[place][:, None] * matrix, None)
        for place, one in enumerate(heldout)
    ]
    return replace(tied, error=float(np.sqrt(np.mean(errors))))


def _shared(fit: Sequence[Sums], scales: Array | None, prior: Array, ridge: float) -> Array:
    """The W of all blocks for given scales."""
    G, C = np.zeros_like(fit[0].G), np.zeros_like(fit[0].C)
    for place, one in enumerate(fit):
        weight = 1.0 / max(one.power, 1e-30)
        s = np.ones(len(G)) if scales is None else scales[place]
        G += weight * (s[:, None] * one.G * s)
        C += weight * (s[:, None] * one.C)
    return prior + ridge_solve(G, C - G @ prior, ridge)


def _scale(one: Sums, matrix: Array, start: Array, ridge: float) -> Array:
    """The scales of one block for a given W."""
    H = one.G * (matrix @ matrix.T)
    right = np.einsum("ij,ij->i", one.C, matrix) - H @ start
    return start + ridge_solve(H, right[:, None], ridge)[:, 0]


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of blocks in order."""
    return list(combinations(range(count), 2))
