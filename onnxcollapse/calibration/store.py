# SPDX-License-Identifier: Apache-2.0
"""Statistics that wait for others: in memory as far as there is room, the rest on disk."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxcollapse.calibration.statistics import CrossMoments, GramMatrix, Part, Request, Result
from onnxcollapse.calibration.tape import Tape

Key = tuple[Part, Request]

NOTHING = np.empty((0, 0))


class Store(Mapping[Key, Result]):
    """Results that are wanted together and come one after the other.

    A result that waits beyond the room lies in a temporary file and is read anew each time it is asked for, so what
    is in memory is what its reader holds: one that lets go of a matrix before it asks for the next has one.

    Args:
        room: Bytes that the matrices of waiting results may take in memory; None for any.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = room
        self._new: dict[Key, Result] = {}
        self._waiting: dict[Key, Result | _Aside] = {}

    def __getitem__(self, key: Key) -> Result:
        result = self._new[key] if key in self._new else self._waiting[key]
        return result.read() if isinstance(result, _Aside) else result

    def __iter__(self) -> Iterator[Key]:
        yield from self._waiting
        yield from self._new

    def __len__(self) -> int:
        return len(self._waiting) + len(self._new)

    def add(self, results: Mapping[Key, Result]) -> None:
        """Takes results that have just come; they count as waiting from `keep_only` on."""
        self._new.update(results)

    def keep_only(self, requests: Container[Request]) -> None:
        """Forgets what is not of these requests, and puts aside what there is no room for."""
        for key in [key for key in self._waiting if key[1] not in requests]:
            result = self._waiting.pop(key)
            if isinstance(result, _Aside):
                result.tape.close()
        held = sum(
            _matrix(result).nbytes for result in self._waiting.values() if not isinstance(result, _Aside)
        )
        for key in list(self._new):
            result = self._new.pop(key)  # what was put aside leaves memory before the next is written
            if key[1] not in requests:
                continue
            size = _matrix(result).nbytes
            if self._room is not None and held + size > self._room:
                self._waiting[key] = _Aside.of(result)
            else:
                self._waiting[key] = result
                held += size

    def close(self) -> None:
        """Forgets everything."""
        self.keep_only(())


@dataclass(frozen=True)
class _Aside:
    """A result whose matrix lies in a file.

    Attributes:
        rest: The result without it.
        tape: The matrix.
    """

    rest: Result
    tape: Tape

    @classmethod
    def of(cls, result: Result) -> _Aside:
        tape = Tape()
        tape.put("matrix", _matrix(result))
        return cls(_with(result, NOTHING), tape)

    def read(self) -> Result:
        return _with(self.rest, self.tape.get("matrix", 0))


def _matrix(result: Result) -> np.ndarray:
    """What of a result takes the product of two widths; nothing where it is a few numbers for each channel."""
    if isinstance(result, GramMatrix):
        return result.matrix
    return result.covariance if isinstance(result, CrossMoments) else NOTHING


def _with(result: Result, matrix: np.ndarray) -> Result:
    """The same result with another matrix."""
    if isinstance(result, GramMatrix):
        return replace(result, matrix=matrix)
    return replace(result, covariance=matrix) if isinstance(result, CrossMoments) else result
