# SPDX-License-Identifier: Apache-2.0
"""Files that weights are read from, and tensors that lie in them."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError


class Source:
    """A weight file, read by offset without leaving pages resident.

    A held file stays open, so its bytes remain readable after the path has been replaced, by our own save
    included. One that is not held is opened for each read and must still be the file that was loaded.

    Args:
        path: The file.
        hold: Keep it open. False for models of very many weight files, which would use up the process's
        descriptors.
    """

    def __init__(self, path: Path, *, hold: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._file: BinaryIO | None = None
        with path.open("rb", buffering=0) as file:
            self.stamp = _stamp(file)
        self.size = self.stamp[2]
        if hold:
            self.hold()

    def hold(self) -> None:
        """Keep the file open from now on."""
        if self._file is None:
            self._file = self._open()

    def _open(self) -> BinaryIO:
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(
                f"cannot read weights from {self.path}: {error.strerror}; restore the file"
            ) from error
        if _stamp(file) != self.stamp:
            file.close()
            raise ModelError(f"{self.path} has changed since it was loaded; load the model again")
        return file

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`; raises ModelError when the file is shorter."""
        if self._file is not None:
            with self._lock:
                data = _read(self._file, offset, size)
        else:
            with self._open() as file:
                data = _read(file, offset, size)
        if len(data) != size:
            raise ModelError(f"{self.path} ends before byte {offset + size}; restore the file")
        return data

    def map(self, offset: int, size: int) -> memoryview:
        """The `size` bytes at `offset`, mapped read-only."""
        with self._lock:
            if self._map is None:
                # One mapping for all tensors: Python duplicates the descriptor for each mapping it makes.
                with self._file_for_mapping() as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return memoryview(self._map)[offset : offset + size]

    def _file_for_mapping(self) -> BinaryIO:
        if self._file is None:
            return self._open()
        return os.fdopen(os.dup(self._file.fileno()), "rb", buffering=0)

    def release(self, offset: int, size: int) -> None:
        """Let the mapped pages of a range leave resident memory; views of them stay valid."""
        if self._map is not None and hasattr(self._map, "madvise"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, min(offset + size, self.size) - start)


def _stamp(file: BinaryIO) -> tuple[int, int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    while len(data) < size:  # one system call returns at most 2 GB
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data


class FileTensor(ir.ExternalTensor):
    """A tensor whose bytes lie in a `Source`: mapped when its array is asked for, read in pieces otherwise.

    It is an `ir.ExternalTensor`, so onnx_ir serialises it as a reference; it never goes through that class's
    own opening of the path, which would read other bytes once the file has been replaced.
    """

    __slots__ = ("source",)

    def __init__(self, source: Source, like: ir.ExternalTensor) -> None:
        super().__init__(
            str(source.path),
            like.offset or 0,
            like.nbytes,
            like.dtype,
            shape=like.shape,  # type: ignore[arg-type]
            name=like.name,
            doc_string=like.doc_string,
            metadata_props=dict(like.metadata_props) or None,
        )
        self.source = source

    @property
    def start(self) -> int:
        """Offset of the first byte in the source."""
        return self.offset or 0

    def read(self, start: int, size: int) -> bytes:
        """Bytes `start` to `start + size` of the tensor."""
        return self.source.read(self.start + start, size)

    def _load(self) -> None:
        shape = self.shape.numpy()
        if self.size == 0:
            self._array = np.empty(shape, self.dtype.numpy())
            return
        data = self.source.map(self.start, self.nbytes)
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(data, np.uint8)
            self._array = ir.PackedTensor(packed, self.dtype, shape=shape).numpy()
        else:
            self._array = np.frombuffer(data, self.dtype.numpy().newbyteorder("<")).reshape(shape)

    def tobytes(self) -> bytes:
        """All bytes, little-endian, read from the file."""
        return self.read(0, self.nbytes)

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write the bytes to `file`."""
        file.write(self.tobytes())

    def release(self) -> None:
        """Drop the array; its pages leave resident memory even while somebody holds a view."""
        self._array = None
        self.source.release(self.start, self.nbytes)
