# SPDX-License-Identifier: Apache-2.0
"""The protobuf wire format of a model, walked without parsing the weights.

A ModelProto is a tree of length-prefixed messages. Only the messages on the way to a TensorProto matter here,
and of those only the ones large enough to hold a weight, so a file of many hundred megabytes is walked by
reading its headers. Reading replaces each large payload by an external reference to the file itself
(`externalise`), writing puts the payloads back into the stream (`splice`); both rewrite the length prefixes
of every enclosing message.

Format: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import onnx
from google.protobuf.descriptor import Descriptor

from onnxcollapse.errors import ModelError

BIG = 1024
"""Payloads of at least this many bytes are left in the file."""

PLACEHOLDER = "onnxcollapse:payload"
"""The external location of a tensor whose bytes are spliced in when the model is written."""

_WINDOW = 1 << 16
_MAX_DEPTH = 100  # protobuf's own recursion limit
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Payload:
    """The bytes of the `index`-th big tensor, `size` of them, to be written at this place."""

    index: int
    size: int

    def __len__(self) -> int:
        return self.size


Part = bytes | Payload


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: number, wire type, and where its tag starts, its body starts and it ends."""

    number: int
    wire: int
    start: int
    body: int
    end: int

    def __len__(self) -> int:
        return self.end - self.body


class Reader:
    """Random access to encoded bytes through a small window, so that nothing stays resident."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read = read
        self.size = size
        self._window = b""
        self._offset = 0

    def varint(self, position: int) -> tuple[int, int]:
        """Decode the varint at `position`; returns its value and the position behind it."""
        value = shift = 0
        while shift < 70:
            index = position - self._offset
            if not 0 <= index < len(self._window):
                index = self._refill(position)
            byte = self._window[index]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise _damaged("a number is longer than ten bytes")

    def _refill(self, position: int) -> int:
        if position >= self.size:
            raise _damaged("it ends in the middle of a field")
        self._window = self.read(position, min(_WINDOW, self.size - position))
        self._offset = position
        return 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message in `[start, end)`, in stream order."""
        position = start
        while position < end:
            tag, body = self.varint(position)
            wire = tag & 7
            if wire == _BYTES:
                length, body = self.varint(body)
                stop = body + length
            elif wire == _VARINT:
                _, stop = self.varint(body)
            elif wire in (_FIXED64, _FIXED32):
                stop = body + (8 if wire == _FIXED64 else 4)
            else:
                raise _damaged(f"it uses wire type {wire}")
            if stop > end:
                raise _damaged("a field is longer than what is left")
            yield Field(tag >> 3, wire, position, body, stop)
            position = stop


def _damaged(fact: str) -> ModelError:
    return ModelError(f"not a whole ONNX model: {fact}; export or download it again")


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer as a base-128 varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def length(parts: Sequence[Part]) -> int:
    """Bytes that `parts` take in the stream."""
    return sum(map(len, parts))


def _header(number: int, size: int) -> bytes:
    return encode_varint(number << 3 | _BYTES) + encode_varint(size)


@cache
def _children(message: Descriptor) -> dict[int, Descriptor]:
    """Fields of a message type through which a TensorProto can be reached: number -> message type."""
    return {
        f.number: f.message_type for f in message.fields if f.message_type and _holds_tensor(f.message_type)
    }


