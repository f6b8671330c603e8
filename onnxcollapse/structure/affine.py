# SPDX-License-Identifier: Apache-2.0
"""Nodes that compute y = x * scale + shift, channel by channel, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure.channels import as_channels, rank
from onnxcollapse.structure.constants import Array, attribute, constant_array, folded, is_op


@dataclass(frozen=True, eq=False)
class Affine:
    """y = x * scale + shift.

    Attributes:
        node: The node that spells it.
        input: Its data operand x.
        output: Its result y.
        scale: float64, [C] or 0-d.
        shift: float64, [C] or 0-d.
        axis: The axis that [C] lies on: negative, counted from the right, or 1 for `BatchNormalization`; None
            when both are scalars.
    """

    node: ir.Node
    input: ir.Value
    output: ir.Value
    scale: Array
    shift: Array
    axis: int | None


def affine_of(node: ir.Node) -> Affine | None:
    """The affine map that `node` is, or None.

    Reads `Add`, `Sub`, `Mul`, `Div` by a constant on either side (not constant / x), `Neg`,
    `BatchNormalization` at inference, `Identity`, `Dropout` at inference, `PRelu` and `LeakyRelu` with a slope of
    exactly 1, and `Cast` to the type the tensor already has. A constant that varies along more than one axis is
    none of them.
    """
    if not is_op(node, node.op_type):
        return None
    if node.op_type in ("Add", "Sub", "Mul", "Div"):
        return _arithmetic(node)
    if node.op_type == "BatchNormalization":
        return _batch_normalization(node)
    if node.op_type == "Neg":
        return _scalar(node, -1.0)
    return _scalar(node, 1.0) if _is_identity(node) else None


def keeps_layout(affine: Affine, channels: int | None = None) -> bool:
    """Whether y has the shape of x: no broadcast raises the rank or widens an axis of length 1.

    Args:
        affine: The operator.
        channels: Length of the axis that [C] lies on, where the caller knows it; otherwise x's declared shape tells.
    """
    if affine.node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return True
    known = next(
        found for v in affine.node.inputs if v is not affine.input and (found := folded(v)) is not None
    )
    data_rank = rank(affine.input)
    if len(known.shape) > (1 if data_rank is None else data_rank):
        return False
    if known.size == 1:
        return True
    shape = affine.input.shape
    if channels is None and shape is not None and affine.axis is not None:
        return bool(shape[affine.axis] == known.size)
    return channels == known.size


def is_inference(node: ir.Node) -> bool:
    """Whether a `Dropout` or `BatchNormalization` is in inference mode and only its first output is used."""
    if attribute(node, "training_mode", 0) or attribute(node, "spatial", 1) != 1:
        return False
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant_array(node.inputs[2])
        return training is not None and not training.any()
    return True


def batch_normalization(node: ir.Node) -> tuple[Array, Array] | None:
    """Scale and shift [C] of a `BatchNormalization` at inference, float64; None if not constant.

    y = (x - mean) / sqrt(var + eps) * gamma + beta.
    """
    arrays = [constant_array(value) for value in node.inputs[1:5]]
    if not is_inference(node) or len(arrays) < 4:
        return None
    gamma, beta, mean, variance = (None if a is None else a.astype(np.float64).reshape(-1) for a in arrays)
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    scale = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
    return scale, beta - mean * scale


def _scalar(node: ir.Node, scale: float) -> Affine | None:
    data = node.inputs[0]
    return None if data is None else Affine(node, data, node.outputs[0], np.array(scale), np.zeros(()), None)


def _is_identity(node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        return is_inference(node)
    if node.op_type == "LeakyRelu":
        return bool(attribute(node, "alpha", 0.01) == 1.0)
    if node.op_type == "PRelu":
        slope = constant_array(node.inputs[1])
        return slope is not None and bool((slope == 1).all())
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        return bool(attribute(node, "to") == node.inputs[0].dtype)
    return False


def _arithmetic(node: ir.Node) -> Affine | None:
    left, right = node.inputs
    known = folded(right) or folded(left)
    if left is None or right is None or known is None or (folded(left) and folded(right)):
        return None
    first = folded(right) is None  # the constant is the first operand
    axis = _varying_axis(known.shape)
    if axis == 0 or not known.dtype.is_floating_point() or (first and node.op_type == "Div"):
        return None
    c = as_channels(known.load()).astype(np.float64)
    if node.op_type == "Div" and not c.all():
        return None
    one, zero = np.ones(()), np.zeros(())
    if node.op_type == "Add":
        scale, shift = one, c
    elif node.op_type == "Sub":
        scale, shift = (-one, c) if first else (one, -c)
    else:
        scale, shift = (c if node.op_type == "Mul" else 1.0 / c), zero
    return Affine(node, right if first else left, node.outputs[0], scale, shift, axis)


def _varying_axis(shape: tuple[int, ...]) -> int | None:
    """The one axis (negative) along which a constant varies; None if along none, 0 if along several."""
    varying = [i - len(shape) for i, dim in enumerate(shape) if dim != 1]
    if not varying:
        return None
    return varying[0] if len(varying) == 1 else 0


def _batch_normalization(node: ir.Node) -> Affine | None:
    both = batch_normalization(node)
    data = node.inputs[0]
    if both is None or data is None:
        return None
    return Affine(node, data, node.outputs[0], both[0], both[1], 1)
