# SPDX-License-Identifier: Apache-2.0
"""Reading tensors: in bounded pieces, as arrays, and comparing them without holding them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable, Iterator

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model.source import FileTensor

CHUNK = 4 << 20
_TILE = 8 << 20
_SAMPLES = 16
_GLANCE = 4096


def chunks(tensor: ir.TensorProtocol, size: int = CHUNK) -> Iterator[bytes]:
    """The tensor's bytes, little-endian and packed as raw_data, in pieces of at most `size`, 4 MB by default.

    File-backed tensors are read, not mapped, because mapped pages count as resident memory. Strings come one
    by one, each behind its length in eight bytes.
    """
    if tensor.dtype == ir.DataType.STRING:
        for text in _strings(tensor):
            yield len(text).to_bytes(8, "little") + text
    elif isinstance(tensor, FileTensor):
        for start in range(0, tensor.nbytes, size):
            yield tensor.read(start, min(size, tensor.nbytes - start))
    else:
        view = _view(tensor)
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])


def _strings(tensor: ir.TensorProtocol) -> list[bytes]:
    # Not through numpy's bytes type, which drops trailing zeros.
    texts = (
        tensor.string_data() if isinstance(tensor, ir.StringTensor) else tensor.numpy().reshape(-1).tolist()
    )
    return [text if isinstance(text, bytes) else str(text).encode() for text in texts]


def _view(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of an in-memory tensor, without a copy where its array already holds them in that form."""
    if isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= 8 and sys.byteorder == "little":
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    return memoryview(tensor.tobytes())


def identity(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that are stored once: the same object, or the same bytes of the same file."""
    if isinstance(tensor, FileTensor):
        return tensor.source.stamp, tensor.start, tensor.nbytes
    return id(tensor)


def key(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that are stored once and read in the same way: of one type and shape."""
    return identity(tensor), tensor.dtype, tuple(tensor.shape.numpy())


def digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 over data type, shape and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype.name}{tuple(tensor.shape.numpy())}".encode())
    for chunk in chunks(tensor):
        sha.update(chunk)
    return sha.hexdigest()


def array(value: ir.Value | ir.TensorProtocol) -> np.ndarray:
    """The numbers as a read-only array, mapped where they lie in a file; bf16, fp8, int4 through ml_dtypes.

    Raises:
        ModelError: The value has no constant tensor.
    """
    tensor = value.const_value if isinstance(value, ir.Value) else value
    if tensor is None:
        raise ModelError(
            f"tensor {value.name!r} is computed at run time and has no array; take its producer instead"
        )
    view = tensor.numpy().view()
    view.flags.writeable = False
    return view


def release(tensor: ir.TensorProtocol) -> None:
    """Drop the mapping so that its pages leave resident memory; a no-op for tensors in memory."""
    if isinstance(tensor, FileTensor):
        tensor.release()


def equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether both have the same type, shape and bits."""
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if identity(a) == identity(b):
        return True
    if a.dtype == ir.DataType.STRING:
        return _strings(a) == _strings(b)
    if a.nbytes != b.nbytes or next(chunks(a, _GLANCE), b"") != next(chunks(b, _GLANCE), b""):
        return False
    return all(x == y for x, y in zip(chunks(a), chunks(b), strict=True))


def equal_transposed(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether matrix `a` [m, n] is bit for bit the transpose of `b` [n, m].

    Compares in tiles of at most 8 MB; a few sampled rows settle most unequal pairs.
    """
    if a.dtype != b.dtype or len(a.shape) != 2 or tuple(a.shape) != tuple(b.shape)[::-1]:
        return False
    rows, columns = a.shape.numpy()
    if not rows or not columns or a.dtype == ir.DataType.STRING or a.dtype.bitwidth < 8:
        return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy().T)
    left, right = _Matrix(a), _Matrix(b)
    sampled = sorted({row * (rows - 1) // _SAMPLES for row in range(_SAMPLES + 1)})
    block = max(1, _TILE // (columns * left.itemsize))
    spans = [(row, row + 1) for row in sampled] + [
        (row, min(row + block, rows)) for row in range(0, rows, block)
    ]
    return all(np.array_equal(left.rows(*span), right.columns(*span).T) for span in spans)


def diagonal(tensor: ir.TensorProtocol) -> bytes:
    """A few elements of a matrix's diagonal: those of its transpose as well, and seldom of any other."""
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8 or not tensor.size:
        return b""
    matrix = _Matrix(tensor)
    shorter = min(matrix.height, matrix.width)
    places = sorted({place * (shorter - 1) // _SAMPLES for place in range(_SAMPLES + 1)})
    return b"".join(matrix.element(place, place) for place in places)


class _Matrix:
    """A matrix of opaque elements that is read by rows or by columns, from its file where it has one."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.height, self.width = tensor.shape.numpy()
        self.itemsize = tensor.dtype.bitwidth // 8
        self._type = np.dtype(f"V{self.itemsize}") if self.itemsize > 8 else np.dtype(f"u{self.itemsize}")
        self._tensor = tensor if isinstance(tensor, FileTensor) else None
        if self._tensor is None:
            self._array = np.frombuffer(_view(tensor), self._type).reshape(self.height, self.width)

    def element(self, row: int, column: int) -> bytes:
        if self._tensor is None:
            return self._array[row, column].tobytes()
        return self._tensor.read((row * self.width + column) * self.itemsize, self.itemsize)

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self._tensor is None:
            return self._array[start:stop]
        stride = self.width * self.itemsize
        data = self._tensor.read(start * stride, (stop - start) * stride)
        return np.frombuffer(data, self._type).reshape(stop - start, self.width)

    def columns(self, start: int, stop: int) -> np.ndarray:
        if self._tensor is None:
            return self._array[:, start:stop]
        stride, offset, size = (
            self.width * self.itemsize,
            start * self.itemsize,
            (stop - start) * self.itemsize,
        )
        out = np.empty((self.height, stop - start), self._type)
        for row in range(self.height):
            out[row] = np.frombuffer(self._tensor.read(row * stride + offset, size), self._type)
        return out
