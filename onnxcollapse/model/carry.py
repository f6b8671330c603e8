# SPDX-License-Identifier: Apache-2.0
"""What onnx_ir cannot hold, carried through it.

onnx_ir 1.1 drops training info, sparse initializers and types it does not know, refuses sparse attributes,
and writes a value_info for every initializer. `stow` rewrites a ModelProto into an equivalent that it can
hold, `attach` puts on the IR what belongs to values, and `restore` undoes both in a ModelProto that onnx_ir
wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import walk

DOMAIN = "onnxcollapse.carried"
"""Domain of the nodes that stand for sparse initializers; they exist in memory only."""

_TRAINING = f"{DOMAIN}.training_info"
_TYPE = f"{DOMAIN}.type"
_LISTED = f"{DOMAIN}.value_info"
_SPARSE = {
    onnx.AttributeProto.SPARSE_TENSOR: f"{DOMAIN}.sparse_tensor:",
    onnx.AttributeProto.SPARSE_TENSORS: f"{DOMAIN}.sparse_tensors:",
}
_SCALARS = {
    "f": onnx.AttributeProto.FLOAT,
    "i": onnx.AttributeProto.INT,
    "s": onnx.AttributeProto.STRING,
    "t": onnx.AttributeProto.TENSOR,
    "g": onnx.AttributeProto.GRAPH,
}
_LISTS = {
    "floats": onnx.AttributeProto.FLOATS,
    "ints": onnx.AttributeProto.INTS,
    "strings": onnx.AttributeProto.STRINGS,
    "tensors": onnx.AttributeProto.TENSORS,
    "graphs": onnx.AttributeProto.GRAPHS,
}


@dataclass
class Luggage:
    """What `stow` took out: per graph, in walking order, value types and the names listed in value_info."""

    types: list[dict[str, bytes]] = field(default_factory=list)
    listed: list[set[str]] = field(default_factory=list)
    training: tuple[bytes, ...] = ()


def proto_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """All graphs and functions, in the order of `walk.graphs`."""
    yield from _nested(model.graph)
    for function in model.functions:
        yield from _nested(function)


def _nested(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and not attribute.ref_attr_name:
                yield from _nested(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for inner in attribute.graphs:
                    yield from _nested(inner)


def stow(model: onnx.ModelProto) -> Luggage:
    """Rewrite `model` in place so that onnx_ir holds all of it; returns what must be attached to the IR."""
    luggage = Luggage(training=tuple(info.SerializeToString() for info in model.training_info))
    model.ClearField("training_info")
    _refuse_duplicates(f"{f.domain}::{f.name}:{f.overload}" for f in model.functions)
    for graph in proto_graphs(model):  # a graph's attributes are typed before the walk descends into them
        for node in graph.node:
            _stow_attributes(node)
        luggage.types.append(_stow_types(graph))
        luggage.listed.append(set())
        if isinstance(graph, onnx.GraphProto):
            _refuse_duplicates(tensor.name for tensor in graph.initializer)
            infos = {info.name for info in graph.value_info}
            luggage.listed[-1] |= infos.intersection(tensor.name for tensor in graph.initializer)
            _stow_sparse_initializers(graph)
    return luggage


def _refuse_duplicates(names: Iterable[str]) -> None:
    """Initializers and functions of one name, of which onnx_ir would silently keep one."""
    names = list(names)
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"{name!r} is defined {count} times; rename or remove one")


def _stow_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
            attribute.type = _kind(attribute)
        if attribute.type in _SPARSE:
            sparse = (
                [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else attribute.sparse_tensors
            )
            for tensor in sparse:
                attribute.tensors.extend([tensor.values, tensor.indices, _dims(tensor)])
            attribute.name = _SPARSE[attribute.type] + attribute.name
            attribute.type = onnx.AttributeProto.TENSORS
            attribute.ClearField("sparse_tensor")
            attribute.ClearField("sparse_tensors")


def _kind(attribute: onnx.AttributeProto) -> onnx.AttributeProto.AttributeType:
    """The type of an attribute of a model from before IR version 2, which did not write it."""
    for name, kind in _SCALARS.items():
        if attribute.HasField(name):
            return kind
    return next((kind for name, kind in _LISTS.items() if len(getattr(attribute, name))), attribute.type)


def _dims(tensor: onnx.SparseTensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(
        data_type=onnx.TensorProto.INT64, dims=[len(tensor.dims)], int64_data=list(tensor.dims), name="dims"
    )


def _stow_types(graph: onnx.GraphProto | onnx.FunctionProto) -> dict[str, bytes]:
    """Take out the value types that onnx_ir cannot express: name -> encoded TypeProto."""
    infos = list(graph.value_info)
    if isinstance(graph, onnx.GraphProto):
        infos += [*graph.input, *graph.output]
    types = {}
    for info in infos:
        if info.HasField("type") and not _expressible(info.type):
            types[info.name] = info.type.SerializeToString()
            info.ClearField("type")
    return types


def _expressible(proto: onnx.TypeProto) -> bool:
    kind = proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        return bool(getattr(proto, kind).elem_type)
    if kind in ("sequence_type", "optional_type"):
        return _expressible(getattr(proto, kind).elem_type)
    return False


def _stow_sparse_initializers(graph: onnx.GraphProto) -> None:
    if not graph.sparse_initializer:
        return
    nodes = list(graph.node)
    sparse = list(graph.sparse_initializer)
    graph.ClearField("sparse_initializer")
    graph.ClearField("node")
    for tensor in sparse:
        node = graph.node.add(op_type="SparseInitializer", domain=DOMAIN, output=[tensor.values.name])
        attribute = node.attribute.add(name="sparse", type=onnx.AttributeProto.TENSORS)
        attribute.tensors.extend([tensor.values, tensor.indices, _dims(tensor)])
    graph.node.extend(nodes)


def attach(model: ir.Model, luggage: Luggage) -> None:
    """Put on the IR what belongs to its values, where clones copy it."""
    if luggage.training:
        model.meta[_TRAINING] = luggage.training
    for graph, types, listed in zip(walk.graphs(model), luggage.types, luggage.listed, strict=True):
        for name in listed:
            graph.initializers[name].meta[_LISTED] = True
        if types:
            for value in walk.values(graph):
                if value.name in types:
                    value.meta[_TYPE] = types[value.name]


def copy_meta(source: ir.Model, target: ir.Model) -> None:
    """Carry over the model-level meta, which `ir.Model.clone` leaves behind."""
    target.meta.update(source.meta)


def sparse_parts(model: ir.Model) -> set[int]:
    """Ids of the tensors that are parts of sparse ones, which no runtime reads from external data."""
    nodes = [node for graph in walk.graphs(model) for node in graph]
    attributes = [
        (node, a) for node in nodes for a in node.attributes.values() if a.type == ir.AttributeType.TENSORS
    ]
    return {
        id(tensor)
        for node, attribute in attributes
        if node.domain == DOMAIN or attribute.name.startswith(tuple(_SPARSE.values()))
        for tensor in attribute.value
    }


def has_training_info(model: ir.Model) -> bool:
    """Whether the model carries training info."""
    return _TRAINING in model.meta


def type_name(value: ir.Value) -> str | None:
    """What kind of type a value has that onnx_ir cannot express (`map_type`, ...); None for the others."""
    encoded = value.meta.get(_TYPE)
    return None if encoded is None else onnx.TypeProto.FromString(encoded).WhichOneof("value") or "unknown"


def restore(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Undo `stow` in `proto`, which onnx_ir made from `model`."""
    for encoded in model.meta.get(_TRAINING, ()):
        proto.training_info.add().MergeFromString(encoded)
    pairs = list(zip(proto_graphs(proto), walk.graphs(model), strict=True))
    for written, graph in reversed(
        pairs
    ):  # inner graphs first, because rewriting a node list copies the nodes
        for node in written.node:
            _restore_attributes(node)
        types = {v.name: v.meta[_TYPE] for v in walk.values(graph) if _TYPE in v.meta and v.type is None}
        if isinstance(written, onnx.GraphProto):
            _restore_types(written, types)
            _restore_sparse_initializers(written)
            _restore_value_info(written, graph)
            _unique_annotations(written)


