# SPDX-License-Identifier: Apache-2.0
"""Weights that several feed-forward blocks can share: which neurons correspond, and what all of them become.

Blocks are numbered from 0 in a window. An alignment is [k, h]: row i says which neuron of block i takes each slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
from scipy import optimize

from onnxcollapse.calibration.leastsquares import RIDGES, Problem, ridge_solve
from onnxcollapse.calibration.statistics import GramMatrix
from onnxcollapse.structure.constants import Array
from onnxcollapse.structure.tying import Weights

T = TypeVar("T")

ROUNDS = 3
"""How often scales and shared weights are solved for in turns at most."""

ROWS = 64
"""Rows of a wide matrix that are scaled at a time: in cache, and without a copy of it."""

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


def average(blocks: Iterable[Weights]) -> Weights:
    """The mean of aligned weights, biases too (arXiv 2501.06126, section 3.3); blocks come one after the other."""
    waiting = iter(blocks)
    total, count = next(waiting), 1
    for one in waiting:
        total, count = _each(np.add, total, one), count + 1
    return _each(lambda array: array / count, total)


def _each(function: Callable[..., Array], *blocks: Weights) -> Weights:
    """What a function makes of the weights that correspond."""
    return Weights(
        tuple(map(function, *(block.matrices for block in blocks))),
        tuple(
            function(*there) if (there := _present(group)) else None
            for group in zip(*(block.offsets for block in blocks), strict=True)
        ),
    )


def mixed(blocks: Iterable[Weights], kept: Array) -> Weights:
    """Each slot's neuron from the block that it is kept of; the last offset is the first's.

    Args:
        blocks: Aligned, one after the other.
        kept: The block of each slot, [h].
    """
    waiting = iter(blocks)
    found = next(waiting)
    for place, one in enumerate(waiting, 1):
        found = _joined(found, one, kept == place)
    return found


def _joined(block: Weights, other: Weights, mine: Array) -> Weights:
    """A block with some neurons, bool [h], of another one."""
    first = [
        np.where(mine, new, old) for old, new in zip(block.matrices[:-1], other.matrices[:-1], strict=True)
    ]
    last = np.where(mine[:, None], other.matrices[-1], block.matrices[-1])
    biases = [
        np.where(mine, there[1], there[0]) if (there := _present(group)) else None
        for group in zip(block.offsets[:-1], other.offsets[:-1], strict=True)
    ]
    return Weights((*first, last), (*biases, block.offsets[-1]))


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
            means = np.zeros(gram.widths[0]), np.zeros(gram.widths[1])
            return cls(gram.block(1, 1), gram.block(1, 2), power, power, means)
        problem = Problem.of(gram, 1, 2)
        means = problem.x_mean, problem.y_mean
        return cls(problem.G, problem.C, power, max(power - float(means[1] @ means[1]), 0.0), means)

    def error(self, matrix: Array, offset: Array | None) -> float:
        """E |y - a matrix - offset|^2 / E |y|^2; the best offset where none is given."""
        lost = self.spread + float(np.sum(matrix * (self.G @ matrix - 2.0 * self.C)))
        gap = 0.0 if offset is None else self.means[1] - self.means[0] @ matrix - offset
        total = max(lost, 0.0) + float(np.sum(np.square(gap)))
        return total / self.power if self.power > 0 else (0.0 if total == 0 else float("inf"))


@dataclass(frozen=True, eq=False)
class BlockSums:
    """The sums of the blocks of a window, in memory one block's at a time, however many blocks there are.

    Attributes:
        count: Blocks.
        gram: Gives the Gram matrix of [1, a, y] of a block.
        biased: Whether the blocks' outputs have biases.
    """

    count: int
    gram: Callable[[int], GramMatrix]
    biased: bool

    def each(self, use: Callable[[int, Sums], T]) -> list[T]:
        """What is made of each block's number and sums."""
        return [use(place, Sums.of(self.gram(place), biased=self.biased)) for place in range(self.count)]


def tied_error(sums: BlockSums, weights: Sequence[Weights]) -> float:
    """Root mean relative squared error of the blocks with these last Linears."""

    def error(place: int, one: Sums) -> float:
        own = weights[place]
        return one.error(_times(own.scale, own.matrices[-1]), own.offsets[-1])

    return float(np.sqrt(np.mean(sums.each(error))))


