# SPDX-License-Identifier: Apache-2.0
"""Gives a graph that went through onnx-graphsurgeon back what was dropped on the way, by name."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxcollapse.model import walk


def restore(original: ir.Model, made: ir.Model, *, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Restores metadata, doc strings, types, overloads, overridable inputs and attributes in `made`.

    Args:
        original: The model before it crossed over.
        made: The model that came back; edited in place.
        before: What graphsurgeon exports of the untouched graph: what differs in `after` is the script's doing and
            stays as the script left it.
        after: What graphsurgeon exported of the edited graph.
    """
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    made.domain, made.model_version = original.domain, original.model_version
    made.doc_string = original.doc_string
    made.metadata_props.update(original.metadata_props)
    if after.ir_version == before.ir_version:
        made.ir_version = original.ir_version
    _restore_functions(original, made, before, after)
    for old, new in _pairs(original.graph, made.graph):
        _restore_graph(old, new)
    _restore_signature(original.graph, made.graph, before.graph, after.graph)


def _pairs(old: ir.Graph, new: ir.Graph) -> list[tuple[ir.Graph, ir.Graph]]:
    """Pairs a graph with its new form, and the subgraphs of nodes that kept their names."""
    pairs = [(old, new)]
    nodes = _nodes(old)
    for node in new:
        known = nodes.get(_key(node))
        if known is not None:
            for mine, theirs in zip(walk.subgraphs(known), walk.subgraphs(node), strict=False):
                pairs += _pairs(mine, theirs)
    return pairs


def _key(node: ir.Node) -> tuple[str, str, str]:
    """Identifies a node by its name, or for want of one by its first output, and what it does."""
    first = node.outputs[0].name if node.outputs else ""
    return node.name or f"->{first}", node.domain, node.op_type


def _nodes(graph: ir.Graph) -> dict[tuple[str, str, str], ir.Node]:
    return {_key(node): node for node in graph}


def _restore_graph(old: ir.Graph, new: ir.Graph) -> None:
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    nodes = _nodes(old)
    for node in new:
        known = nodes.get(_key(node))
        if known is None:
            continue
        node.doc_string, node.overload = known.doc_string, known.overload
        node.metadata_props.update(known.metadata_props)
        for name, attribute in known.attributes.items():
            if attribute.type in _UNKNOWN_TYPES and name not in node.attributes:
                node.attributes[name] = attribute
    values = _values(old)
    for name, value in _values(new).items():
        if name in values:
            _restore_value(values[name], value)


_UNKNOWN_TYPES = {
    ir.AttributeType.TENSORS,
    ir.AttributeType.GRAPHS,
    ir.AttributeType.SPARSE_TENSOR,
    ir.AttributeType.SPARSE_TENSORS,
    ir.AttributeType.TYPE_PROTO,
    ir.AttributeType.TYPE_PROTOS,
}


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name: value for value in values if value.name}


def _restore_value(old: ir.Value, new: ir.Value) -> None:
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    if new.type is None:
        new.type = old.type
    if old.const_value is not None and new.const_value is not None:
        new.const_value.doc_string = old.const_value.doc_string
    for key, value in old.meta.items():
        new.meta[key] = value


def _restore_signature(
    old: ir.Graph, new: ir.Graph, before: onnx.GraphProto, after: onnx.GraphProto
) -> None:
    """Puts overridable inputs back in their places, and types and shapes that the script did not touch."""
    names = {value.name for value in new.inputs}
    for index, value in enumerate(old.inputs):
        held = new.initializers.get(value.name or "")
        if value.is_initializer() and held is not None and value.name not in names:
            new.inputs.insert(min(index, len(new.inputs)), held)
    left = {info.name: info for info in [*before.input, *before.output]}
    same = {info.name for info in [*after.input, *after.output] if left.get(info.name) == info}
    values = {value.name: value for value in [*old.inputs, *old.outputs]}
    for value in [*new.inputs, *new.outputs]:
        known = values.get(value.name)
        if known is not None and (value.name in same or value.is_initializer()):
            value.type, value.shape = known.type, known.shape


def _restore_functions(
    original: ir.Model, made: ir.Model, before: onnx.ModelProto, after: onnx.ModelProto
) -> None:
    """Brings functions back that the script did not touch; graphsurgeon drops their overloads and metadata."""
    untouched = [function.SerializeToString() for function in before.functions]
    unchanged = all(function.SerializeToString() in untouched for function in after.functions)
    kept = {(function.domain, function.name) for function in after.functions}
    if not unchanged:
        changed = [f for f in after.functions if f.SerializeToString() not in untouched]
        overloaded = {key[:2] for key in original.functions if key[2]}
        clash = [f"{f.domain}.{f.name}" for f in changed if (f.domain, f.name) in overloaded]
        if clash:
            raise ValueError(f"function {clash[0]} has overloads, which graphsurgeon cannot edit")
    edited = {(f.domain, f.name) for f in after.functions if f.SerializeToString() not in untouched}
    for key, function in original.functions.items():
        if key[:2] in kept and key[:2] not in edited:
            made.functions.pop((key[0], key[1], ""), None)
            made.functions[key] = function.clone()
