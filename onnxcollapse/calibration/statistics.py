# SPDX-License-Identifier: Apache-2.0
"""Results of requests for statistics: sums over rows that can be added up, never activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import numpy as np

from onnxcollapse.calibration.requests import Cosine, Cross, Gram, Moments, Patches, Ref, Request
from onnxcollapse.errors import OptionError

__all__ = [
    "Cosine",
    "CosineMean",
    "Cross",
    "CrossMoments",
    "Gram",
    "GramMatrix",
    "MomentSums",
    "Moments",
    "Part",
    "Patches",
    "Ref",
    "Request",
    "Result",
    "Selector",
    "Statistics",
]

Part = Literal["fit", "heldout"]


Selector = str | int | Ref | Sequence["str | int | Ref"] | np.ndarray
"""Columns of a Gram matrix: "one", a value's name, its 1-based place, a Ref, or several of these; or an array of
column indices as `GramMatrix.columns` answers them, which may name a part of a tensor."""


@dataclass(frozen=True, eq=False)
class GramMatrix:
    """Sums of products between the columns [1, refs...] over `count` rows.

    Attributes:
        count: Rows summed (padding excluded).
        refs: The tensors, in column order.
        widths: Columns of each tensor.
        matrix: float64 [1 + sum(widths)] squared; its first row and column belong to the constant 1.
    """

    count: float
    refs: tuple[Ref, ...]
    widths: tuple[int, ...]
    matrix: np.ndarray

    @classmethod
    def from_rows(cls, columns: Mapping[Ref | str, np.ndarray]) -> GramMatrix:
        """Builds the sums from activations in memory.

        Args:
            columns: Tensor (or value name) -> rows [n, width], in column order.

        Returns:
            The same as collecting those rows would give, in float64 throughout.
        """
        refs = tuple(Ref(key) if isinstance(key, str) else key for key in columns)
        rows = [np.asarray(value, np.float64) for value in columns.values()]
        stacked = np.concatenate([np.ones((len(rows[0]), 1)), *rows], axis=1)
        return cls(float(len(stacked)), refs, tuple(r.shape[1] for r in rows), stacked.T @ stacked)

    @classmethod
    def assembled(cls, features: GramMatrix, cross: CrossMoments, target: Ref) -> GramMatrix:
        """The sums of [1, x, y] from those of [1, x] and the cross moments of x and y.

        Products between different columns of y are not known and left 0: no fit and no error needs them.

        Args:
            features: Sums of [1, x] over the rows that `cross` is of.
            cross: Cross moments, x on the left.
            target: What y is.
        """
        width, mean = len(cross.means[1]), cross.means[1]
        start = len(features.matrix)
        matrix = np.zeros((start + width, start + width))
        matrix[:start, :start] = features.matrix
        matrix[0, start:] = cross.count * mean
        matrix[1:start, start:] = cross.count * (cross.covariance + np.outer(cross.means[0], mean))
        matrix[start:, :start] = matrix[:start, start:].T
        index = np.arange(start, start + width)
        matrix[index, index] = cross.count * (cross.variances[1] + np.square(mean))
        return cls(features.count, (*features.refs, target), (*features.widths, width), matrix)

    def __add__(self, other: GramMatrix) -> GramMatrix:
        if (self.refs, self.widths) != (other.refs, other.widths):
            raise OptionError("Gram matrices of different tensors cannot be added; request them as one")
        return GramMatrix(self.count + other.count, self.refs, self.widths, self.matrix + other.matrix)

    def columns(self, selector: Selector) -> np.ndarray:
        """Column indices into `matrix` of what a selector names.

        Args:
            selector: "one", a value name, a 1-based place, a Ref, or a sequence of these (concatenated); an
                array is taken as column indices already.

        Raises:
            OptionError: The tensor is not in this Gram matrix, or its name alone is ambiguous.
        """
        if isinstance(selector, np.ndarray):
            return selector
        if isinstance(selector, Ref | str | int):
            start, width = self._span(selector)
            return np.arange(start, start + width)
        parts = [self.columns(part) for part in selector]
        return np.concatenate(parts) if parts else np.empty(0, np.intp)

    def block(self, a: Selector, b: Selector) -> np.ndarray:
        """Mean of a'b over the rows, float64 [width of a, width of b]; see `columns` for a and b."""
        rows, columns = self.columns(a), self.columns(b)
        if _adjoin(rows) and _adjoin(columns):  # read in place: a wide layer's block takes gigabytes
            there = self.matrix[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            return np.asarray(there / max(self.count, 1.0))
        part = self.matrix[np.ix_(rows, columns)]
        part /= max(self.count, 1.0)  # likewise
        return part

    def mean(self, a: Selector) -> np.ndarray:
        """Mean row of a, float64 [width of a]."""
        return self.matrix[0, self.columns(a)] / max(self.count, 1.0)

    def power(self, a: Selector) -> float:
        """Mean of |row|^2 of a: tr(a'a)/n, the total variance about 0."""
        index = self.columns(a)
        return float(self.matrix[index, index].sum() / max(self.count, 1.0))

    def projected(self, place: int, basis: np.ndarray) -> GramMatrix:
        """The sums as if one tensor x had been x @ basis.

        Args:
            place: Its 0-based place among the tensors.
            basis: float64 [width, r].
        """
        start = 1 + sum(self.widths[:place])
        stop = start + self.widths[place]
        rows = np.concatenate([self.matrix[:start], basis.T @ self.matrix[start:stop], self.matrix[stop:]])
        matrix = np.concatenate([rows[:, :start], rows[:, start:stop] @ basis, rows[:, stop:]], axis=1)
        widths = (*self.widths[:place], basis.shape[1], *self.widths[place + 1 :])
        return GramMatrix(self.count, self.refs, widths, (matrix + matrix.T) / 2)

    def difference(self, place: int, other: int) -> GramMatrix:
        """The sums as if one tensor t had been t - s, with s, another of the same width, left out.

        Args:
            place: 0-based place of t.
            other: 0-based place of s, behind t.
        """
        t, s = (self.columns(index + 1) for index in (place, other))
        if len(t) != len(s):
            raise OptionError(
                f"tensors of {len(t)} and {len(s)} columns have no difference; select equal ones"
            )
        matrix = self.matrix.copy()
        matrix[t] -= matrix[s]
        matrix[:, t] -= matrix[:, s]
        left = np.delete(np.arange(len(matrix)), s)
        keep = [index for index in range(len(self.refs)) if index != other]
        return GramMatrix(
            self.count,
            tuple(self.refs[index] for index in keep),
            tuple(self.widths[index] for index in keep),
            matrix[np.ix_(left, left)],
        )

    def through_origin(self) -> GramMatrix:
        """The sums as if every tensor had mean 0, so that a fit to them has no offset: there is none to put it in."""
        matrix = self.matrix.copy()
        matrix[0, 1:] = matrix[1:, 0] = 0.0
        return replace(self, matrix=matrix)

    def _span(self, selector: str | int | Ref) -> tuple[int, int]:
        if selector == "one":
            return 0, 1
        place = selector - 1 if isinstance(selector, int) else self._place(selector)
        if not 0 <= place < len(self.refs):
            raise OptionError(f"Gram matrix has {len(self.refs)} tensors, no number {selector}; count from 1")
        return 1 + sum(self.widths[:place]), self.widths[place]

    def _place(self, selector: str | Ref) -> int:
        named = [i for i, ref in enumerate(self.refs) if selector in (ref, ref.value)]
        if not named:
            raise OptionError(f"tensor {selector!r} is not in the Gram matrix of {self._names()}; request it")
        if len({self.refs[i] for i in named}) > 1:
            raise OptionError(f"tensor name {selector!r} is ambiguous in {self._names()}; select by Ref")
        return named[0]

    def _names(self) -> str:
        return ", ".join(f"{ref.source}:{ref.value}" for ref in self.refs)


def _adjoin(index: np.ndarray) -> bool:
    """Whether columns lie side by side in their order."""
    return len(index) > 0 and bool(np.all(np.diff(index) == 1))


@dataclass(frozen=True, eq=False)
class MomentSums:
    """Per-channel moments over `count` rows; every array is float64 [C].

    Attributes:
        count: Rows summed (padding excluded).
        mean: E z.
        variance: Population variance E (z - E z)^2.
        minimum: Smallest z.
        maximum: Largest z.
        positive_rate: Share of rows with z > 0: the activation rate of arXiv 2506.21146.
        negative_square: E relu(-z)^2, which bounds the error of a PReLU fold (arXiv 2311.17943).
    """

    count: float
    mean: np.ndarray
    variance: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    positive_rate: np.ndarray
    negative_square: np.ndarray

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> MomentSums:
        """Builds the moments of rows in memory.

        Args:
            rows: Activations [n, C], n >= 1.

        Returns:
            Their moments in float64.
        """
        z = np.asarray(rows, np.float64)
        return cls(
            count=float(len(z)),
            mean=z.mean(0),
            variance=z.var(0),
            minimum=z.min(0),
            maximum=z.max(0),
            positive_rate=(z > 0).mean(0),
            negative_square=np.square(np.minimum(z, 0)).mean(0),
        )

    def __add__(self, other: MomentSums) -> MomentSums:
        """Merges two disjoint sets of rows by the pairwise update of Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        mine, theirs = (self.count / count, other.count / count) if count else (0.5, 0.5)
        gap = other.mean - self.mean
        return MomentSums(
            count=count,
            mean=self.mean + gap * theirs,
            variance=self.variance * mine + other.variance * theirs + np.square(gap) * (mine * theirs),
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            positive_rate=self.positive_rate * mine + other.positive_rate * theirs,
            negative_square=self.negative_square * mine + other.negative_square * theirs,
        )

    @property
    def power(self) -> np.ndarray:
        """E z^2, float64 [C]."""
        return self.variance + np.square(self.mean)


@dataclass(frozen=True, eq=False)
class CrossMoments:
    """Covariances between the columns of two tensors over `count` rows; every array is float64.

    Attributes:
        count: Rows summed (padding excluded).
        means: Mean of each column, of the left tensor [A] and of the right one [B].
        variances: Population variances, likewise.
        covariance: E (a - E a)'(b - E b), [A, B].
    """

    count: float
    means: tuple[np.ndarray, np.ndarray]
    variances: tuple[np.ndarray, np.ndarray]
    covariance: np.ndarray

    def correlation(self, floor: float = 1e-8) -> np.ndarray:
        """Pearson's correlation [A, B] (arXiv 2501.06126, eq. 2).

        Args:
            floor: Smallest standard deviation divided by, so that constant columns correlate with nothing.
        """
        left, right = (np.maximum(np.sqrt(variance), floor) for variance in self.variances)
        return self.covariance / np.outer(left, right)


@dataclass(frozen=True)
class CosineMean:
    """The mean cosine between rows of two tensors.

    Attributes:
        count: Rows (padding excluded).
        mean: E cos(a, b); a row of zeros counts as 0.
    """

    count: float
    mean: float


Result = GramMatrix | MomentSums | CrossMoments | CosineMean


@dataclass(frozen=True)
class Statistics:
    """The results of a collection, by request and part of the data."""

    results: Mapping[tuple[Part, Request], Result] = field(default_factory=dict)

    @overload
    def fit(self, request: Gram) -> GramMatrix: ...
    @overload
    def fit(self, request: Moments) -> MomentSums: ...
    @overload
    def fit(self, request: Cross) -> CrossMoments: ...
    @overload
    def fit(self, request: Cosine) -> CosineMean: ...
    def fit(self, request: Request) -> Result:
        """The result on the rows that maps are fitted to."""
        return self._result("fit", request)

    @overload
    def heldout(self, request: Gram) -> GramMatrix: ...
    @overload
    def heldout(self, request: Moments) -> MomentSums: ...
    @overload
    def heldout(self, request: Cross) -> CrossMoments: ...
    @overload
    def heldout(self, request: Cosine) -> CosineMean: ...
    def heldout(self, request: Request) -> Result:
        """The result on the rows kept back to choose knobs and to measure errors."""
        return self._result("heldout", request)

    def __contains__(self, request: Request) -> bool:
        return any(known == request for _, known in self.results)

    def _result(self, part: Part, request: Request) -> Result:
        try:
            return self.results[part, request]
        except KeyError:
            raise OptionError(
                f"no {part} statistics were collected for {request}; add it to requests()"
            ) from None
