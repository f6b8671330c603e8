# SPDX-License-Identifier: Apache-2.0
"""Subset and refit: which groups of features to keep, and the best map from those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcollapse.calibration.leastsquares import PRIOR_RIDGES, RIDGES, ridge_fit
from onnxcollapse.calibration.statistics import GramMatrix, Selector
from onnxcollapse.calibration.surgery import removal_order
from onnxcollapse.errors import OptionError

DEAD = 1e-12  # variance relative to the mean variance, or to the squared mean: nothing but rounding
SAMPLED_TARGETS = 512  # enough to choose the ridge of the elimination by


@dataclass(frozen=True, eq=False)
class SubsetFit:
    """y ~ [fixed, kept groups] matrix + offset.

    Attributes:
        keep: intp, sorted: the groups that stay.
        matrix: float64 [n_fixed + len(keep) * group, q]: rows first of the fixed features, in their order,
            then of the kept groups.
        offset: float64 [q].
        ridge: The strength chosen on the held-out rows.
        fit_error: sqrt(E|y - fit|^2 / E|y|^2) on the rows fitted to.
        error: The same on the held-out rows.
    """

    keep: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray
    ridge: float
    fit_error: float
    error: float


def eliminate(
    fit: GramMatrix,
    heldout: GramMatrix,
    removable: Selector,
    targets: Selector,
    counts: Sequence[int],
    *,
    fixed: Selector = (),
    group: int = 1,
    ridges: Sequence[float] | None = None,
    weights: np.ndarray | None = None,
    one_ridge: bool = False,
    prior: np.ndarray | None = None,
) -> list[SubsetFit]:
    """Keeps the groups of features that the targets can least do without, and fits the targets to them again.

    METHODS 0, subset + refit: one run of the optimal brain surgeon (`removal_order`) gives nested sets for all
    counts; each set is then solved exactly by `ridge_fit`. Groups constant on the rows fitted to leave first
    and free of cost: the offset takes them over. Memory beside the sums is about 2 n^2 + 3 n q doubles for n
    removable and fixed features while groups leave, and 4 k^2 + 6 k q while k features are refitted.

    Args:
        fit: Sums of the rows fitted to.
        heldout: Sums of the same tensors over the rows that choose the ridge strengths.
        removable: Columns of the features that may leave, [n, groups * group] with group i in columns
            i * group to (i + 1) * group - 1 (a channel and its kernel positions).
        targets: Columns of y [n, q].
        counts: How many groups to keep, one fit each; 0 leaves the fixed features and the bias.
        fixed: Columns of the features that always stay, such as a skip path's input.
        group: Features that leave together.
        ridges: Strengths to try, relative to the mean feature variance; RIDGES by default, PRIOR_RIDGES with a prior.
        weights: float64 [q], what the squared error of each target counts in the choice of the groups; the
            refit, the choice of the ridge and the errors do not depend on it.
        one_ridge: Refit every count with one strength, which takes a quarter of the time: the one that is best for all
            groups or, with a prior, for the count in the middle.
        prior: float64 [groups * group, q]: weights that the removable features had, which those that stay are held
            near; fixed features have none and are held near 0. None to hold all near 0.

    Returns:
        A fit for each count, in their order; the smaller sets are parts of the larger.

    Raises:
        OptionError: Counts that do not lie within 0 .. groups, a `group` that does not divide the features,
            removable features that are also fixed, sums of different tensors, or bad ridges, weights or prior.
    """
    layout = _Layout.of(fit, heldout, removable, targets, fixed, group)
    groups = len(layout.removable)
    if not len(counts) or any(count != int(count) or not 0 <= count <= groups for count in counts):
        raise OptionError(f"counts {tuple(counts)} of must be whole and 0 to {groups}; correct them")
    _check_weights(weights, len(layout.targets))
    _check_prior(prior, layout)
    everything = np.concatenate([layout.fixed, layout.removable.ravel()])
    elimination = _elimination_ridge(fit, heldout, everything, layout, RIDGES if ridges is None else ridges)
    ridges = _ridges(ridges, prior)
    order = _order(fit, layout, groups - int(min(counts)), elimination, weights)
    kept = {count: np.setdiff1d(np.arange(groups), order[: groups - count]) for count in map(int, counts)}
    fits: dict[int, SubsetFit] = {}
    if one_ridge and prior is None:
        ridges = (elimination,)
    elif one_ridge:
        middle = sorted(kept)[len(kept) // 2]
        fits[middle] = _refit(fit, heldout, layout, kept[middle], ridges, prior)
        ridges = (fits[middle].ridge,)
    for count in kept.keys() - fits:
        fits[count] = _refit(fit, heldout, layout, kept[count], ridges, prior)
    return [fits[int(count)] for count in counts]


def refit_subset(
    fit: GramMatrix,
    heldout: GramMatrix,
    removable: Selector,
    targets: Selector,
    keep: Sequence[int] | np.ndarray,
    *,
    fixed: Selector = (),
    group: int = 1,
    ridges: Sequence[float] | None = None,
    prior: np.ndarray | None = None,
) -> SubsetFit:
    """Fits the targets to a given set of groups: the control for sets chosen by other criteria.

    Args:
        fit: Sums of the rows fitted to.
        heldout: Sums of the same tensors over the rows that choose the ridge strength.
        removable: Columns of all groups, as for `eliminate`.
        targets: Columns of y [n, q].
        keep: The groups that stay, in any order.
        fixed: Columns of the features that always stay.
        group: Features of a group.
        ridges: Strengths to try, as for `eliminate`.
        prior: Weights to stay near, as for `eliminate`.

    Returns:
        The fit of that set.

    Raises:
        OptionError: A group that does not exist or is named twice, or as for `eliminate`.
    """
    layout = _Layout.of(fit, heldout, removable, targets, fixed, group)
    kept = np.unique(np.asarray(keep, np.intp))
    groups = len(layout.removable)
    if len(kept) != len(keep) or (len(kept) and not 0 <= kept[0] <= kept[-1] < groups):
        raise OptionError(f"groups to keep must differ and be 0 to {groups - 1}; correct the set")
    _check_prior(prior, layout)
    return _refit(fit, heldout, layout, kept, _ridges(ridges, prior), prior)


@dataclass(frozen=True)
class _Layout:
    """Columns of the sums: removable [groups, group], targets [q], fixed [f]."""

    removable: np.ndarray
    targets: np.ndarray
    fixed: np.ndarray

    @classmethod
    def of(
        cls,
        fit: GramMatrix,
        heldout: GramMatrix,
        removable: Selector,
        targets: Selector,
        fixed: Selector,
        group: int,
    ) -> _Layout:
        if (fit.refs, fit.widths) != (heldout.refs, heldout.widths):
            raise OptionError("fit and held-out sums are of different tensors; request them as one")
        columns = fit.columns(removable)
        if group < 1 or len(columns) % group:
            raise OptionError(
                f"{len(columns)} removable features are no groups of {group}; correct the group size"
            )
        stay = fit.columns(fixed)
        if np.intersect1d(columns, stay).size:
            raise OptionError("features are both removable and fixed; name them once")
        return cls(columns.reshape(-1, group), fit.columns(targets), stay)


def _ridges(ridges: Sequence[float] | None, prior: np.ndarray | None) -> Sequence[float]:
    if ridges is not None:
        return ridges
    return RIDGES if prior is None else PRIOR_RIDGES


def _order(
    fit: GramMatrix, layout: _Layout, removals: int, ridge: float, weights: np.ndarray | None
) -> np.ndarray:
    """The first `removals` groups to leave: the constant ones, then as the surgeon decides."""
    dead = _dead(fit, layout)
    first = np.flatnonzero(dead)[:removals]
    if len(first) == removals:
        return first
    alive = np.flatnonzero(~dead)
    features = layout.removable[alive]
    rest = removal_order(
        fit, layout.fixed, features, layout.targets, removals - len(first), ridge=ridge, weights=weights
    )
    return np.concatenate([first, alive[rest]])


def _dead(fit: GramMatrix, layout: _Layout) -> np.ndarray:
    """Which groups do not vary on the rows fitted to, bool [groups]."""
    index = layout.removable
    mean = fit.matrix[0, index] / max(fit.count, 1.0)
    variance = fit.matrix[index, index] / max(fit.count, 1.0) - np.square(mean)
    floor = DEAD * np.maximum(np.square(mean), variance.mean() if variance.size else 0.0)
    return (variance <= floor).all(1)


def _elimination_ridge(
    fit: GramMatrix, heldout: GramMatrix, features: np.ndarray, layout: _Layout, ridges: Sequence[float]
) -> float:
    """The best strength for all features, judged on a part of the targets when they are many."""
    if len(ridges) == 1:
        return ridges[0]
    places = np.linspace(0, len(layout.targets) - 1, min(SAMPLED_TARGETS, len(layout.targets)))
    return ridge_fit(fit, heldout, features, layout.targets[places.astype(np.intp)], ridges).ridge


def _refit(
    fit: GramMatrix,
    heldout: GramMatrix,
    layout: _Layout,
    keep: np.ndarray,
    ridges: Sequence[float],
    prior: np.ndarray | None,
) -> SubsetFit:
    features = np.concatenate([layout.fixed, layout.removable[keep].ravel()])
    if prior is not None:
        q = len(layout.targets)
        own = prior.reshape(len(layout.removable), -1, q)[keep].reshape(-1, q)
        prior = np.concatenate([np.zeros((len(layout.fixed), q)), own])
    found = ridge_fit(fit, heldout, features, layout.targets, ridges, prior=prior)
    return SubsetFit(keep, found.matrix, found.offset, found.ridge, found.fit_error, found.error)


def _check_prior(prior: np.ndarray | None, layout: _Layout) -> None:
    shape = layout.removable.size, len(layout.targets)
    if prior is not None and prior.shape != shape:
        raise OptionError(f"a prior of shape {prior.shape} is none of {shape} weights; correct it")


def _check_weights(weights: np.ndarray | None, targets: int) -> None:
    if weights is None:
        return
    fits = np.shape(weights) == (targets,)
    if not fits or not np.isfinite(weights).all() or np.min(weights) < 0 or not np.any(weights):
        raise OptionError(f"weights must be {targets} finite numbers >= 0, not all 0; correct them")
