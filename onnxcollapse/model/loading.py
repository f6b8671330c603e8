# SPDX-License-Identifier: Apache-2.0
"""Reading a model file: the graph into memory, the weights left where they are."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxcollapse.errors import ModelError
from onnxcollapse.model import carry, checks, files, skeleton, walk, wire
from onnxcollapse.model.source import FileTensor, Source

logger = logging.getLogger(__name__)

_HELD_SOURCES = 128
_FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"ORTM", "an ORT-format model"),
    (0, b"{", "a text file"),
    (0, b"<", "a text file"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file that it points to"),
)


@dataclass
class Loaded:
    """What `load` found: the graph, whether weights lie in other files, and which."""

    model: ir.Model
    external: bool
    weight_files: set[Path] = field(default_factory=set)


def load(path: Path) -> Loaded:
    """Load the model in `path`.

    Raises:
        ModelError: The file cannot be read, is damaged or not an ONNX model, or its external data is missing,
            too short or outside the model's folder.
    """
    try:
        source = Source(path.absolute())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {files.one_line(error)}") from error
    try:
        model = from_proto(_parse(source))
        binder = _Binder(source)
        walk.map_tensors(model, binder.bind)
        checks.settle(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    binder.hold()
    return Loaded(model, bool(binder.sources), set(binder.sources))


def _parse(source: Source) -> onnx.ModelProto:
    if source.size == 0:
        raise ModelError("the file is empty; export or download it again")
    try:
        encoded = wire.externalise(wire.Reader(source.read, source.size), str(source.path))
        proto = onnx.ModelProto.FromString(encoded)
    except (ModelError, DecodeError) as error:
        raise ModelError(_diagnosis(source)) from error
    if not proto.HasField("graph"):
        raise ModelError("it holds no graph, so it is not an ONNX model or a truncated one; export it again")
    if not proto.opset_import:
        raise ModelError(
            "it does not say which opset it uses, so it is truncated or damaged; export it again"
        )
    return proto


def _diagnosis(source: Source) -> str:
    head = source.read(0, min(64, source.size))
    for offset, magic, what in _FOREIGN:
        if head[offset:].startswith(magic):
            return f"it is {what}; give an .onnx file"
    return "not an ONNX model, or a truncated or damaged one; export or download it again"


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The IR of a proto, which is used up; raises ModelError for what the IR cannot hold."""
    try:
        with walk.collection_paused():
            luggage = carry.stow(proto)
            model = ir.from_proto(proto)
            carry.attach(model, luggage)
    except ModelError:
        raise
    except Exception as error:  # onnx_ir raises whatever the damage leads to
        raise ModelError(
            f"the graph is damaged or uses what is not supported: {skeleton.root_cause(error)}"
        ) from error
    return model


class _Binder:
    """Binds the tensors that lie in files to those files."""

    def __init__(self, model: Source) -> None:
        self._model = model
        self._folder = model.path.parent
        # A hub's cache keeps a model and its data as links into one folder of blobs: that folder counts too.
        self._roots = (self._folder.resolve(), model.path.resolve().parent)
        self.sources: dict[Path, Source] = {}

    def bind(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The tensor as it is used from here on."""
        _check_type(tensor)
        if isinstance(tensor, ir.serde.TensorProtoTensor):
            if tensor.raw.HasField("raw_data"):
                _check_length(tensor, len(tensor.raw.raw_data))
            return tensor
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        inside = str(tensor.location) == str(self._model.path)
        if inside:
            _check_length(tensor, tensor.length or 0)
        elif tensor.length is not None:
            _check_length(tensor, tensor.length)
        source = self._model if inside else self._source(tensor)
        end = (tensor.offset or 0) + tensor.nbytes
        if (tensor.offset or 0) < 0 or end > source.size:
            raise ModelError(
                f"external data of tensor {tensor.name!r} in {str(tensor.location)!r} ends at byte {end}, "
                f"but the file has {source.size}; download it again"
            )
        bound = FileTensor(source, tensor)
        return bound if skeleton.is_big(bound) else skeleton.in_memory(bound)

    def _source(self, tensor: ir.ExternalTensor) -> Source:
        path = self._locate(tensor)
        if path not in self.sources:
            what = f"external data of tensor {tensor.name!r}, {str(tensor.location)!r},"
            if not path.is_file():
                raise ModelError(f"{what} is missing or no file; put the file beside the model")
            try:
                self.sources[path] = Source(path, hold=False)
            except OSError as error:
                raise ModelError(f"{what} cannot be read: {files.one_line(error)}") from error
        return self.sources[path]

    def _locate(self, tensor: ir.ExternalTensor) -> Path:
        location = str(tensor.location)
        relative = Path(location)
        refused = not location or "\0" in location or relative.is_absolute() or ".." in relative.parts
        path = self._folder / relative
        if refused or not any(path.resolve().is_relative_to(root) for root in self._roots):
            raise ModelError(
                f"external data of tensor {tensor.name!r} lies outside the model's folder, at {location!r}; "
                "move the file beside the model and refer to it by name"
            )
        return path

    def hold(self) -> None:
        """Keep the files open, so that they can be replaced while the model is in use."""
        for source in list(self.sources.values())[:_HELD_SOURCES]:
            source.hold()


def _check_type(tensor: ir.TensorProtocol) -> None:
    try:
        known = tensor.dtype != ir.DataType.UNDEFINED
    except ValueError:
        known = False
    if not known:
        raise ModelError(f"tensor {tensor.name!r} has no data type, or one of a newer ONNX; export it again")


def _check_length(tensor: ir.TensorProtocol, length: int) -> None:
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(f"tensor {tensor.name!r} of strings has raw bytes; export it again")
    if length != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r} has {length} bytes, but {tensor.dtype.name}{list(tensor.shape.numpy())} "
            f"takes {tensor.nbytes}; export it again"
        )
