# SPDX-License-Identifier: Apache-2.0
"""Least squares from sums: fits and their held-out errors without another forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from scipy import linalg

from onnxcollapse.calibration.statistics import GramMatrix, Selector
from onnxcollapse.errors import OptionError

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
PRIOR_RIDGES = (*RIDGES, 1.0)  # what stays near weights that were good may be held there by more

WIDEST = 2048
"""Features of more columns than this have no spectrum kept: it takes as much memory as their sums."""


@dataclass(frozen=True, eq=False)
class LinearFit:
    """y ~ x matrix + offset.

    Attributes:
        matrix: float64 [F, q].
        offset: float64 [q].
        ridge: The strength chosen on the held-out rows.
        fit_error: sqrt(E|y - fit|^2 / E|y|^2) on the rows fitted to.
        error: The same on the held-out rows; 0 is perfect, 1 is as good as answering 0.
        rank: The rank limit, None without one.
        basis: float64 [q, rank], orthonormal, with matrix = prior + A basis' when a rank was asked for.
    """

    matrix: np.ndarray
    offset: np.ndarray
    ridge: float
    fit_error: float
    error: float
    rank: int | None = None
    basis: np.ndarray | None = None

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The two thin matrices of a rank-limited fit without prior: matrix = A [F, r] @ B [r, q]."""
        if self.basis is None:
            raise OptionError("a fit of full rank has no factors; call ridge_fit with rank=")
        return self.matrix @ self.basis, self.basis.T


@dataclass(frozen=True)
class Problem:
    """Centred moments of features x and targets y.

    Attributes:
        G: Cov(x, x), float64 [F, F].
        C: Cov(x, y), float64 [F, q].
        x_mean: float64 [F].
        y_mean: float64 [q].
    """

    G: np.ndarray
    C: np.ndarray
    x_mean: np.ndarray
    y_mean: np.ndarray

    @classmethod
    def of(cls, gram: GramMatrix, features: Selector, targets: Selector) -> Problem:
        """The moments of columns of `gram`, in arrays of their own."""
        x_mean, y_mean = gram.mean(features), gram.mean(targets)
        G, C = gram.block(features, features), gram.block(features, targets)
        _take_outer(G, x_mean, x_mean)
        _take_outer(C, x_mean, y_mean)
        return cls(G, C, x_mean, y_mean)


def _take_outer(matrix: np.ndarray, left: np.ndarray, right: np.ndarray, rows: int = 64) -> None:
    """Takes left'right from a matrix, some rows at a time, so that no second one is made."""
    for start in range(0, len(matrix), rows):
        matrix[start : start + rows] -= np.outer(left[start : start + rows], right)


