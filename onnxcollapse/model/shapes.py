# SPDX-License-Identifier: Apache-2.0
"""Shapes of intermediate tensors, inferred again where an edit touched them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxcollapse.model import skeleton, walk

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

# What shapes are computed with; asked of values whose type the model does not say.
_SHAPE_OPERATORS = frozenset({
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity",
    "Max", "Min", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub",
    "Unsqueeze", "Where",
})  # fmt: skip

logger = logging.getLogger(__name__)


def refresh_shapes(model: Model, values: Iterable[ir.Value]) -> None:
    """Clear the shapes of `values` and infer them again from the nodes that make them.

    Inputs, outputs and initializers keep what is declared. A dynamic axis stays dynamic; a shape that cannot
    be inferred is left unknown rather than stale.

    Args:
        model: The model that the values belong to.
        values: The values whose shape an edit may have changed.
    """
    touched = [v for v in dict.fromkeys(values) if v.producer() is not None and not v.is_graph_output()]
    for value in touched:
        value.shape = None
    by_graph: dict[ir.Graph, list[ir.Value]] = {}
    for value in touched:
        if value.graph is not None:
            by_graph.setdefault(value.graph, []).append(value)
    for graph, members in by_graph.items():
        inferred = _infer(model.ir, graph, members)
        for value in members:
            found = inferred.get(value.name or "")
            if found is None:
                continue
            value.shape = ir.serde.deserialize_type_proto_for_shape(found)
            if value.type is None:
                value.type = ir.serde.deserialize_type_proto_for_type(found)


def _infer(model: ir.Model, graph: ir.Graph, values: list[ir.Value]) -> dict[str, onnx.TypeProto]:
    """Types of `values` by name, from a model of only the nodes that make them."""
    wanted = _producers(values)
    nodes = [node for node in graph if node in wanted]
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    made = {value for node in nodes for value in node.outputs}
    for value in dict.fromkeys(v for node in nodes for v in _reads(node)):
        if value not in made:
            _declare(proto.graph, value)
    for node in nodes:
        ir.serde.serialize_node_into(proto.graph.node.add(), node)
    for value in values:
        proto.graph.output.add(name=value.name or "")
    symbols = {dim.dim_param for info in proto.graph.input for dim in info.type.tensor_type.shape.dim}
    result = infer(skeleton.strip(proto))
    infos = [*result.graph.value_info, *result.graph.output]
    for info in infos:
        _drop_invented_symbols(info, symbols)
    return {info.name: info.type for info in infos if info.type.WhichOneof("value")}


def _drop_invented_symbols(info: onnx.ValueInfoProto, known: set[str]) -> None:
    """Take out names that inference made up (`unk__0`): elsewhere they may mean another size."""
    if info.type.HasField("tensor_type"):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param not in known:
                dim.ClearField("dim_param")


def infer(proto: onnx.ModelProto, *, computed: bool = True) -> onnx.ModelProto:
    """`proto` with the shapes that can be inferred; unchanged when inference fails as a whole.

    Args:
        proto: The model.
        computed: Whether what shapes are computed from is followed as onnx does it: casts that change numbers, and
            shapes in tensors of rank 2, mislead it.
    """
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=computed)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        logger.debug("shape inference failed: %s", error)
        return proto


def _producers(values: list[ir.Value]) -> set[ir.Node]:
    """The nodes that make `values`, and those that compute the shapes which they read."""
    wanted: set[ir.Node] = set()
    waiting = [(value, True) for value in values]
    while waiting:
        value, needed = waiting.pop()
        node = value.producer()
        if node is None or node in wanted or node.graph is not values[0].graph:
            continue
        if not (needed or _may_be_shape(value, node)):
            continue
        wanted.add(node)
        waiting += [(source, False) for source in _reads(node)]
    return wanted


def _may_be_shape(value: ir.Value, node: ir.Node) -> bool:
    if value.dtype is None:
        return node.op_type in _SHAPE_OPERATORS
    return value.dtype == ir.DataType.INT64 and (value.shape is None or len(value.shape) <= 1)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What the node reads, what its subgraphs capture included."""
    read = [value for value in node.inputs if value is not None]
    for inner in walk.subgraphs(node):
        graphs = list(walk.nested(inner))
        own = {value for g in graphs for value in walk.values(g)}
        read += [v for g in graphs for n in g for v in n.inputs if v is not None and v not in own]
    return read


def _declare(graph: onnx.GraphProto, value: ir.Value) -> None:
    tensor = value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if tensor is not None and not skeleton.is_big(tensor):
        initializer = graph.initializer.add()
        initializer.CopyFrom(ir.to_proto(tensor))
        initializer.name = value.name or ""
    elif value.type is not None:
        ir.serde.serialize_value_into(graph.input.add(), value)
