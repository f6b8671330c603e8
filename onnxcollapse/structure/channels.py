# SPDX-License-Identifier: Apache-2.0
"""Ranks, element types, and how a constant lies along a tensor's channel axis."""

from __future__ import annotations

import onnx_ir as ir

from onnxcollapse.structure.constants import Array, attribute, constant, constant_array, is_op

_SAME_RANK = (
    "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "Dropout", "Identity", "LayerNormalization",
    "Softmax", "Split",
)  # fmt: skip
_UNARY = (
    "Abs", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg", "Reciprocal", "Relu",
    "Selu", "Sigmoid", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_BROADCASTING = ("Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum", "Where")
_SAME_TYPE = (
    *_SAME_RANK, *_UNARY, *_BROADCASTING, "AveragePool", "Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "LogSoftmax", "MatMul", "MaxPool", "Mish", "Pad", "ReduceMean", "Reshape", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
_MAX_DEPTH = 16


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions of `value`, from its declared shape or from what produces it; None if unknown."""
    return _rank(value, {}, _MAX_DEPTH)


def _rank(value: ir.Value | None, known: dict[ir.Value, int | None], depth: int) -> int | None:
    """Rank with the results so far: a residual stream is read twice in each layer."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    if value not in known:
        tensor, node = constant(value), value.producer()
        if tensor is not None:
            known[value] = len(tensor.shape)
        else:
            known[value] = None if node is None or depth == 0 else _rank_behind(node, known, depth - 1)
    return known[value]


def _rank_behind(node: ir.Node, known: dict[ir.Value, int | None], depth: int) -> int | None:
    """Rank of a node's first output, for ops where it follows from the inputs' ranks."""
    if is_op(node, "Gemm", "Flatten"):
        return 2
    if is_op(node, "Transpose") and (perm := attribute(node, "perm")) is not None:
        return len(perm)
    if is_op(node, "Reshape") and (shape := constant_array(node.inputs[1])) is not None:
        return int(shape.size)
    if is_op(node, *_SAME_RANK, *_UNARY):
        return _rank(node.inputs[0], known, depth)
    if is_op(node, *_BROADCASTING, "MatMul"):
        ranks = [_rank(x, known, depth) for x in node.inputs]
        found = [r for r in ranks if r is not None]
        if len(found) < len(ranks):
            return None
        return _matmul_rank(*found) if node.op_type == "MatMul" else max(found)
    return None


def _matmul_rank(left: int, right: int) -> int:
    return max(left, right) - 1 if 1 in (left, right) else max(left, right)


def element_type(value: ir.Value | None, depth: int = _MAX_DEPTH) -> ir.DataType | None:
    """Element type of `value`, declared or handed down from the first data operand; None if unknown."""
    for _ in range(depth):
        if value is None or value.dtype is not None:
            return None if value is None else value.dtype
        tensor, node = constant(value), value.producer()
        if tensor is not None:
            return tensor.dtype
        if node is None or not is_op(node, *_SAME_TYPE):
            return None
        if node.op_type == "Cast":
            return ir.DataType(int(attribute(node, "to")))
        value = node.inputs[1 if node.op_type == "Where" else 0]
    return None


def lies_along(shape: tuple[int, ...], axis: int, tensor_rank: int | None, channels: int) -> bool:
    """Whether a constant of `shape`, broadcast right-aligned, gives each channel of a tensor one number.

    Args:
        shape: The constant's shape; all ones (a scalar) always lies along.
        axis: The tensor's channel axis; a non-negative one needs `tensor_rank`.
        tensor_rank: The tensor's rank; when unknown only constants that cannot raise the rank are accepted.
        channels: Length of the channel axis.
    """
    if len(shape) > (1 if tensor_rank is None else tensor_rank):
        return False
    if all(dim == 1 for dim in shape):
        return True
    if axis >= 0:
        if tensor_rank is None:
            return False
        axis -= tensor_rank
    index = len(shape) + axis
    others_are_one = all(dim == 1 for i, dim in enumerate(shape) if i != index)
    return index >= 0 and others_are_one and shape[index] == channels


def as_channels(array: Array) -> Array:
    """A constant that lies along the channel axis as [C], or 0-d if it is one number."""
    return array.reshape(()) if array.size == 1 else array.reshape(-1)