def _restore_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        for kind, prefix in _SPARSE.items():
            if not attribute.name.startswith(prefix):
                continue
            attribute.name = attribute.name.removeprefix(prefix)
            attribute.type = kind
            for tensor in _sparse_tensors(attribute):
                if kind == onnx.AttributeProto.SPARSE_TENSOR:
                    attribute.sparse_tensor.CopyFrom(tensor)
                else:
                    attribute.sparse_tensors.append(tensor)
            attribute.ClearField("tensors")


def _sparse_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.SparseTensorProto]:
    for index in range(0, len(attribute.tensors), 3):
        values, indices, dims = attribute.tensors[index : index + 3]
        yield onnx.SparseTensorProto(values=values, indices=indices, dims=list(dims.int64_data))


def _restore_types(graph: onnx.GraphProto, types: dict[str | None, bytes]) -> None:
    if not types:
        return
    listed = set()
    for info in [*graph.input, *graph.output, *graph.value_info]:
        listed.add(info.name)
        if info.name in types:
            info.type.ParseFromString(types[info.name])
    for name, encoded in types.items():
        if name and name not in listed:
            graph.value_info.add(name=name).type.ParseFromString(encoded)


def _restore_sparse_initializers(graph: onnx.GraphProto) -> None:
    carried = [node for node in graph.node if node.domain == DOMAIN]
    if not carried:
        return
    names = set()
    for node in carried:
        [tensor] = _sparse_tensors(node.attribute[0])
        tensor.values.name = node.output[0]
        names.add(node.output[0])
        graph.sparse_initializer.append(tensor)
    nodes = [node for node in graph.node if node.domain != DOMAIN]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _restore_value_info(graph: onnx.GraphProto, source: ir.Graph) -> None:
    """Take out the value_info of initializers that had none: it repeats what the tensor says."""
    unlisted = {name for name, value in source.initializers.items() if _LISTED not in value.meta}
    infos = list(graph.value_info)
    kept = [i for i in infos if i.name not in unlisted or i.metadata_props or i.doc_string]
    if len(kept) < len(infos):
        graph.ClearField("value_info")
        graph.value_info.extend(kept)


def _unique_annotations(graph: onnx.GraphProto) -> None:
    """Take out repeated annotations: onnx_ir writes one for each role that a value has."""
    seen: dict[str, onnx.TensorAnnotation] = {}
    for annotation in graph.quantization_annotation:
        seen.setdefault(annotation.tensor_name, annotation)
    if len(seen) < len(graph.quantization_annotation):
        kept = list(seen.values())
        graph.ClearField("quantization_annotation")
        graph.quantization_annotation.extend(kept)