@cache
def _holds_tensor(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    if message.full_name == _TENSOR.full_name:
        return True
    if message.full_name in seen | _WHOLE:
        return False
    seen |= {message.full_name}
    return any(f.message_type and _holds_tensor(f.message_type, seen) for f in message.fields)


# Training info is carried as it is (see carry.py), so it stays whole.
_WHOLE = {onnx.TrainingInfoProto.DESCRIPTOR.full_name}
_MODEL = onnx.ModelProto.DESCRIPTOR
_TENSOR = onnx.TensorProto.DESCRIPTOR
_NUMBER: dict[str, int] = {field.name: field.number for field in _TENSOR.fields}
_PACKED = {_NUMBER["float_data"]: onnx.TensorProto.FLOAT, _NUMBER["double_data"]: onnx.TensorProto.DOUBLE}
_EXTERNAL_FIELDS = {_NUMBER["external_data"], _NUMBER["data_location"]}


class Walk:
    """Rewrites the tensors of an encoded message; everything else is copied as it stands.

    Args:
        reader: The encoded message.
        tensor: Called with the fields of each TensorProto reached; returns its new encoding, or None to keep
        it.
        worth: Called with the extent of a message; False when no tensor in it can be of interest.
    """

    def __init__(
        self,
        reader: Reader,
        tensor: Callable[[list[Field]], list[Part] | None],
        worth: Callable[[int, int], bool],
    ) -> None:
        self._reader = reader
        self._tensor = tensor
        self._worth = worth

    def message(self, kind: Descriptor, start: int, end: int, depth: int = 0) -> list[Part] | None:
        """The new encoding of the `kind` message in `[start, end)`; None when nothing in it changed."""
        if kind is _TENSOR:
            return self._tensor(list(self._reader.fields(start, end)))
        if depth > _MAX_DEPTH:
            raise _damaged(f"its messages are nested more than {_MAX_DEPTH} deep")
        children = _children(kind)
        parts: list[Part] = []
        copied = start
        for field in self._reader.fields(start, end):
            child = children.get(field.number)
            if child is None or field.wire != _BYTES or not self._worth(field.body, field.end):
                continue
            changed = self.message(child, field.body, field.end, depth + 1)
            if changed is not None:
                parts.append(self._reader.read(copied, field.start - copied))
                parts.append(_header(field.number, length(changed)))
                parts.extend(changed)
                copied = field.end
        if not parts:
            return None
        parts.append(self._reader.read(copied, end - copied))
        return parts


def externalise(reader: Reader, location: str) -> bytes:
    """The model with every payload of at least `BIG` bytes replaced by an external reference.

    Args:
        reader: The encoded ModelProto.
        location: What the references name: the file that `reader` reads.

    Returns:
        The skeleton, encoded. `offset` and `length` of each reference point into the reader's bytes.

    Raises:
        ModelError: The bytes do not form a message.
    """

    def tensor(fields: list[Field]) -> list[Part] | None:
        payload = _payload(reader, fields)
        if payload is None:
            return None
        dropped = _EXTERNAL_FIELDS | {payload.number}
        kept = [reader.read(f.start, f.end - f.start) for f in fields if f.number not in dropped]
        return [*kept, _reference(location, payload.body, len(payload))]

    walk = Walk(reader, tensor, lambda start, end: end - start >= BIG)
    parts = walk.message(_MODEL, 0, reader.size)
    if parts is None:
        return reader.read(0, reader.size)
    return b"".join(part for part in parts if isinstance(part, bytes))


def _payload(reader: Reader, fields: list[Field]) -> Field | None:
    """The one field that holds the tensor's bytes as raw_data would, if it is big."""
    big = [f for f in fields if f.wire == _BYTES and len(f) >= BIG]
    raw = [f for f in fields if f.number == _NUMBER["raw_data"]]
    if raw:
        return raw[0] if len(raw) == 1 and raw[0] in big else None
    # Packed little-endian floats are the same bytes as raw_data; the other typed fields are varints.
    kinds = [
        reader.varint(f.body)[0] for f in fields if f.number == _NUMBER["data_type"] and f.wire == _VARINT
    ]
    packed = [f for f in fields if f.number in _PACKED]
    if len(packed) == 1 and packed[0] in big and kinds and kinds[-1] == _PACKED[packed[0].number]:
        return packed[0]
    return None


def _reference(location: str, offset: int, size: int) -> bytes:
    proto = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
        proto.external_data.add(key=key, value=value)
    return proto.SerializeToString()


def splice(skeleton: bytes) -> list[Part]:
    """The stream of a model in which the tensors that refer to `PLACEHOLDER` hold their bytes as raw_data.

    Args:
        skeleton: An encoded ModelProto. A placeholder's external `offset` is the index of the payload and its
            `length` the payload's size.

    Returns:
        Encoded bytes and payloads, in stream order.
    """
    reader = Reader(lambda offset, size: skeleton[offset : offset + size], len(skeleton))
    token = PLACEHOLDER.encode()

    def tensor(fields: list[Field]) -> list[Part] | None:
        payload = _placeholder(skeleton, fields)
        if payload is None:
            return None
        raw: list[Part] = [_header(_NUMBER["raw_data"], len(payload)), payload]
        kept = [field for field in fields if field.number not in _EXTERNAL_FIELDS]
        # Fields stay in ascending order, as protobuf writes them.
        before = [skeleton[f.start : f.end] for f in kept if f.number < _NUMBER["raw_data"]]
        behind = [skeleton[f.start : f.end] for f in kept if f.number > _NUMBER["raw_data"]]
        return [*before, *raw, *behind]

    walk = Walk(reader, tensor, lambda start, end: skeleton.find(token, start, end) >= 0)
    return walk.message(_MODEL, 0, len(skeleton)) or [skeleton]


def _placeholder(skeleton: bytes, fields: list[Field]) -> Payload | None:
    proto = onnx.TensorProto()
    for field in fields:
        if field.number in _EXTERNAL_FIELDS:
            proto.MergeFromString(skeleton[field.start : field.end])
    entries = {entry.key: entry.value for entry in proto.external_data}
    if entries.get("location") != PLACEHOLDER:
        return None
    return Payload(int(entries["offset"]), int(entries["length"]))
