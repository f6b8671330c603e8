# SPDX-License-Identifier: Apache-2.0
"""Sums over the softmax of wide rows, as a language model's: float32 passes in cache, sums of them in float64.

What float32 loses stays small because logits are rounded once, when their maximum is taken off, and everything after
that is about the rounded ones: tests hold means to 1e-7 of those in float64. Narrow rows stay in float64, where
divergences of 1e-9 count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

T = TypeVar("T")

WIDE = 4096
"""Rows of more entries than this are wide."""

BLOCK = 1 << 17
"""Elements worked on at a time: four such blocks of float32 fit a core's cache."""

CHUNK = 512
"""Products that are added up in float32 before float64 takes over."""


class Once(Protocol):
    """Makes something of a block of the reference's rows, once for all candidates."""

    def __call__(self, what: str, make: Callable[[], T], /) -> T:
        """What `make` gives, or gave before under that name."""


class Kept:
    """Small things that are computed of a reference's output once for all candidates that are compared with it.

    Norms and places only: exponentials would hold as much memory as the output itself, and fetching them saves little
    over computing them again in cache. Only the array that was asked about last is remembered, by identity: it must
    not be edited in between.
    """

    def __init__(self) -> None:
        self._owner: np.ndarray | None = None
        self._known: dict[object, Any] = {}

    def of(self, owner: np.ndarray, key: object, make: Callable[[], T]) -> T:
        """Makes something of an array, or returns what was made before.

        Args:
            owner: The array.
            key: What of it.
            make: Makes it.
        """
        if owner is not self._owner:
            self._known.clear()
            self._owner = owner
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known

    def clear(self) -> None:
        """Forgets everything."""
        self._owner = None
        self._known.clear()


def is_wide(*arrays: np.ndarray) -> bool:
    """Whether the rows of all arrays are wide and of a type that float32 holds."""
    return all(
        array.ndim and array.shape[-1] > WIDE and array.dtype in (np.float32, np.float16) for array in arrays
    )


@np.errstate(invalid="ignore", over="ignore")
def divergences(got: np.ndarray, want: np.ndarray, once: Once) -> np.ndarray:
    """KL(softmax(want) || softmax(got)) of float32 rows, [n]; NaN or infinite where an entry is.

    With w, g the logits less their maxima: sum e^w (w - g) / sum e^w + log(sum e^g / sum e^w).
    """
    apart = want - once("top", lambda: want.max(1, keepdims=True))
    powers = np.exp(apart)
    total = once("total", lambda: row_sums(powers))
    shifted = got - got.max(1, keepdims=True)
    apart -= shifted
    mean = row_sums(powers, apart) / total
    np.exp(shifted, out=shifted)
    return np.maximum(mean + np.log(row_sums(shifted) / total), 0.0)


def peaks(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the largest entries of rows [n, C] are, [n], and which rows are finite throughout, bool [n]."""
    places = rows.argmax(1)
    highest = np.take_along_axis(rows, places[:, None], 1)[:, 0]  # NaN where a row has one
    return places, np.isfinite(highest) & np.isfinite(rows.min(1))


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def surprise(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(rows)[target], [n] in float64, of rows [n, C], which are overwritten.

    Infinite where the target's entry is -inf, NaN where an entry is NaN or inf.
    """
    top = rows.max(1, keepdims=True)
    rows -= top
    chosen = np.take_along_axis(rows, targets[:, None], 1)[:, 0].astype(np.float64)
    np.exp(rows, out=rows)
    found: np.ndarray = np.log(row_sums(rows)) - chosen
    return found


def row_sums(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Sums of the rows [n, C] of an array, or of the products of two, [n] in float64."""
    whole = a.shape[1] // CHUNK * CHUNK
    parts = [_chunked(a[:, :whole], b if b is None else b[:, :whole], CHUNK)] if whole else []
    if whole < a.shape[1]:
        rest = a.shape[1] - whole
        parts.append(_chunked(a[:, whole:], b if b is None else b[:, whole:], rest))
    return np.sum(parts, axis=0) if parts else np.zeros(len(a))


def _chunked(a: np.ndarray, b: np.ndarray | None, chunk: int) -> np.ndarray:
    shape = (len(a), a.shape[1] // chunk, chunk)
    pieces = a.reshape(shape)
    sums = pieces.sum(2) if b is None else np.einsum("nck,nck->nc", pieces, b.reshape(shape))
    added: np.ndarray = sums.sum(1, dtype=np.float64)
    return added
