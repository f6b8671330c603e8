# SPDX-License-Identifier: Apache-2.0
"""Writing a model without holding its weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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


@dataclass
class _Plan:
    """What will be written: the stream, the tensors that its payloads stand for, and the sidecar if any."""

    parts: list[wire.Part]
    tensors: list[ir.TensorProtocol]
    sidecar: _Sidecar | None = None

    def write(self, file: BinaryIO) -> None:
        for part in self.parts:
            if isinstance(part, wire.Payload):
                for chunk in chunks(self.tensors[part.index]):
                    file.write(chunk)
            else:
                file.write(part)


def _inline(model: ir.Model) -> _Plan:
    placed = _Inline()
    parts = wire.splice(_encoded(skeleton.encode(model, placed.place)))
    return _Plan(parts, placed.tensors)


def _external(model: ir.Model, name: str) -> _Plan:
    sidecar = _Sidecar(name, carry.sparse_parts(model))
    parts = wire.splice(_encoded(skeleton.encode(model, sidecar.place)))
    return _Plan(parts, sidecar.inside.tensors, sidecar if sidecar.layout else None)


def _encoded(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def to_bytes(model: ir.Model) -> bytes:
    """The whole model, weights inside.

    Raises:
        ModelError: It is larger than a protobuf message may be.
    """
    plan = _inline(model)
    size = wire.length(plan.parts)
    if size > LIMIT:
        raise ModelError(f"the model takes {size} bytes, more than one message may have; save it instead")
    file = BytesIO()
    plan.write(file)
    return file.getvalue()


def save(
    model: ir.Model,
    target: Path,
    *,
    external: bool | None,
    companions: Sequence[Path] = (),
    edit: Callable[[Path], str | None] = lambda _: None,
) -> None:
    """Write the model to `target`, replacing what is there at once or not at all.

    Args:
        model: The model.
        target: The .onnx file.
        external: Weights into `<target>.data` beside it; None: only when they do not fit into one message.
        companions: Files to copy beside it.
        edit: Gives another text for a companion, or None to copy it as it is.

    Raises:
        ModelError: The files cannot be written, or the weights must be inline and do not fit.
    """
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder; name a file in it")
    plan = _plan(model, target, external)
    with files.staging(target) as folder:
        staged = [files.stage(companion, folder, edit(companion)) for companion in companions]
        if plan.sidecar is not None:
            staged.append(_write(folder / plan.sidecar.name, plan.sidecar.write))
        staged.append(_write(folder / target.name, plan.write))
        files.commit(staged, target.parent)
        if plan.sidecar is None:
            _remove_stale_sidecar(_sidecar_of(target))
    logger.debug("wrote %s", target)


def _plan(model: ir.Model, target: Path, external: bool | None) -> _Plan:
    if external:
        return _external(model, _sidecar_of(target).name)
    plan = _inline(model)
    size = wire.length(plan.parts)
    if size <= LIMIT:
        return plan
    if external is False:
        raise ModelError(f"{target} would take {size} bytes, over 2 GB; save it with external data")
    return _external(model, _sidecar_of(target).name)


def _sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".data")


def _write(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _remove_stale_sidecar(path: Path) -> None:
    """Remove a weight file that an earlier save of the same model left here; files of others stay."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        ours = file.read(len(SIDECAR_MARK)) == SIDECAR_MARK
    if ours:
        path.unlink()