def _times(scale: Array | None, matrix: Array) -> Array:
    return matrix if scale is None else scale[:, None] * matrix


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
    error: float = float("inf")

    def scale(self, place: int) -> Array | None:
        """The factors of one block."""
        return None if self.scales is None else self.scales[place]

    def offsets(self, sums: BlockSums) -> list[Array]:
        """The best offset of each block."""

        def offset(place: int, one: Sums) -> Array:
            scale = self.scale(place)
            best: Array = (
                one.means[1] - (one.means[0] if scale is None else one.means[0] * scale) @ self.matrix
            )
            return best

        return sums.each(offset)


def tied_fit(fit: BlockSums, heldout: BlockSums, prior: Array, own: Array | None) -> Tied:
    """Fits y_i ~ a_i diag(s_i) W + b_i with one W for all blocks, each counted relative to its own output.

    For given scales W solves ridge regression on the sums of s_i G_i s_i and s_i C_i; for a given W the scales of a
    block solve (G_i o W W') s_i = diag(C_i W'). Both in turns; offsets follow from the means. Starts from scales of 1
    and, where blocks may have scales, from those that leave each block the neurons that are its own: then it is no
    worse than blocks that were narrowed to these. Ridges shrink W towards the neurons' own weights and scales
    towards where they started.

    Args:
        fit: Sums of the rows fitted to.
        heldout: Those of the rows that choose the ridge and the start.
        prior: float64 [h, q]: the weights that the shared neurons have in their own blocks.
        own: bool [k, h]: whether a neuron is the block's own; None for no scales.
    """
    starts = [None] if own is None else [np.ones(own.shape), own.astype(np.float64)]
    found = [_from(fit, heldout, prior, start) for start in starts]
    return min(found, key=lambda tied: tied.error)


def _from(fit: BlockSums, heldout: BlockSums, prior: Array, start: Array | None) -> Tied:
    problem = _Joint(prior)
    fit.each(lambda place, one: problem.add(one, None if start is None else start[place]))
    best = _best(heldout, [Tied(problem.solve(ridge), start, ridge) for ridge in RIDGES])
    if start is None:
        return best
    for _ in range(ROUNDS):
        found = _best(heldout, [_again(fit, best, prior, start)])
        if found.error >= best.error:
            break
        best = found
    return best


def _again(fit: BlockSums, tied: Tied, prior: Array, start: Array) -> Tied:
    """The best scales for a W, and the best W for these."""
    square, problem = tied.matrix @ tied.matrix.T, _Joint(prior)

    def scale(place: int, one: Sums) -> Array:
        """Of one block, whose sums with it join the problem."""
        H = one.G * square
        right = np.einsum("ij,ij->i", one.C, tied.matrix) - H @ start[place]
        found: Array = start[place] + ridge_solve(H, right[:, None], tied.ridge)[:, 0]
        problem.add(one, found)
        return found

    scales = np.stack(fit.each(scale))
    return Tied(problem.solve(tied.ridge), scales, tied.ridge)


def _best(heldout: BlockSums, candidates: Sequence[Tied]) -> Tied:
    """The one of the smallest error on the held-out rows, the first of equal ones."""

    def errors(place: int, one: Sums) -> list[float]:
        return [one.error(_times(tied.scale(place), tied.matrix), None) for tied in candidates]

    means = np.sqrt(np.mean(heldout.each(errors), axis=0))
    best = int(np.argmin(means))
    return replace(candidates[best], error=float(means[best]))


class _Joint:
    """The ridge regression that W solves for all blocks, whose sums join one after the other.

    Args:
        prior: What W shrinks towards, [h, q].
    """

    def __init__(self, prior: Array) -> None:
        self._prior = prior
        self._G, self._C = np.zeros((len(prior), len(prior))), np.zeros(prior.shape)

    def add(self, one: Sums, scale: Array | None) -> None:
        """Takes in a block's sums with its scales, relative to the power of its output; some rows at a time."""
        weight = 1.0 / max(one.power, 1e-30)
        s = np.ones(len(one.G)) if scale is None else scale
        for start in range(0, len(s), ROWS):
            rows = slice(start, start + ROWS)
            self._G[rows] += weight * (s[rows, None] * one.G[rows] * s)
            self._C[rows] += weight * (s[rows, None] * one.C[rows])

    def solve(self, ridge: float) -> Array:
        """The W of all of them."""
        return self._prior + ridge_solve(self._G, self._C - self._G @ self._prior, ridge)


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of blocks in order."""
    return list(combinations(range(count), 2))
