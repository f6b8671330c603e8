# SPDX-License-Identifier: Apache-2.0
"""The running sums of the metrics that compare outputs row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from onnxcollapse.verification import softmax
from onnxcollapse.verification.softmax import Once


class Sums(ABC):
    """The running sums of one metric over the rows of one output."""

    name: ClassVar[str]
    quick_when_wide: ClassVar[bool] = False
    """Whether there is a quicker way for wide rows, `add_wide`."""
    logits: ClassVar[bool] = False
    """Whether an entry of -inf in the reference means a probability of 0."""
    masked: ClassVar[float] = 0.0
    """What stands for -inf."""
    power: ClassVar[int] = 1
    """The power of the error that adds up over independent changes: squares of a norm, divergences as they are."""

    @abstractmethod
    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Adds rows [n, C] in float64: finite `want`, `got` of the same shape."""

    def add_wide(self, got: np.ndarray, want: np.ndarray, once: Once) -> bool:
        """Adds wide rows [n, C] in float32.

        Args:
            got: The candidate's.
            want: The reference's.
            once: Makes something of the reference's rows, or takes what an earlier candidate's comparison made.

        Returns:
            Whether they were added; not where an entry is NaN or infinite, which wants a closer look.
        """
        return False

    @abstractmethod
    def value(self) -> float:
        """The error so far."""


class RelL2(Sums):
    """sqrt(sum |got - want|^2 / sum |want|^2); against a reference of zeros 0 or infinite."""

    name = "rel-l2"
    power = 2

    def __init__(self) -> None:
        self._difference = self._norm = 0.0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:  # noqa: D102 (as in Sums)
        difference = got - want
        self._difference += float(np.vdot(difference, difference))
        self._norm += float(np.vdot(want, want))

    def value(self) -> float:  # noqa: D102 (as in Sums)
        if self._norm == 0:
            return 0.0 if self._difference == 0 else float("inf")
        return float(np.sqrt(self._difference / self._norm))


class _MeanOverRows(Sums):
    def __init__(self) -> None:
        self._total, self._rows = 0.0, 0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        self._total += float(self.rows(got, want).sum())
        self._rows += len(want)

    def value(self) -> float:
        return self._total / self._rows if self._rows else 0.0

    def add_wide(self, got: np.ndarray, want: np.ndarray, once: Once) -> bool:
        rows = self.wide_rows(got, want, once)
        if rows is None or not np.isfinite(rows).all():
            return False
        self._total += float(rows.sum())
        self._rows += len(rows)
        return True

    @abstractmethod
    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """The error of each row [n]."""

    def wide_rows(self, got: np.ndarray, want: np.ndarray, once: Once) -> np.ndarray | None:
        """The same of wide rows in float32, NaN or infinite where an entry is; None if there is no quicker way."""
        return None


class Cosine(_MeanOverRows):
    """1 - mean cosine of the rows; a zero row agrees with a zero row only."""

    name = "cosine"

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """1 - cos, [n], as |got/|got| - want/|want||^2 / 2: exactly 0 for equal rows."""
        units = [rows / _safe(np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (got, want)]
        distance = np.square(units[0] - units[1]).sum(1) / 2
        one_zero = got.any(1) != want.any(1)
        return np.where(one_zero, 1.0, distance)


class Kl(_MeanOverRows):
    """Mean over rows of KL(softmax(want) || softmax(got)), the softmax over the last axis."""

    name = "kl"
    logits, masked, quick_when_wide = True, -1e300, True

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Sum p (log p - log q), [n]; never negative."""
        log_p, log_q = _log_softmax(want), _log_softmax(got)
        return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1), 0.0)

    def wide_rows(self, got: np.ndarray, want: np.ndarray, once: Once) -> np.ndarray:
        """The same in float32, to about 1e-7."""
        return softmax.divergences(got, want, once)


class Top1(_MeanOverRows):
    """1 - top-1 agreement: the share of rows whose largest entry is at another place."""

    name = "top1"
    logits, masked, quick_when_wide = True, -1e300, True

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """1 where the places differ, [n]."""
        return (got.argmax(1) != want.argmax(1)).astype(np.float64)

    def wide_rows(self, got: np.ndarray, want: np.ndarray, once: Once) -> np.ndarray:
        """The same without a copy in float64; NaN where an entry is no number."""
        truth, true_finite = once("peaks", lambda: softmax.peaks(want))
        found, finite = softmax.peaks(got)
        return np.where(true_finite & finite, truth != found, np.nan)


METRICS: dict[str, type[Sums]] = {kind.name: kind for kind in (RelL2, Cosine, Kl, Top1)}
"""The built-in metrics by name."""


def _safe(norms: np.ndarray) -> np.ndarray:
    return np.where(norms == 0, 1.0, norms)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
