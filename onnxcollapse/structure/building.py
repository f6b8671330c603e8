# SPDX-License-Identifier: Apache-2.0
"""Putting a new Linear into a graph, spelled like one that is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from onnxcollapse.structure.constants import Array
from onnxcollapse.structure.convolution import Convolution
from onnxcollapse.structure.linear import Linear

BARE_GEMM = 11
"""The opset from which on a Gemm may do without a bias."""

Store = Callable[[ir.Graph, str, Array, ir.DataType], ir.Value]
"""Makes an initializer of an array: graph, hint for its name, array, element type."""


def build_linear(
    graph: ir.Graph,
    anchor: ir.Node,
    like: Linear,
    x: ir.Value,
    matrix: Array,
    offset: Array | None,
    store: Store = edit.add_initializer,
) -> ir.Value:
    """Insert y = x @ matrix + offset before `anchor`, spelled like `like`.

    `Gemm` stays `Gemm` (alpha = beta = 1, the same transB), `Conv` stays a 1x1 `Conv` of the same rank, a weight
    on the left stays there. The weights are stored in the element type that `like` computes in; nothing existing
    is edited.

    Args:
        graph: The graph that `anchor` is in.
        anchor: The node before which the new ones go.
        like: Decides op, layout, element type and channel axis.
        x: The data operand, of the rank of `like.input`.
        matrix: W [in, out].
        offset: b [out], or None for no bias.
        store: Makes the initializers, of `matrix` and `offset` or of views of them.

    Returns:
        The new output; its element type is `like`'s, its shape x's with the channel axis changed.

    Raises:
        ModelError: Shapes do not fit, or a weight overflows the element type.
    """
    _check(like, x, matrix, offset)
    hint = like.name
    if like.kind == "matmul":
        nodes = _matmul(graph, like, x, matrix, offset, store)
    else:
        stored = matrix.T if like.transposed else matrix
        if like.kind == "conv":
            stored = stored.reshape(*stored.shape, *[1] * ((like.rank or 4) - 2))
        operands = [x, store(graph, f"{hint}_weight", stored, like.dtype)]
        if offset is None and like.kind == "gemm" and graph.opset_imports.get("", BARE_GEMM) < BARE_GEMM:
            offset = np.zeros(matrix.shape[1])
        if offset is not None:
            operands.append(store(graph, f"{hint}_bias", offset, like.dtype))
        nodes = [_node(like, like.node.op_type, operands, hint, _attributes(like))]
    for node in nodes:
        node.outputs[0].shape = _shape(like, x, matrix.shape[1])
    edit.insert_before(graph, anchor, nodes)
    return nodes[-1].outputs[0]


def build_convolution(
    graph: ir.Graph, anchor: ir.Node, like: Convolution, x: ir.Value, matrix: Array, offset: Array | None
) -> ir.Value:
    """Insert a `Conv` of x before `anchor` with the kernel, strides, pads and dilations of `like`.

    Args:
        graph: The graph that `anchor` is in.
        anchor: The node before which the new one goes.
        like: Decides attributes and element type.
        x: The data operand [N, in, ...].
        matrix: W [in * taps, out], rows channel-major as in `Convolution.matrix`.
        offset: b [out], or None for no bias.

    Returns:
        The new output; its element type and shape are `like`'s but for the channels.

    Raises:
        ModelError: Shapes do not fit, or a weight overflows the element type.
    """
    kernel = like.kernel
    taps = math.prod(kernel)
    _check_matrix(like.name, matrix, offset)
    if matrix.shape[0] % taps:
        raise ModelError(f"{like.name}: {matrix.shape[0]} rows are no multiple of the kernel's {taps} taps")
    stored = matrix.T.reshape(matrix.shape[1], -1, *kernel)
    operands = [x, edit.add_initializer(graph, f"{like.name}_weight", stored, like.dtype)]
    if offset is not None:
        operands.append(edit.add_initializer(graph, f"{like.name}_bias", offset, like.dtype))
    output = edit.like(like.output)
    output.name, output.type = like.name, ir.TensorType(like.dtype)
    if output.shape is not None:
        output.shape[1] = matrix.shape[1]
    attributes = list(like.node.attributes.values())
    node = ir.Node("", "Conv", operands, attributes, outputs=[output], name=f"{like.name}_Conv")
    edit.insert_before(graph, anchor, node)
    return output


def _matmul(
    graph: ir.Graph, like: Linear, x: ir.Value, matrix: Array, offset: Array | None, store: Store
) -> list[ir.Node]:
    hint, stored = like.name, matrix.T if like.weight_left else matrix
    weight = store(graph, f"{hint}_weight", stored, like.dtype)
    product = _node(like, "MatMul", [weight, x] if like.weight_left else [x, weight], hint)
    if offset is None:
        return [product]
    column = offset.reshape(-1, 1) if like.weight_left else offset
    bias = store(graph, f"{hint}_bias", column, like.dtype)
    total = _node(like, "Add", [product.outputs[0], bias], f"{hint}_sum")
    return [product, total]


def _node(
    like: Linear, op_type: str, operands: list[ir.Value], hint: str, attributes: list[ir.Attr] | None = None
) -> ir.Node:
    """A node of the standard domain whose output has `like`'s element type."""
    output = ir.Value(name=hint, type=ir.TensorType(like.dtype))
    return ir.Node("", op_type, operands, attributes or (), outputs=[output], name=f"{hint}_{op_type}")


def _shape(like: Linear, x: ir.Value, channels: int) -> ir.Shape | None:
    if x.shape is None:
        return None
    shape = x.shape.copy()
    shape[like.axis] = channels
    return shape


def _attributes(like: Linear) -> list[ir.Attr]:
    if like.kind == "conv":
        return [ir.AttrInt64s("kernel_shape", [1] * ((like.rank or 4) - 2))]
    return [ir.AttrInt64("transB", 1)] if like.transposed else []


def _check(like: Linear, x: ir.Value, matrix: Array, offset: Array | None) -> None:
    _check_matrix(like.name, matrix, offset)
    size = None if x.shape is None else x.shape[like.axis]
    if isinstance(size, int) and size != matrix.shape[0]:
        raise ModelError(
            f"{like.name}: {x.name} has {size} channels, the matrix {matrix.shape} reads {matrix.shape[0]}"
        )


def _check_matrix(name: str, matrix: Array, offset: Array | None) -> None:
    if matrix.ndim != 2:
        raise ModelError(f"{name}: a Linear needs a matrix [in, out], not one of shape {matrix.shape}")
    if offset is not None and offset.shape != (matrix.shape[1],):
        raise ModelError(f"{name}: offset has shape {offset.shape}, the matrix {matrix.shape}")
