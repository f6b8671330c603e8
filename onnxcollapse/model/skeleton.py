# SPDX-License-Identifier: Apache-2.0
"""ModelProtos without the weights: for writing, for sessions, for shape inference and for the checker."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import carry, walk
from onnxcollapse.model.weights import identity
from onnxcollapse.model.wire import BIG

SESSION_LOCATION = "onnxcollapse.weights"
_SHAPE_DATA = 1 << 16  # integer tensors up to this size may be shapes or indices that inference reads


@dataclass(frozen=True)
class Skeleton:
    """A model for ONNX Runtime whose big weights are handed over in memory.

    Attributes:
        proto: The model. Big initializers of the main graph refer to a file that does not exist.
        weights: Their tensors by name, for `SessionOptions.add_external_initializers`.
    """

    proto: onnx.ModelProto
    weights: dict[str, ir.TensorProtocol]


@dataclass(frozen=True)
class Imprint:
    """What a model computes, to tell it from others: equal only for models of the same graph and weights.

    Attributes:
        graph: Digest of the graph and of its small tensors.
        weights: What tells its big tensors apart, in a fixed order; they are immutable, so nobody need read them.
        tensors: These, held so that no later tensor can take over an identity.
    """

    graph: bytes
    weights: tuple[Hashable, ...]
    tensors: tuple[ir.TensorProtocol, ...] = field(compare=False, repr=False)


def clone(model: ir.Model) -> ir.Model:
    """A copy of the graph that shares the weights."""
    with walk.collection_paused():
        cloned = model.clone()
    carry.copy_meta(model, cloned)
    for graph in walk.graphs(cloned):
        for value in walk.values(graph):
            # onnx_ir shares the type objects, and setting a value's dtype changes them in place.
            value.type = own_type(value.type)
    return cloned


def own_type(shared: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """A type object of its own for a value that is to have the type of another."""
    if isinstance(shared, ir.TensorType):
        return ir.TensorType(shared.dtype, denotation=shared.denotation)
    return copy.deepcopy(shared)


def encode(model: ir.Model, change: walk.TensorMap) -> onnx.ModelProto:
    """A proto of the model in which every stored tensor is `change(tensor)`; `model` stays as it is.

    Tensors that `change` leaves alone are inside the proto, wherever they lie.
    """

    def changed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        new = change(tensor)
        return in_memory(new) if new is tensor else new

    cloned = clone(model)
    walk.map_tensors(cloned, changed)
    return _proto(cloned)


def _proto(model: ir.Model) -> onnx.ModelProto:
    for tensor in walk.tensors(model):
        if isinstance(tensor, ir.serde.TensorProtoTensor) and tensor.raw.metadata_props:
            tensor.raw.ClearField("metadata_props")  # read already; onnx_ir 1.1 would write the entries twice
    try:
        with walk.collection_paused():
            proto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise ModelError(f"the graph cannot be written: {root_cause(error)}") from error
    carry.restore(proto, model)
    return proto


def root_cause(error: BaseException) -> str:
    """What an onnx_ir error goes back to, in one line; its own message only names the place."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split())[:200] or type(error).__name__


def reference(tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    """A placeholder for `tensor` that serialises to a reference to its bytes at `offset` of `location`."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
    )


def is_big(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor is kept out of skeletons: raw bytes, and many of them."""
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= BIG


def for_session(model: ir.Model) -> Skeleton:
    """The model for an ONNX Runtime session that gets its weights in memory.

    Big constants of the main graph become initializers, since only those can be handed over; what lies in
    subgraphs and functions stays inside the proto.

    Raises:
        ModelError: The weights in subgraphs and functions exceed what a proto can hold.
    """
    cloned = clone(model)
    _lift_constants(cloned.graph)
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(cloned.graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            # ONNX Runtime refuses to be handed what the graph does not read.
            del cloned.graph.initializers[name]
        elif value.const_value is not None and is_big(value.const_value):
            weights[name] = value.const_value
            value.const_value = reference(value.const_value, SESSION_LOCATION, 0)
    rest = sum(t.nbytes for t in walk.tensors(cloned) if is_big(t) and not _is_reference(t))
    if rest >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ModelError(
            f"subgraphs and functions hold {rest} bytes of weights, more than a session can be given"
        )
    walk.map_tensors(cloned, lambda tensor: tensor if _is_reference(tensor) else in_memory(tensor))
    return Skeleton(_proto(cloned), weights)


def _is_reference(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and tensor.location == SESSION_LOCATION


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor itself, or a copy in memory of one that lies in a file."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    proto = onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.dtype.value,
        dims=tensor.shape.numpy(),
        raw_data=tensor.tobytes(),
        doc_string=tensor.doc_string,
    )
    held = ir.serde.TensorProtoTensor(proto)
    held.metadata_props.update(tensor.metadata_props)
    return held


def _lift_constants(graph: ir.Graph) -> None:
    for node in list(graph):
        held = node.attributes.get("value") if node.op_type == "Constant" and node.domain == "" else None
        if held is None or held.is_ref() or not is_big(held.value):
            continue
        [old] = node.outputs
        if old.is_graph_output():
            continue
        name, tensor = old.name, held.value
        old.name = None
        new = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        graph.initializers.add(new)


def for_inference(model: ir.Model) -> onnx.ModelProto:
    """The model with its big tensors reduced to type and shape, for `onnx.shape_inference`.

    Small integer tensors stay, since Reshape and its like read them.
    """

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        small = not is_big(tensor) or (tensor.dtype == ir.DataType.INT64 and tensor.nbytes <= _SHAPE_DATA)
        return tensor if small else reference(tensor, SESSION_LOCATION, 0)

    return strip(encode(model, change))


def imprint(model: ir.Model) -> Imprint:
    """What tells a model from others, without reading its weights."""
    held: list[ir.TensorProtocol] = []

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not is_big(tensor):
            return tensor
        held.append(tensor)
        return reference(tensor, SESSION_LOCATION, 0)

    graph = encode(model, change).SerializeToString(deterministic=True)
    return Imprint(hashlib.sha256(graph).digest(), tuple(map(identity, held)), tuple(held))


def for_checker(model: ir.Model) -> onnx.ModelProto:
    """The model with its big tensors emptied, for `onnx.checker` without shape inference."""

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not is_big(tensor):
            return tensor
        return ir.serde.TensorProtoTensor(
            onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value, dims=[0])
        )

    return encode(model, change)


def strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Take the data out of the big tensors of `proto`, references to files included; type and shape stay."""
    for graph in carry.proto_graphs(proto):
        tensors = list(graph.initializer) if isinstance(graph, onnx.GraphProto) else []
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t] if attribute.HasField("t") else attribute.tensors
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
            elif len(tensor.raw_data) > _SHAPE_DATA:
                tensor.ClearField("raw_data")
    return proto
