# SPDX-License-Identifier: Apache-2.0
"""Arrays that wait on disk between two segments, batch by batch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np

IN_MEMORY = 1 << 20
"""Bytes of a tensor that are kept in memory: many small ones would use up the files a process may open."""


class Tape:
    """Arrays by name and batch in temporary files without names: whatever ends the process, nothing of them is left.

    They are read, not mapped, because mapped pages would count as resident memory.

    Args:
        base: What is not on this tape is read from that one, which is never written through this one.
    """

    def __init__(self, base: Tape | None = None) -> None:
        self._reels: dict[str, _Reel] = {}
        self._base = base

    def put(self, name: str, array: np.ndarray) -> None:
        """Appends the next batch of a tensor."""
        if name not in self._reels:
            self._reels[name] = _Reel()
        self._reels[name].put(array)

    def get(self, name: str, batch: int) -> np.ndarray:
        """Reads a batch of a tensor, the first one being 0."""
        return self._reel(name).get(batch)

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor."""
        return self._reel(name).dtype

    def rank(self, name: str) -> int:
        """Number of axes of a tensor."""
        return self._reel(name).rank

    def _reel(self, name: str) -> _Reel:
        if name in self._reels or self._base is None:
            return self._reels[name]
        return self._base._reel(name)

    def __contains__(self, name: str) -> bool:
        return name in self._reels or (self._base is not None and name in self._base)

    def drop(self, names: Iterable[str]) -> None:
        """Forgets tensors and frees their space."""
        for name in names:
            reel = self._reels.pop(name, None)
            if reel is not None:
                reel.close()

    def keep_only(self, names: Iterable[str]) -> None:
        """Forgets all other tensors."""
        self.drop(set(self._reels) - set(names))

    def close(self) -> None:
        """Forgets everything."""
        self.drop(list(self._reels))


class _Reel:
    """One tensor's batches in one file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (closed by the tape)
        self._entries: list[tuple[int, tuple[int, ...], np.dtype]] = []
        self._end = 0

    @property
    def dtype(self) -> np.dtype:
        return self._entries[0][2]

    @property
    def rank(self) -> int:
        return len(self._entries[0][1])

    def put(self, array: np.ndarray) -> None:
        array = np.asarray(array, order="C")  # ascontiguousarray would make a number a list of one
        if self._end + array.nbytes > IN_MEMORY:
            self._file.rollover()  # before it is written, or memory holds it twice
        self._file.seek(self._end)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._entries.append((self._end, array.shape, array.dtype))
        self._end += array.nbytes

    def get(self, batch: int) -> np.ndarray:
        offset, shape, dtype = self._entries[batch]
        array = np.empty(shape, dtype)
        self._file.seek(offset)
        self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array

    def close(self) -> None:
        self._file.close()
