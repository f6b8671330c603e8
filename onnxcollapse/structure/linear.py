# SPDX-License-Identifier: Apache-2.0
"""Linear: one affine map y = x W + b, whatever spells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.structure.channels import lies_along, rank
from onnxcollapse.structure.constants import Array, Folded, attribute, folded, is_op
from onnxcollapse.structure.operands import (
    FLOATING,
    check_bias,
    check_frame,
    check_pointwise_conv,
    not_read,
    operand,
    weight_operand,
)
from onnxcollapse.structure.refusal import Refusal, RefusedError, label

Kind = Literal["matmul", "gemm", "conv"]


@dataclass(frozen=True, eq=False)
class Linear:
    """One affine map y = x W + b with W [in, out], b [out].

    Attributes:
        node: The `MatMul`, `Gemm` or 1x1 `Conv`.
        bias_node: The `Add` after it that is its bias, or None.
        input: The data operand x.
        output: The result, after the bias.
        weight: The weight operand as the node reads it (an `Identity` or `Transpose` may lie before it).
        bias: The bias operand, or None.
        kind: Which op spells it.
        weight_left: The weight is operand 0 of a `MatMul`: y = W' x, channels on axis -2.
        transposed: The operand is laid out [out, in]: `Gemm` with transB, `Conv`, or weight on the left.
        in_features: Length of the input's channel axis.
        out_features: Length of the output's channel axis.
        axis: The channel axis: -1 (`MatMul`, `Gemm`), 1 (`Conv`), -2 (weight on the left).
        dtype: Element type it computes in.
    """

    node: ir.Node
    bias_node: ir.Node | None
    input: ir.Value
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    kind: Kind
    weight_left: bool
    transposed: bool
    in_features: int
    out_features: int
    axis: int
    dtype: ir.DataType

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The node, and the bias `Add` if there is one."""
        return (self.node,) if self.bias_node is None else (self.node, self.bias_node)

    @property
    def name(self) -> str:
        """The output's name: what the Linear is called in reports."""
        return self.output.name or label(self.node)

    @property
    def fan_in(self) -> int:
        """Weights of each output channel."""
        return self.in_features

    @property
    def rank(self) -> int | None:
        """Rank of the output, None if unknown."""
        known = folded(self.weight)
        if self.kind == "conv" and known is not None:
            return len(known.shape)
        return 2 if self.kind == "gemm" else rank(self.output) or rank(self.input)

    @property
    def params(self) -> int:
        """Number of elements of weight and bias as stored."""
        sizes = (folded(value) for value in (self.weight, self.bias))
        return sum(known.size for known in sizes if known is not None)

    def matrix(self) -> Array:
        """Matrix W [in, out] in float64, `Gemm`'s alpha folded in; computed anew at each call."""
        wide = self._wide(self.weight)
        flat = wide.reshape(wide.shape[0], -1) if self.kind == "conv" else wide
        flat *= _factor(self, "alpha")
        return flat.T if self.transposed else flat

    def offset(self) -> Array:
        """Offset b [out] in float64, zeros without a bias, `Gemm`'s beta folded in."""
        if self.bias is None:
            return np.zeros(self.out_features)
        beta = 1.0 if self.bias_node is not None else _factor(self, "beta")
        return np.array(np.broadcast_to(self._wide(self.bias).reshape(-1) * beta, self.out_features))

    def _wide(self, value: ir.Value) -> Array:
        known = folded(value)
        if known is None:
            raise ModelError(
                f"{self.name}: {value.name} is no longer a constant; search the graph again after an edit"
            )
        return known.wide()


def linears(graph: ir.Graph) -> list[Linear]:
    """All Linears of `graph` itself, in graph order; subgraphs and functions are not entered."""
    found = (linear_at(node) for node in graph)
    return [linear for linear in found if isinstance(linear, Linear)]


def linear_at(node: ir.Node) -> Linear | Refusal:
    """The Linear that `node` spells, or why it is none."""
    try:
        read = _READERS.get(node.op_type) if is_op(node, node.op_type) else None
        if read is None:
            raise not_read(node)
        check_frame(node)
        return read(node)
    except RefusedError as refused:
        return refused.at(node)


def _read_matmul(node: ir.Node) -> Linear:
    on_left = folded(node.inputs[1]) is None and folded(node.inputs[0]) is not None
    data, other = (node.inputs[1], node.inputs[0]) if on_left else (node.inputs[0], node.inputs[1])
    weight, known = weight_operand(other, data)
    if len(known.shape) != 2:
        raise RefusedError(f"weight has {len(known.shape)} dimensions {known.shape}; only matrices are read")
    if on_left and (rank(data) or 1) < 2:
        raise RefusedError("weight is the left operand and the rank of the data is unknown or 1")
    axis = -2 if on_left else -1
    return _finish(node, "matmul", weight, known, operand(data), None, axis, transposed=on_left)


def _read_gemm(node: ir.Node) -> Linear:
    data, other = node.inputs[0], node.inputs[1]
    if attribute(node, "transA", 0):
        raise RefusedError("Gemm transA: the data is transposed")
    if folded(data) is not None and folded(other) is None:
        raise RefusedError("weight is operand A of Gemm")
    weight, known = weight_operand(other, data)
    transposed = bool(attribute(node, "transB", 0))
    bias = check_bias(node, 2, known.shape[0] if transposed else known.shape[1])
    return _finish(node, "gemm", weight, known, operand(data), bias, -1, transposed=transposed)


def _read_conv(node: ir.Node) -> Linear:
    check_pointwise_conv(node, tuple(attribute(node, "kernel_shape", ())))
    weight, known = weight_operand(node.inputs[1], node.inputs[0])
    check_pointwise_conv(node, known.shape[2:])
    bias = check_bias(node, 1, known.shape[0])
    return _finish(node, "conv", weight, known, operand(node.inputs[0]), bias, 1, transposed=True)


def _finish(
    node: ir.Node,
    kind: Kind,
    weight: ir.Value,
    known: Folded,
    data: ir.Value,
    bias: ir.Value | None,
    axis: int,
    *,
    transposed: bool,
) -> Linear:
    """Put the Linear together, taking in the bias `Add` after it if it has no bias yet."""
    rows, columns = known.shape[:2]
    sizes = (columns, rows) if transposed else (rows, columns)
    bare = Linear(
        node,
        None,
        data,
        node.outputs[0],
        weight,
        bias,
        kind,
        axis == -2,
        transposed,
        *sizes,
        axis,
        known.dtype,
    )
    add = bias_add(bare.output, node, axis, bare.rank, bare.out_features) if bias is None else None
    if add is None:
        return bare
    added = add.inputs[1] if add.inputs[0] is bare.output else add.inputs[0]
    return replace(bare, bias_node=add, output=add.outputs[0], bias=added)


def bias_add(raw: ir.Value, node: ir.Node, axis: int, rank: int | None, channels: int) -> ir.Node | None:
    """The `Add` of a per-channel constant that alone reads `node`'s raw output, if there is one."""
    uses = raw.uses()
    add = next(iter(uses)).node if len(uses) == 1 and not raw.is_graph_output() else None
    if add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return None
    known = folded(add.inputs[1] if add.inputs[0] is raw else add.inputs[0])
    if known is None or known.dtype not in FLOATING:
        return None
    return add if lies_along(known.shape, axis, rank, channels) else None


def _factor(linear: Linear, name: str) -> float:
    return float(attribute(linear.node, name, 1.0)) if linear.kind == "gemm" else 1.0


_READERS: dict[str, Callable[[ir.Node], Linear]] = {
    "Conv": _read_conv,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
}
