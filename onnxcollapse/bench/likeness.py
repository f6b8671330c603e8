# SPDX-License-Identifier: Apache-2.0
"""Which models take equally long: the same operators on the same shapes, whatever the weights' values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.model import Model

SMALL_INDEX = 64
"""Integer constants up to this many elements are shapes, axes or bounds, which say what an operator does."""


def likeness(model: Model, feeds: Mapping[str, np.ndarray]) -> str:
    """Digest that models share when they run the same operators on tensors of the same shapes and types.

    Names and the values of weights do not enter; those of scalars and small integer tensors do.

    Args:
        model: The model.
        feeds: What it is run on; shapes and types enter.
    """
    numbers: dict[ir.Value, int] = {}
    graph = model.graph
    fed = [
        (_number(value, numbers), feeds[value.name or ""].shape, str(feeds[value.name or ""].dtype))
        for value in graph.inputs
        if value.name in feeds
    ]
    opsets = sorted(model.ir.opset_imports.items())
    functions = [
        (key, _graph(function.graph, numbers)) for key, function in sorted(model.ir.functions.items())
    ]
    return hashlib.sha256(repr((opsets, fed, _graph(graph, numbers), functions)).encode()).hexdigest()


def _graph(graph: ir.Graph, numbers: dict[ir.Value, int]) -> tuple[Any, ...]:
    inputs = tuple(_number(value, numbers) for value in graph.inputs)
    nodes = tuple(_node(node, numbers) for node in graph)
    return inputs, nodes, tuple(_number(value, numbers) for value in graph.outputs)


def _node(node: ir.Node, numbers: dict[ir.Value, int]) -> tuple[Any, ...]:
    read = tuple(None if value is None else _operand(value, numbers) for value in node.inputs)
    attributes = tuple((name, _attribute(node.attributes[name], numbers)) for name in sorted(node.attributes))
    made = tuple(bool(value.name) and _number(value, numbers) for value in node.outputs)
    return node.domain, node.op_type, node.overload, read, attributes, made


def _operand(value: ir.Value, numbers: dict[ir.Value, int]) -> tuple[Any, ...]:
    known = value in numbers
    number = _number(value, numbers)
    tensor = value.const_value if value.is_initializer() and not known else None
    return (number,) if tensor is None else (number, _tensor(tensor))


def _attribute(attribute: ir.Attr, numbers: dict[ir.Value, int]) -> Any:
    if attribute.is_ref():
        return "ref", attribute.ref_attr_name
    kind, value = attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return _tensor(value)
    if kind == ir.AttributeType.TENSORS:
        return tuple(map(_tensor, value))
    if kind == ir.AttributeType.GRAPH:
        return _graph(value, numbers)
    if kind == ir.AttributeType.GRAPHS:
        return tuple(_graph(graph, numbers) for graph in value)
    return str(kind), str(value)


def _tensor(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    telling = tensor.size == 1 or (tensor.size <= SMALL_INDEX and tensor.dtype.is_integer())
    readable = telling and tensor.dtype != ir.DataType.STRING
    return str(tensor.dtype), tuple(map(str, tensor.shape)), tensor.tobytes() if readable else b""


def _number(value: ir.Value, numbers: dict[ir.Value, int]) -> int:
    return numbers.setdefault(value, len(numbers))
