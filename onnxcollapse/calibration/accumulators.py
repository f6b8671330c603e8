# SPDX-License-Identifier: Apache-2.0
"""Adds up in fp64 on the host what the probes' states hold, and undoes their shifts once at the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxcollapse.calibration.probes import ProbeSet
from onnxcollapse.calibration.statistics import (
    CosineMean,
    Cross,
    CrossMoments,
    Gram,
    GramMatrix,
    Moments,
    MomentSums,
    Ref,
    Request,
    Result,
)
from onnxcollapse.errors import DataError

States = Mapping[str, np.ndarray]


class Accumulator:
    """The running sums of one request over one part of the data."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._sums: list[np.ndarray] = []
        self._totals: list[np.ndarray] = []
        self._shifts: list[np.ndarray] = []
        self._count = 0.0

    def add(self, probes: ProbeSet, states: States) -> None:
        """Adds what the states have gathered since they were last read.

        Raises:
            DataError: A tensor becomes NaN or infinite on this data.
        """
        columns = [probes.column(ref) for ref in self._request.refs]
        self._shifts = [states[column.shift][0].astype(np.float64) for column in columns]
        totals = [states[column.total] for column in columns]
        sums = [states[name] for name in probes.sums(self._request)]
        for ref, *arrays in zip(self._request.refs, self._shifts, totals, strict=True):
            _require_finite(arrays, ref)
        _require_finite(sums, self._request.refs[0])
        self._count += float(states[columns[0].count][0, 0])
        if not self._sums:
            self._totals = [array[0].astype(np.float64) for array in totals]
            self._sums = [array.astype(np.float64) for array in sums]
            return
        for total, array in zip(self._totals, totals, strict=True):
            total += array[0]
        picks: list[np.ufunc] = [np.add] * len(sums)
        if isinstance(self._request, Moments):
            picks[3:] = np.minimum, np.maximum
        for total, array, pick in zip(self._sums, sums, picks, strict=True):
            pick(total, array, out=total)

    def result(self) -> Result:
        """The statistics so far.

        Raises:
            DataError: There was no data.
        """
        if not self._sums:
            raise DataError("no batch of calibration data reached the model; give more samples")
        request = self._request
        if isinstance(request, Gram):
            return self._gram(request)
        if isinstance(request, Moments):
            return self._moments()
        if isinstance(request, Cross):
            return self._cross()
        return CosineMean(self._count, float(self._sums[0][0, 0]) / max(self._count, 1.0))

    def _gram(self, request: Gram) -> GramMatrix:
        """The sums with a column of ones before the tensors', exactly symmetric.

        With z = x - s over n rows x'x = z'z + s't + t's + n s's for t = sum z.
        """
        shift, total = np.concatenate(self._shifts), np.concatenate(self._totals)
        matrix = np.zeros((1 + len(shift), 1 + len(shift)))
        start = 1
        for panel in self._sums:
            matrix[start : start + len(panel), start:] = panel
            start += len(panel)
        _unshift(matrix[1:, 1:], shift, total + self._count * shift / 2)
        matrix[0, 0] = self._count
        matrix[0, 1:] = matrix[1:, 0] = total + self._count * shift
        return GramMatrix(self._count, request.refs, tuple(len(s) for s in self._shifts), matrix)

    def _moments(self) -> MomentSums:
        count = max(self._count, 1.0)
        square, positive, negative, minimum, maximum = (array[0] for array in self._sums)
        left = self._totals[0] / count
        return MomentSums(
            count=self._count,
            mean=self._shifts[0] + left,
            variance=np.maximum(square / count - np.square(left), 0.0),
            minimum=minimum,
            maximum=maximum,
            positive_rate=positive / count,
            negative_square=negative / count,
        )

    def _cross(self) -> CrossMoments:
        count = max(self._count, 1.0)
        product, *squares = self._sums
        left = [total / count for total in self._totals]
        means = tuple(shift + rest for shift, rest in zip(self._shifts, left, strict=True))
        variances = tuple(
            np.maximum(square[0] / count - np.square(rest), 0.0)
            for square, rest in zip(squares, left, strict=True)
        )
        covariance = product / count - np.outer(*left)
        return CrossMoments(self._count, (means[0], means[1]), (variances[0], variances[1]), covariance)


def _unshift(matrix: np.ndarray, shift: np.ndarray, half: np.ndarray, block: int = 512) -> None:
    """Adds shift'half + half'shift to the upper triangle and copies it into the lower one.

    Block by block, so that no second matrix is made.
    """
    size = len(matrix)
    for start in range(0, size, block):
        stop = min(start + block, size)
        rows = matrix[start:stop, start:]
        rows += np.outer(shift[start:stop], half[start:])
        rows += np.outer(half[start:stop], shift[start:])
        square = rows[:, : stop - start]
        square[:] = np.triu(square) + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def _require_finite(arrays: list[np.ndarray], ref: Ref) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError(
            f"tensor {ref.value!r} of the {ref.source} becomes NaN or infinite on the calibration data; "
            "check the data, or run the model in float32"
        )
