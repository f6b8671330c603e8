# SPDX-License-Identifier: Apache-2.0
"""Outputs as rows over their last axis, padding left out, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Outputs = Mapping[str, np.ndarray]

BLOCK = 1 << 20
"""Elements widened to float64 at a time."""


def is_float(array: object) -> bool:
    """Whether an output is a floating-point array."""
    return isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating)


def compared(outputs: Outputs) -> list[str]:
    """The outputs that metrics look at: the floating-point ones."""
    return [name for name, array in outputs.items() if is_float(array)]


def row_blocks(
    got: np.ndarray,
    want: np.ndarray,
    mask: np.ndarray | None,
    dtype: type[np.floating[Any]] = np.float64,
    block: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both tensors as rows over the last axis [n, C], padding left out, a block at a time.

    Args:
        got: The candidate's output.
        want: The reference's, of the same shape.
        mask: Which tokens are real, bool [B, S], or None.
        dtype: What rows are given in; those that have it already are not copied.
        block: Elements a block, by default BLOCK.
    """
    width = want.shape[-1] if want.ndim else 1
    flat_got, flat_want = got.reshape(-1, width or 1), want.reshape(-1, width or 1)
    keep = _kept_rows(want.shape, mask)
    step = max((block or BLOCK) // max(width, 1), 1)
    for start in range(0, len(flat_want), step):
        part = slice(start, start + step)
        rows = slice(None) if keep is None or keep[part].all() else keep[part]
        yield (
            flat_got[part][rows].astype(dtype, copy=False),
            flat_want[part][rows].astype(dtype, copy=False),
        )


def _kept_rows(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray | None:
    """Bool [n] for the rows of a [B, S, ..., C] output, None where the mask does not apply."""
    if mask is None or len(shape) < 3 or shape[:2] != mask.shape:
        return None
    return np.repeat(mask.reshape(-1), int(np.prod(shape[2:-1], dtype=np.int64)))
