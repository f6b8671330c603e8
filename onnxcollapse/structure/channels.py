# SPDX-License-Identifier: Apache-2.0
"""Ranks, and how a constant lies along a tensor's channel axis."""

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
_MAX_DEPTH = 64


def rank(value: ir.Value | None, depth: int = _MAX_DEPTH) -> int | None:
    """Number of dimensions of `value`, from its declared shape or from what produces it; None if unknown."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    tensor = constant(value)
    if tensor is not None:
        return len(tensor.shape)
    node = value.producer()
    if node is None or depth == 0:
        return None
    return _rank_behind(node, depth - 1)


def _rank_behind(node: ir.Node, depth: int) -> int | None:
    """Rank of a node's first output, for ops where it follows from the inputs' ranks."""
    if is_op(node, "Gemm", "Flatten"):
        return 2
    if is_op(node, "Transpose") and (perm := attribute(node, "perm")) is not None:
        return len(perm)
    if is_op(node, "Reshape", "Expand") and (shape := constant_array(node.inputs[1])) is not None:
        return int(shape.size) if node.op_type == "Reshape" else None
    if is_op(node, "MatMul"):
        return _matmul_rank([rank(x, depth) for x in node.inputs])
    if is_op(node, *_SAME_RANK, *_UNARY):
        return rank(node.inputs[0], depth)
    if is_op(node, *_BROADCASTING):
        ranks = [rank(x, depth) for x in node.inputs]
        return None if None in ranks else max(r for r in ranks if r is not None)
    return None


def _matmul_rank(ranks: list[int | None]) -> int | None:
    left, right = ranks
    if left is None or right is None:
        return None
    if left == 1 or right == 1:
        return max(left, right) - 1
    return max(left, right)


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
