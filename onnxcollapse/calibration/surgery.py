# SPDX-License-Identifier: Apache-2.0
"""Optimal brain surgeon on features: in which order groups of features leave a least-squares problem."""

from __future__ import annotations

import logging

import numpy as np
from scipy import linalg
from scipy.linalg import blas, lapack

from onnxcollapse.calibration.leastsquares import Problem
from onnxcollapse.calibration.statistics import GramMatrix
from onnxcollapse.errors import OptionError

logger = logging.getLogger(__name__)

STEPS_PER_FOLD = (
    64  # a step removes 1/64 of what remains, so below 128 groups it is one group: exactly greedy
)
WIDEST_STEP = 128  # features; wider ones gain BLAS nothing and look less closely
CANDIDATES = (
    8  # per group removed in a step: as good as exact in trials; with 3, single sets differed by 10 %
)
FINEST = 1e-9  # least ridge of an elimination: H stays finite and keeps seven digits
COARSEST = 1e3  # a ridge that no covariance needs


def removal_order(
    fit: GramMatrix,
    fixed: np.ndarray,
    features: np.ndarray,
    targets: np.ndarray,
    removals: int,
    *,
    ridge: float,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Removes groups of features one after the other, each time (nearly) the cheapest.

    METHODS 0 in block form (optimal brain surgeon, Hassibi and Stork 1993): with H = (G + lambda I)^-1 and
    W = H C, taking out group g raises the ridge objective by tr(W_g' (H_gg)^-1 W_g), and the best refit of the
    rest is W -= H_:g (H_gg)^-1 W_g, H -= H_:g (H_gg)^-1 H_g:. The fixed features are eliminated beforehand
    (a Schur complement), since they never leave. With 128 groups or more a step removes up to 1/64 of those
    that remain: eight times as many candidates of lowest cost compete exactly, one at a time, and all else is
    updated once. F removable and f fixed features, q targets: time O((F + f)^3 + F^2 q), memory about
    2 (F + f)^2 + 3 (F + f) q doubles beside the sums.

    Args:
        fit: Sums of the rows fitted to.
        fixed: Columns [f] that stay.
        features: Columns [groups, group] that may leave, a row at a time.
        targets: Columns [q] of y.
        removals: How many groups leave.
        ridge: lambda relative to the mean variance of all features; raised where H would lose its digits.
        weights: float64 [q], what the squared error of each target counts; 1 without.

    Returns:
        The groups in the order they leave, intp [removals].

    Raises:
        OptionError: The sums are no covariance (not finite, or indefinite).
    """
    everything = np.concatenate([fixed, features.ravel()])
    variances = fit.matrix[everything, everything] / max(fit.count, 1.0) - np.square(fit.mean(everything))
    unit = float(variances.mean())
    scale = None if weights is None else np.sqrt(weights)
    order: list[int] = []
    ridge = max(ridge, FINEST)
    left = np.arange(len(features))
    while len(order) < removals:
        if not ridge <= COARSEST:
            raise OptionError("sums of the features are no covariance: indefinite; collect them again")
        try:
            H, W = _start(fit, fixed, features[left].ravel(), targets, scale, ridge * unit)
            surgery = _Surgery(H, W, left)
            del H, W  # the surgery replaces them as they shrink
            while len(order) < removals:
                order += surgery.step(removals - len(order))
        except linalg.LinAlgError:  # rounding, in the sums or in H: more ridge, from where we stand
            ridge *= 10
            left = np.setdiff1d(left, order)
            logger.debug("elimination of %d groups goes on with ridge %g", len(left), ridge)
    return np.array(order, np.intp)


def _start(
    fit: GramMatrix,
    fixed: np.ndarray,
    features: np.ndarray,
    targets: np.ndarray,
    scale: np.ndarray | None,
    shift: float,
) -> tuple[np.ndarray, np.ndarray]:
    """H (upper triangle) and W of the features that may leave, the fixed ones fitted along with them."""
    problem = Problem.of(fit, np.concatenate([fixed, features]), targets)
    A, C = problem.G, problem.C
    del problem
    A[np.diag_indices_from(A)] += shift
    if scale is not None:
        C *= scale
    if len(fixed):
        A, C = _schur(A, C, len(fixed))
    C = _thin(C)
    # A is symmetric, so its transpose is itself in the column-major order that LAPACK overwrites in place.
    factor, info = lapack.dpotrf(A.T, lower=1, clean=0, overwrite_a=1)
    _succeed(info)
    W = np.ascontiguousarray(linalg.cho_solve((factor, True), C, check_finite=False))
    if not np.isfinite(W).all():  # OpenBLAS factors a matrix with NaN without complaint
        raise OptionError("sums of the features or targets are not finite; collect them again")
    H, info = lapack.dpotri(factor, lower=1, overwrite_c=1)
    _succeed(info)
    return H.T, W


def _schur(A: np.ndarray, C: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the problem is for the other features once the first `size` are always fitted; upper triangle."""
    factor = linalg.cholesky(A[:size, :size], lower=True, check_finite=False)
    cross = linalg.solve_triangular(factor, A[:size, size:], lower=True, check_finite=False)
    explained = linalg.solve_triangular(factor, C[:size], lower=True, check_finite=False)
    rest = np.ascontiguousarray(A[size:, size:])
    rest = blas.dsyrk(-1.0, cross, beta=1.0, c=rest.T, trans=1, lower=1, overwrite_c=1).T
    return rest, C[size:] - cross.T @ explained


class _Surgery:
    """H and W of the groups that remain, and those already removed until the next compaction.

    H is valid in its upper triangle only: symmetric updates then cost half.
    """

    def __init__(self, H: np.ndarray, W: np.ndarray, groups: np.ndarray) -> None:
        self._H = H
        self._W = W
        self._groups = groups
        self._size = len(H) // len(groups)
        self._alive = np.ones(len(groups), bool)

    def step(self, limit: int) -> list[int]:
        """Removes at most `limit` groups and names them in order."""
        count = int(self._alive.sum())
        picks = min(count // STEPS_PER_FOLD, WIDEST_STEP // self._size, limit)
        costs = self._costs()
        costs[~self._alive] = np.inf
        if picks <= 1:
            chosen = np.array([costs.argmin()])
        else:
            chosen = self._compete(np.sort(np.argsort(costs, kind="stable")[: CANDIDATES * picks]), picks)
        self._remove(chosen)
        names = self._groups[chosen].tolist()
        if count - len(chosen) < 0.9 * len(self._groups):
            self._compact()
        return names

    def _costs(self) -> np.ndarray:
        own = self._features(np.arange(len(self._groups))).reshape(-1, self._size)
        blocks = _mirrored(self._H[own[:, :, None], own[:, None, :]])
        blocks[~self._alive] = np.eye(self._size)
        W = self._W.reshape(len(own), self._size, -1)
        return _costs(blocks, W @ W.transpose(0, 2, 1))

    def _compete(self, candidates: np.ndarray, picks: int) -> np.ndarray:
        """The cheapest candidates, each removed exactly before the next is chosen."""
        index = self._features(candidates)
        # SciPy's BLAS, as for all large products here: NumPy's own has other threads, and they would collide.
        M = _mirrored(blas.dsyrk(1.0, self._W[index].T, trans=1))
        return candidates[_greedy(_mirrored(self._H[np.ix_(index, index)]), M, self._size, picks)]

    def _remove(self, chosen: np.ndarray) -> None:
        """The rank-b update H -= H_:B H_BB^-1 H_B:, W -= H_:B H_BB^-1 W_B, in place."""
        index = self._features(chosen)
        rows = np.where(np.arange(len(self._H)) >= index[:, None], self._H[index], self._H[:, index].T)
        factor = linalg.cholesky(rows[:, index], lower=True, check_finite=False)
        # Transposes of row-major arrays are column-major: BLAS reads and overwrites them without a copy.
        half = blas.dtrsm(1.0, factor, rows.T, side=1, lower=1, trans_a=1, overwrite_b=1)
        own = blas.dtrsm(1.0, factor, self._W[index].T, side=1, lower=1, trans_a=1, overwrite_b=1)
        self._H = blas.dsyrk(-1.0, half, beta=1.0, c=self._H.T, lower=1, overwrite_c=1).T
        self._W = blas.dgemm(-1.0, own, half, beta=1.0, c=self._W.T, trans_b=1, overwrite_c=1).T
        self._alive[chosen] = False

    def _compact(self) -> None:
        index = self._features(np.flatnonzero(self._alive))
        self._H = self._H[np.ix_(index, index)]
        self._W = _thin(self._W[index])
        self._groups = self._groups[self._alive]
        self._alive = np.ones(len(self._groups), bool)

    def _features(self, groups: np.ndarray) -> np.ndarray:
        return (groups[:, None] * self._size + np.arange(self._size)).ravel()


def _greedy(H: np.ndarray, M: np.ndarray, size: int, picks: int) -> list[int]:
    """Exact one-at-a-time elimination among a few groups, from H and M = W W' alone: q does not matter.

    Args:
        H: Their part of the inverse, [K size, K size].
        M: W W' of their rows, likewise.
        size: Features in a group.
        picks: How many groups to remove.

    Returns:
        The places of the removed groups, in order.
    """
    own = np.arange(len(H)).reshape(-1, size)
    H_own, M_own = (A[own[:, :, None], own[:, None, :]] for A in (H, M))
    # So far H - V V' and M - V U' - U V', worked out only where they are asked for: the columns just chosen.
    V, U = np.zeros((2, len(H), picks * size))
    taken: list[int] = []
    for done in range(0, picks * size, size):
        costs = _costs(H_own, M_own)
        costs[taken] = np.inf
        taken.append(int(costs.argmin()))
        at, past, now = own[taken[-1]], slice(done), slice(done, done + size)
        factor = np.linalg.cholesky(H_own[taken[-1]])
        v = np.linalg.solve(factor, (H[:, at] - V[:, past] @ V[at, past].T).T).T
        cross = M[:, at] - V[:, past] @ U[at, past].T - U[:, past] @ V[at, past].T
        m = np.linalg.solve(factor, cross.T).T
        u = m - 0.5 * v @ np.linalg.solve(factor, m[at])
        V[:, now], U[:, now] = v, u
        v_own, u_own = v[own], u[own]
        H_own -= v_own @ v_own.transpose(0, 2, 1)
        M_own -= v_own @ u_own.transpose(0, 2, 1) + u_own @ v_own.transpose(0, 2, 1)
        H_own[taken] = np.eye(size)
    return taken


def _costs(H: np.ndarray, M: np.ndarray) -> np.ndarray:
    """tr(H_gg^-1 W_g W_g') of each group, from the diagonal blocks [groups, size, size] of H and of W W'."""
    if np.diagonal(H, axis1=1, axis2=2).min() <= 0:
        raise linalg.LinAlgError("the inverse has lost its digits")
    if H.shape[1] == 1:
        return M[:, 0, 0] / H[:, 0, 0]
    return np.trace(np.linalg.solve(H, M), axis1=1, axis2=2)


def _mirrored(upper: np.ndarray) -> np.ndarray:
    """Symmetric matrices [..., n, n] from their upper triangles."""
    strict = np.triu(upper, 1)
    return np.triu(upper) + np.swapaxes(strict, -1, -2)


def _thin(W: np.ndarray) -> np.ndarray:
    """Rows with the same inner products in no more columns than there are rows, where that pays."""
    if W.shape[1] <= 1.5 * len(W):
        return W
    triangle: np.ndarray = linalg.qr(W.T, mode="r", check_finite=False)[0][: len(W)]
    return np.ascontiguousarray(triangle.T)


def _succeed(info: int) -> None:
    if info:
        raise linalg.LinAlgError("not positive definite in float64")
