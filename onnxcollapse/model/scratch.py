# SPDX-License-Identifier: Apache-2.0
"""Room on disk for the weights that rewrites make, so that memory does not grow with the number of rewrites."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.model.source import FileTensor, Source

logger = logging.getLogger(__name__)

SMALLEST = 1 << 16
"""Smaller tensors stay in memory."""

_CAPACITY = 256 << 20
_ALIGNMENT = 64


class _Spill(Source):
    """A temporary file without a name: it is gone when nothing refers to it, whatever ends the process.

    Its whole capacity is set aside at once as a hole, so that one mapping serves all tensors written later.
    """

    _file: Any  # always open, unlike that of a Source

    def __init__(self, capacity: int) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by Source when it is dropped)
        self._file.truncate(capacity)
        self._lock = threading.Lock()
        self._map = None
        self.path = Path(tempfile.gettempdir()) / "onnxcollapse-scratch"
        self.size = capacity
        status = os.fstat(self._file.fileno())
        self.stamp = (status.st_dev, status.st_ino, capacity, id(self))
        self._end = 0

    def room(self, size: int) -> bool:
        """Whether `size` more bytes fit."""
        return self._end + size <= self.size

    def append(self, array: np.ndarray) -> int:
        """Writes an array behind the others; returns its offset."""
        offset, file = self._end, self._file
        with self._lock:
            file.seek(offset)
            view = memoryview(array.reshape(-1).view(np.uint8).data)
            while view:
                view = view[file.write(view) :]
        self._end = -(-(offset + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        return offset


_lock = threading.Lock()
_spills: list[_Spill] = []
"""The file that is being filled, if there is one; full ones live on in their tensors."""


def hold(array: np.ndarray, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """Makes an immutable tensor, on disk when it is large and there is room.

    Args:
        array: Contiguous, in the element type of `dtype`.
        dtype: Element type.
        name: Name of the tensor.

    Returns:
        The tensor; it does not keep `array` when it lies on disk.
    """
    if array.nbytes >= SMALLEST and dtype.bitwidth >= 8:
        try:
            return _spilled(array, dtype, name)
        except OSError as error:
            logger.debug("no room for scratch weights, keeping them in memory: %s", error)
    array.flags.writeable = False
    return ir.Tensor(array, dtype=dtype, name=name)


def _spilled(array: np.ndarray, dtype: ir.DataType, name: str) -> FileTensor:
    with _lock:
        if not _spills or not _spills[0].room(array.nbytes):
            _spills[:] = [_Spill(max(_CAPACITY, array.nbytes))]
        spill = _spills[0]
        offset = spill.append(array)
        like = ir.ExternalTensor(
            "scratch", offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name
        )
        return FileTensor(spill, like)
