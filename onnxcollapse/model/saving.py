# SPDX-License-Identifier: Apache-2.0
"""Writing a model without holding its weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import carry, files, skeleton, wire
from onnxcollapse.model.weights import chunks, identity

logger = logging.getLogger(__name__)

LIMIT = onnx.checker.MAXIMUM_PROTOBUF
"""Bytes that one protobuf message may have."""

SIDECAR_MARK = b"onnxcollapse weights\n"
"""First bytes of the weight files written here, by which a later save knows that it may remove one."""

_PAGE = 4096
_ALIGNMENT = 64  # of tensors smaller than a page


class _Inline:
    """Collects big tensors as payloads to be spliced into the stream."""

    def __init__(self) -> None:
        self.tensors: list[ir.TensorProtocol] = []

    def place(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not skeleton.is_big(tensor):
            return tensor
        self.tensors.append(tensor)
        return skeleton.reference(tensor, wire.PLACEHOLDER, len(self.tensors) - 1)


class _Sidecar:
    """Lays big tensors out in a sidecar file; what is stored once in the source is stored once here.

    Args:
        name: Name of the sidecar.
        inline: Ids of the tensors that must stay inside the model.
    """

    def __init__(self, name: str, inline: set[int]) -> None:
        self.name = name
        self.inside = _Inline()
        self._inline = inline
        self.layout: list[tuple[int, ir.TensorProtocol]] = []
        self._offsets: dict[Hashable, int] = {}
        self._end = len(SIDECAR_MARK)

    def place(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not skeleton.is_big(tensor):
            return tensor
        if id(tensor) in self._inline:
            return self.inside.place(tensor)
        key = identity(tensor)
        if key not in self._offsets:
            alignment = _PAGE if tensor.nbytes >= _PAGE else _ALIGNMENT
            self._offsets[key] = -(-self._end // alignment) * alignment
            self._end = self._offsets[key] + tensor.nbytes
            self.layout.append((self._offsets[key], tensor))
        return skeleton.reference(tensor, self.name, self._offsets[key])

    def write(self, file: BinaryIO) -> None:
        file.write(SIDECAR_MARK)
        position = len(SIDECAR_MARK)
        for offset, tensor in self.layout:
            file.write(bytes(offset - position))
            for chunk in chunks(tensor):
                file.write(chunk)
            position = offset + tensor.nbytes


def _stream(model: ir.Model) -> tuple[list[wire.Part], list[ir.TensorProtocol]]:
    inline = _Inline()
    proto = skeleton.encode(model, inline.place)
    return wire.splice(_encoded(proto)), inline.tensors


def _encoded(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def _write_stream(parts: Sequence[wire.Part], tensors: Sequence[ir.TensorProtocol], file: BinaryIO) -> None:
    for part in parts:
        if isinstance(part, wire.Payload):
            for chunk in chunks(tensors[part.index]):
                file.write(chunk)
        else:
            file.write(part)


def to_bytes(model: ir.Model) -> bytes:
    """The whole model, weights inside.

    Raises:
        ModelError: It is larger than a protobuf message may be.
    """
    parts, tensors = _stream(model)
    if wire.length(parts) > LIMIT:
        raise ModelError(
            f"the model takes {wire.length(parts)} bytes, more than one message may have; save it instead"
        )
    file = BytesIO()
    _write_stream(parts, tensors, file)
    return file.getvalue()


def save(model: ir.Model, target: Path, *, external: bool | None) -> None:
    """Write the model to `target`, replacing what is there at once or not at all.

    Args:
        model: The model.
        target: The .onnx file.
        external: Weights into `<target>.data` beside it; None: only when they do not fit into one message.

    Raises:
        ModelError: The files cannot be written, or the weights must be inline and do not fit.
    """
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder; name a file in it")
    if not external:
        parts, tensors = _stream(model)
        fits = wire.length(parts) <= LIMIT
        if not fits and external is False:
            raise ModelError(f"{target} would take {wire.length(parts)} bytes, more than one file may have; "
                             "save with external data")  # fmt: skip
        external = not fits
    with files.staging(target) as folder:
        staged = []
        if external:
            sidecar = _Sidecar(target.name + ".data", carry.sparse_parts(model))
            parts = wire.splice(_encoded(skeleton.encode(model, sidecar.place)))
            tensors = sidecar.inside.tensors
            if sidecar.layout:
                staged.append(folder / sidecar.name)
                with staged[-1].open("wb") as file:
                    sidecar.write(file)
                    _sync(file)
        staged.append(folder / target.name)
        with staged[-1].open("wb") as file:
            _write_stream(parts, tensors, file)
            _sync(file)
        files.commit(staged, target.parent)
        if len(staged) == 1:
            _remove_stale_sidecar(target.with_name(target.name + ".data"))
    logger.debug("wrote %s", target)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_stale_sidecar(path: Path) -> None:
    """Remove a weight file that an earlier save of the same model left here; files of others stay."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        ours = file.read(len(SIDECAR_MARK)) == SIDECAR_MARK
    if ours:
        path.unlink()
