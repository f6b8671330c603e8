# SPDX-License-Identifier: Apache-2.0
"""Convolution: a `Conv` of one group, seen as one affine map of the patches that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.structure.constants import Array, attribute, folded, is_op
from onnxcollapse.structure.linear import Linear, bias_add, linear_at
from onnxcollapse.structure.operands import check_bias, check_frame, operand, weight_operand
from onnxcollapse.structure.refusal import Refusal, RefusedError, label


@dataclass(frozen=True)
class Window:
    """Which positions a `Conv` reads for each that it writes, by spatial axis.

    Attributes:
        kernel_shape: Taps.
        strides: Steps between outputs.
        pads: Zeros before each axis, then after each, as ONNX orders them.
        dilations: Steps between taps.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Convolution:
    """A `Conv` of one group that is no Linear, since it reads several positions or skips some.

    Attributes:
        node: The `Conv`.
        bias_node: The `Add` after it that is its bias, or None.
        input: The data operand [N, in, ...].
        output: The result [N, out, ...], after the bias.
        weight: The weight operand [out, in, taps...].
        bias: The bias operand, or None.
        in_features: Input channels.
        out_features: Output channels.
        dtype: Element type it computes in.
        rank: Rank of input and output.
        window: The positions it reads; None where they depend on the size of the input (auto_pad with strides).
    """

    node: ir.Node
    bias_node: ir.Node | None
    input: ir.Value
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    in_features: int
    out_features: int
    dtype: ir.DataType
    rank: int
    window: Window | None

    axis = 1
    """The channel axis."""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The node, and the bias `Add` if there is one."""
        return (self.node,) if self.bias_node is None else (self.node, self.bias_node)

    @property
    def name(self) -> str:
        """The output's name: what the Convolution is called in reports."""
        return self.output.name or label(self.node)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each spatial axis."""
        known = folded(self.weight)
        return () if known is None else known.shape[2:]

    @property
    def fan_in(self) -> int:
        """Weights of each output channel."""
        return self.in_features * math.prod(self.kernel)

    def matrix(self) -> Array:
        """W [in * taps, out] in float64, rows channel-major: row = channel * taps + tap."""
        wide = self._wide(self.weight)
        return wide.reshape(wide.shape[0], -1).T

    def offset(self) -> Array:
        """Offset b [out] in float64, zeros without a bias."""
        if self.bias is None:
            return np.zeros(self.out_features)
        return np.array(np.broadcast_to(self._wide(self.bias).reshape(-1), self.out_features))

    def _wide(self, value: ir.Value) -> Array:
        known = folded(value)
        if known is None:
            raise ModelError(
                f"{self.name}: {value.name} is no longer a constant; search the graph again after an edit"
            )
        return known.wide()


def convolution_at(node: ir.Node) -> Convolution | Refusal:
    """The Convolution that `node` is, or why it is none; a 1x1 `Conv` that is a Linear is read as well."""
    try:
        if not is_op(node, "Conv"):
            raise RefusedError(f"{node.op_type} is no Conv", candidate=False)
        check_frame(node)
        return _read(node)
    except RefusedError as refused:
        return refused.at(node)


def depthwise_channels(node: ir.Node) -> int | None:
    """Channels of a `Conv` with constant weights that maps each channel to itself, [C, 1, taps...]; else None."""
    if not is_op(node, "Conv") or any(attr.is_ref() for attr in node.attributes.values()):
        return None
    known = folded(node.inputs[1])
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    if known is None or (biased and folded(node.inputs[2]) is None) or len(known.shape) < 3:
        return None
    groups = int(attribute(node, "group", 1))
    return groups if known.shape[:2] == (groups, 1) else None


def _read(node: ir.Node) -> Convolution:
    groups = attribute(node, "group", 1)
    if groups != 1:
        raise RefusedError(f"Conv has {groups} groups", candidate=False)
    weight, known = weight_operand(node.inputs[1], node.inputs[0])
    if len(known.shape) < 3:
        raise RefusedError(f"weight of a Conv has {len(known.shape)} dimensions {known.shape}")
    outs, ins, *kernel = known.shape
    bias = check_bias(node, 1, outs)
    output, added = node.outputs[0], None
    if bias is None:
        added = bias_add(output, node, 1, len(known.shape), outs)
    if added is not None:
        bias = added.inputs[1] if added.inputs[0] is output else added.inputs[0]
        output = added.outputs[0]
    window = _window(node, tuple(kernel))
    data, rank = operand(node.inputs[0]), len(known.shape)
    return Convolution(node, added, data, output, weight, bias, ins, outs, known.dtype, rank, window)


def _window(node: ir.Node, kernel: tuple[int, ...]) -> Window | None:
    spatial = len(kernel)
    strides = tuple(attribute(node, "strides", None) or [1] * spatial)
    dilations = tuple(attribute(node, "dilations", None) or [1] * spatial)
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        if any(stride != 1 for stride in strides):
            return None
        total = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*less, *more) if mode == "SAME_UPPER" else (*more, *less)
    else:
        given = None if mode == "VALID" else attribute(node, "pads", None)
        pads = tuple(given or [0] * (2 * spatial))
    return Window(kernel, strides, pads, dilations)


Operator = Linear | Convolution
"""What makes or reads hidden channels."""


def operator_at(node: ir.Node) -> Operator | Refusal:
    """The Linear or, for other `Conv` nodes, the Convolution that `node` is, or why it is none."""
    linear = linear_at(node)
    if isinstance(linear, Linear) or linear.candidate or not is_op(node, "Conv"):
        return linear
    return convolution_at(node)