def ridge_fit(
    fit: GramMatrix,
    heldout: GramMatrix,
    features: Selector,
    targets: Selector,
    ridges: Sequence[float] = RIDGES,
    rank: int | None = None,
    *,
    prior: np.ndarray | None = None,
    spectrum: Spectrum | None = None,
) -> LinearFit:
    """Fits targets ~ features W + b by ridge regression, its strength chosen on held-out rows.

    METHODS 0 with the bias left unpenalised by centring: for covariances G = Cov(x, x), C = Cov(x, y),
    W = (G + lambda mean(diag G) I)^-1 C and b = E y - E x W. With a `rank`, reduced-rank regression
    (Izenman 1975): W <- W V V', V the leading eigenvectors of the fitted values' covariance W' G W. With a
    `prior` P, W = P + (G + lambda mean(diag G) I)^-1 (C - G P): shrinks towards P, not 0, and limits the rank
    of W - P.

    Args:
        fit: Sums of the rows fitted to.
        heldout: Sums of the rows that choose the ridge strength.
        features: Columns of x [n, F].
        targets: Columns of y [n, q].
        ridges: Strengths to try, relative to the mean feature variance; 0 gives the minimum-norm solution.
        rank: Largest rank of W, None for no limit.
        prior: float64 [F, q] to shrink towards, None for 0.
        spectrum: Of the features, from whoever fits several targets to them: finds the best ridge at the cost of one.

    Returns:
        The fit with the smallest held-out error; the stronger ridge wins a tie.

    Raises:
        OptionError: No ridges, a negative one, or a rank below 1.
    """
    if not ridges or min(ridges) < 0 or (rank is not None and rank < 1):
        raise OptionError(
            f"ridges {tuple(ridges)} must be >= 0 and rank {rank} at least 1; correct the options"
        )
    problem = Problem.of(fit, features, targets)
    errors = _Errors(heldout, features, targets)
    if spectrum is not None and rank is None and prior is None and len(ridges) > 1:
        ridges = spectrum.best(problem, errors, ridges)
    fits = []
    right = problem.C if prior is None else problem.C - problem.G @ prior
    for ridge in sorted(ridges, reverse=True):
        matrix, basis = _solve(problem.G, right, ridge, rank)
        matrix = matrix if prior is None else prior + matrix
        offset = problem.y_mean - problem.x_mean @ matrix
        fits.append((errors.relative(matrix, offset), matrix, offset, ridge, basis))
    error, matrix, offset, ridge, basis = min(fits, key=lambda candidate: candidate[0])
    fit_error = relative_error(fit, features, targets, matrix, offset)
    return LinearFit(matrix, offset, ridge, fit_error, error, rank, basis)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvectors Q of features' covariance G = Q L Q' on the rows fitted to.

    Attributes:
        values: L, float64 [F].
        vectors: Q, float64 [F, F].
        turned: Q' H Q for the covariance H of the held-out rows, float64 [F, F].
    """

    values: np.ndarray
    vectors: np.ndarray
    turned: np.ndarray

    _shared: ClassVar[WeakKeyDictionary[GramMatrix, Spectrum]] = WeakKeyDictionary()

    @classmethod
    def of(cls, fit: GramMatrix, heldout: GramMatrix) -> Spectrum | None:
        """That of all columns of a matrix, kept as long as `fit` is; None where they are too many to keep it.

        Args:
            fit: Sums of the rows fitted to.
            heldout: Sums of the same columns over the held-out rows that go with `fit`, always the same ones.
        """
        if sum(fit.widths) > WIDEST:
            return None
        if fit not in cls._shared:
            every = np.arange(1, len(fit.matrix))
            here, there = (Problem.of(gram, every, every[:0]) for gram in (fit, heldout))
            values, vectors = linalg.eigh(here.G, driver="evd", check_finite=False)
            cls._shared[fit] = cls(values, vectors, vectors.T @ there.G @ vectors)
        return cls._shared[fit]

    def best(self, problem: Problem, errors: _Errors, ridges: Sequence[float]) -> Sequence[float]:
        """The ridge with the smallest held-out error, the stronger one in a tie; all where G is nearly singular.

        With A = Q'C, B = Q' Cov(x, y) of the held-out rows and d = 1 / (L + l), the fit is W = Q diag(d) A, so that
        tr(W'HW) = d' (Q'HQ * AA') d and tr(W'B) = d . rowsum(A * B): no product of matrices for each ridge.
        """
        there = errors.problem
        A = self.vectors.T @ problem.C
        square = self.turned * (A @ A.T)
        cross = np.sum(A * (self.vectors.T @ there.C), 1)
        y_gap, x_gap = there.y_mean - problem.y_mean, self.vectors.T @ (there.x_mean - problem.x_mean)
        found = []
        for ridge in sorted(ridges, reverse=True):
            shifted = self.values + ridge * max(float(np.mean(self.values)), 0.0)
            if shifted[0] <= shifted[-1] * np.finfo(np.float64).eps ** 0.5:
                return ridges
            d = 1.0 / shifted
            bias = y_gap - (x_gap * d) @ A
            variance = errors.spread + float(d @ square @ d - 2 * (cross @ d))
            found.append((max(variance, 0.0) + float(bias @ bias), ridge))
        return [min(found, key=lambda candidate: candidate[0])[1]]


@dataclass(frozen=True, eq=False)
class RankPath:
    """The best maps of every rank below a fit: rank r keeps the first r columns of the basis.

    Attributes:
        fit: The fit of full rank.
        basis: float64 [q, q], orthonormal, by falling share of the fitted values.
        errors: float64 [q]: relative held-out error of ranks 1 to q.
        x_mean: Mean features [F] of the rows fitted to.
        y_mean: Mean targets [q], likewise.
    """

    fit: LinearFit
    basis: np.ndarray
    errors: np.ndarray
    x_mean: np.ndarray
    y_mean: np.ndarray

    def within(self, slack: float) -> int:
        """The smallest rank whose held-out error is at most (1 + slack) times that of full rank."""
        enough = np.flatnonzero(self.errors <= (1.0 + slack) * self.fit.error)
        return int(enough[0]) + 1 if len(enough) else len(self.errors)

    def at(self, rank: int) -> LinearFit:
        """The map of one rank."""
        basis = self.basis[:, :rank]
        matrix = self.fit.matrix @ basis @ basis.T
        offset = self.y_mean - self.x_mean @ matrix
        error = float(self.errors[rank - 1])
        return LinearFit(matrix, offset, self.fit.ridge, self.fit.fit_error, error, rank, basis)


def rank_path(
    fit: GramMatrix, heldout: GramMatrix, features: Selector, targets: Selector, base: LinearFit
) -> RankPath:
    """Finds the held-out error of every rank at once.

    With V the eigenvectors of the fitted values' covariance W' G W (reduced-rank regression, Izenman 1975),
    the error of W V_r V_r' on any rows is a running sum over r, because V is orthonormal:
    T - sum_i<=r [2 (V' C' W V)_ii - (V' W' G W V)_ii], plus the squared bias of the means.

    Args:
        fit: Sums of the rows fitted to.
        heldout: Sums of the rows that the errors are of.
        features: Columns of x [n, F].
        targets: Columns of y [n, q].
        base: The fit of full rank on `fit`, without a prior.

    Returns:
        The path over all ranks.
    """
    here, there = Problem.of(fit, features, targets), Problem.of(heldout, features, targets)
    basis = leading(base.matrix.T @ here.G @ base.matrix, len(here.y_mean))
    reduced = base.matrix @ basis
    gain = 2 * np.sum((there.C @ basis) * reduced, 0) - np.sum(reduced * (there.G @ reduced), 0)
    index = heldout.columns(targets)
    second = heldout.matrix[index, index] / max(heldout.count, 1.0)
    spread = float((second - np.square(there.y_mean)).sum())
    # Means: E y - offset - E x W V V' = (E y - E y_fit) - (E x - E x_fit) W V V', projected on V.
    y_gap = (there.y_mean - here.y_mean) @ basis
    x_gap = (there.x_mean - here.x_mean) @ reduced
    bias = float(y_gap @ y_gap) + np.cumsum(np.square(y_gap - x_gap) - np.square(y_gap))
    errors = np.maximum(spread - np.cumsum(gain), 0.0) + np.maximum(bias, 0.0)
    power = float(second.sum())
    relative = np.sqrt(errors / power) if power > 0 else np.zeros_like(errors)
    return RankPath(base, basis, relative, here.x_mean, here.y_mean)


def linear_error(
    gram: GramMatrix, features: Selector, targets: Selector, matrix: np.ndarray, offset: np.ndarray
) -> float:
    """E|y - x W - b|^2 over the rows behind `gram`: METHODS 0, T - 2 tr(W'C) + tr(W'GW), with a bias.

    Args:
        gram: The sums.
        features: Columns of x [n, F].
        targets: Columns of y [n, q].
        matrix: W [F, q].
        offset: b [q].

    Returns:
        The squared error of a row, summed over its q targets; never negative.
    """
    return _Errors(gram, features, targets).absolute(matrix, offset)


def relative_error(
    gram: GramMatrix, features: Selector, targets: Selector, matrix: np.ndarray, offset: np.ndarray
) -> float:
    """sqrt(linear_error / E|y|^2): 0 is perfect, 1 is as good as answering 0. Arguments as there."""
    return _Errors(gram, features, targets).relative(matrix, offset)


class _Errors:
    """The closed-form error of any linear candidate on one set of rows.

    Attributes:
        problem: Their moments.
        spread: Total variance of the targets.
    """

    def __init__(self, gram: GramMatrix, features: Selector, targets: Selector) -> None:
        self.problem = Problem.of(gram, features, targets)
        targets_at = gram.columns(targets)
        second = gram.matrix[targets_at, targets_at] / max(gram.count, 1.0)
        self._power = float(second.sum())
        self.spread = float((second - np.square(self.problem.y_mean)).sum())

    def absolute(self, matrix: np.ndarray, offset: np.ndarray) -> float:
        """Splits the error into variance and bias: centred sums cancel less than raw ones."""
        p = self.problem
        bias = p.y_mean - p.x_mean @ matrix - offset
        variance = self.spread + float(np.sum(matrix * (p.G @ matrix - 2 * p.C)))
        return max(variance, 0.0) + float(bias @ bias)

    def relative(self, matrix: np.ndarray, offset: np.ndarray) -> float:
        error = self.absolute(matrix, offset)
        if self._power > 0:
            return float(np.sqrt(error / self._power))
        return 0.0 if error == 0 else float("inf")


def _solve(
    G: np.ndarray, right: np.ndarray, ridge: float, rank: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    matrix = ridge_solve(G, right, ridge)
    if rank is None:
        return matrix, None
    basis = leading(matrix.T @ G @ matrix, rank)
    return matrix @ basis @ basis.T, basis


def ridge_solve(G: np.ndarray, C: np.ndarray, ridge: float) -> np.ndarray:
    """(G + ridge mean(diag G) I)^-1 C by Cholesky; a G too singular for it by its eigenvectors."""
    if not len(G):
        return np.zeros_like(C)  # no features: the offset alone answers
    shifted = G.copy()
    shifted[np.diag_indices_from(shifted)] += ridge * max(float(np.mean(np.diag(G))), 0.0)
    try:
        factor = linalg.cho_factor(shifted, lower=True, check_finite=False)
        pivots = np.abs(np.diag(factor[0]))
        if pivots.min() > pivots.max() * np.finfo(np.float64).eps ** 0.5:
            return linalg.cho_solve(factor, C, check_finite=False)
    except linalg.LinAlgError:
        pass  # not positive definite in fp64: the minimum-norm solution below is always defined
    return _pseudo_solve(shifted, C)


def _pseudo_solve(G: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Minimum-norm solution of G W = C: directions without variance get no weight."""
    values, vectors = linalg.eigh(G, check_finite=False)
    floor = max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    keep = values > floor
    vectors = vectors[:, keep]
    return (vectors / values[keep]) @ (vectors.T @ C)


def leading(covariance: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` leading eigenvectors [q, rank] of a symmetric matrix [q, q], signs made unique.

    All are computed: divide and conquer takes a third of the time of a selection of more than a few.
    """
    _, vectors = linalg.eigh(covariance, driver="evd", check_finite=False)
    vectors = vectors[:, ::-1][:, :rank]
    peaks = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    return vectors * np.where(peaks < 0, -1.0, 1.0)
