# SPDX-License-Identifier: Apache-2.0
"""Bounds of every tensor that hold for every input in a declared box: proofs, not estimates.

Interval arithmetic, per channel where that is known. Bounds are moved outward by what rounding may add: for sums of
products the worst case of any order of summation in the tensor's element type (Higham, eq. 3.5), a few units
elsewhere, 1e-5 for functions that runtimes approximate. Two things are taken for granted: every tensor is finite
(no overflow, no NaN in the inputs), and products are computed in the declared type (TF32 is not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcollapse.model import weights
from onnxcollapse.structure import bounds_layout, bounds_linear, bounds_pointwise, intervals
from onnxcollapse.structure.channels import element_type, rank
from onnxcollapse.structure.constants import Array, folded, is_op
from onnxcollapse.structure.intervals import UNBOUNDED, Interval, Rule, make

_RULES: dict[str, Rule] = {**bounds_linear.RULES, **bounds_layout.RULES, **bounds_pointwise.RULES}
_CONTRIB_RULES: dict[str, Rule] = {**bounds_linear.CONTRIB_RULES, **bounds_pointwise.CONTRIB_RULES}
_BY_TYPE = {
    ir.DataType.BOOL: make(0.0, 1.0),
    ir.DataType.INT8: make(-128.0, 127.0),
    ir.DataType.UINT8: make(0.0, 255.0),
}


class Ranges:
    """Bounds of a graph's tensors, computed when asked for.

    Weights are read only where something is known of what they multiply.
    """

    def __init__(self, graph: ir.Graph, inputs: Mapping[str, tuple[float, float]]) -> None:
        named = ((value, value.name or "") for value in graph.inputs)
        self._boxes = {value: inputs[name] for value, name in named if name in inputs}
        self._known: dict[ir.Value, Interval] = {}

    def of(self, value: ir.Value) -> Interval:
        """Bounds of `value`, arrays that broadcast right-aligned against it."""
        for node in self._missing(value):
            for output in _bounded_outputs(node):
                self._known[output] = self._bounded(node)
        return self._get(value)

    def channels(self, value: ir.Value, axis: int, channels: int) -> tuple[Array, Array]:
        """Lower and upper bounds [channels] of `value` along its channel axis.

        A non-negative `axis` needs the tensor's rank; without it the whole tensor's bounds are repeated.
        """
        found = self.of(value)
        if axis >= 0:
            tensor_rank = rank(value)
            axis = -1 if tensor_rank is None else axis - tensor_rank
            found = found.whole() if tensor_rank is None else found
        along = found.along(axis, channels)
        return along.low, along.high

    def _missing(self, value: ir.Value) -> list[ir.Node]:
        """Nodes that bounds of `value` follow from and that have none yet, each after those it reads."""
        order: list[ir.Node] = []
        seen: set[ir.Node] = set()
        stack: list[tuple[ir.Value | None, bool]] = [(value, False)]
        while stack:
            current, expanded = stack.pop()
            node = current.producer() if current is not None else None
            if current is None or node is None or current in self._known or _rule(node) is None:
                continue
            if expanded:
                order.append(node)
            elif node not in seen and folded(current) is None and current in _bounded_outputs(node):
                seen.add(node)
                stack.append((current, True))
                stack += [(operand, False) for operand in _needed(node)]
        return order

    def _bounded(self, node: ir.Node) -> Interval:
        rule = _rule(node)
        if rule is None or not _is_real(node):
            return UNBOUNDED
        with np.errstate(invalid="ignore", over="ignore"):
            found = rule(node, lambda i: self._get(node.inputs[i]))
        for operand in node.inputs:  # what was read of a weight need not stay in memory
            known = folded(operand)
            if known is not None and known.tensor is not None:
                weights.release(known.tensor)
        return found

    def _get(self, value: ir.Value | None) -> Interval:
        if value is None:
            return UNBOUNDED
        if value in self._known:
            return self._known[value]
        if value in self._boxes:
            return make(*self._boxes[value])
        constant = folded(value)
        if constant is not None and constant.dtype.numpy().kind != "O":
            return intervals.of_array(constant.load())
        return _BY_TYPE.get(value.dtype, UNBOUNDED) if value.dtype is not None else UNBOUNDED


def ranges(graph: ir.Graph, inputs: Mapping[str, tuple[float, float]]) -> Ranges:
    """Bounds of the graph's tensors.

    Args:
        graph: The main graph.
        inputs: Boxes (low, high) by graph input; inputs without one are unbounded (8-bit and bool ones by type).

    Returns:
        Bounds on demand. Ops that no rule covers are unbounded.
    """
    return Ranges(graph, inputs)


def _rule(node: ir.Node) -> Rule | None:
    if node.domain == "com.microsoft":
        return _CONTRIB_RULES.get(node.op_type)
    return _RULES.get(node.op_type) if is_op(node, node.op_type) else None


def _is_real(node: ir.Node) -> bool:
    """Whether the node computes with real numbers: integers wrap around, and their division truncates."""
    if node.op_type not in bounds_pointwise.RULES or node.op_type in ("Cast", "Where"):
        return True
    dtype = element_type(node.inputs[0])
    return dtype is None or dtype.is_floating_point()


def _bounded_outputs(node: ir.Node) -> Sequence[ir.Value]:
    """The outputs that the node's rule bounds."""
    return node.outputs if node.op_type == "Split" else node.outputs[:1]


def _needed(node: ir.Node) -> Sequence[ir.Value | None]:
    """Operands whose bounds the node's rule asks for."""
    return node.inputs[bounds_linear.SELF_BOUNDED.get(node.op_type, 0) :]
