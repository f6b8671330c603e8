# SPDX-License-Identifier: Apache-2.0
"""Spans: stretches of a residual stream that can be taken out as a whole, layers or parts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.structure.blocks import Block, joined, pieces_of_layers
from onnxcollapse.structure.channels import element_type
from onnxcollapse.structure.constants import folded, is_op
from onnxcollapse.structure.dominators import captured, operation, sum_inside
from onnxcollapse.structure.hidden import OperatorsByOutput
from onnxcollapse.structure.linear import Linear, linear_at

_NORM_OPS = (
    "Add", "Cast", "Div", "Identity", "LayerNormalization", "Mul", "Neg", "Pow", "RMSNormalization", "Reciprocal",
    "ReduceMean", "ReduceSum", "SimplifiedLayerNormalization", "Sqrt", "Sub",
)  # fmt: skip
_PASSING = ("Cast", "Dropout", "Identity")


@dataclass(frozen=True, eq=False)
class Span:
    """Blocks one behind the other on the residual stream.

    Attributes:
        blocks: The blocks: whole layers, or one part of a layer.
        layers: How many whole layers these are; 0 for a part of one.
    """

    blocks: tuple[Block, ...]
    layers: int

    @property
    def start(self) -> ir.Value:
        """The stream before it."""
        return self.blocks[0].start

    @property
    def end(self) -> ir.Value:
        """The stream behind it."""
        return self.blocks[-1].end

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes between the two."""
        return tuple(dict.fromkeys(node for block in self.blocks for node in block.nodes))

    @property
    def tensors(self) -> frozenset[str]:
        """Names of what its nodes compute."""
        return frozenset(value.name for node in self.nodes for value in node.outputs if value.name)

    @property
    def params(self) -> int:
        """Elements of its weights; those of several blocks count for each."""
        return sum(block.params for block in self.blocks)

    @property
    def name(self) -> str:
        """The tensors it lies between."""
        return f"{self.start.name} .. {self.end.name}"


@dataclass(frozen=True, eq=False)
class Stream:
    """A run of isomorphic layers on a residual stream.

    Attributes:
        layers: Each layer as one block.
        parts: Each layer's stretches that have weights.
    """

    layers: tuple[Block, ...]
    parts: tuple[tuple[Block, ...], ...]

    def spans(self, longest: int) -> list[Span]:
        """All spans of up to so many layers that leave at least one, by their end, shorter ones first."""
        count = len(self.layers)
        return [
            Span(self.layers[end - length : end], length)
            for end in range(1, count + 1)
            for length in range(1, min(longest, end, count - 1) + 1)
        ]


def streams(graph: ir.Graph) -> list[Stream]:
    """The runs of layers that add to a stream, which keeps its width and type from one to the next."""
    found = []
    for run in pieces_of_layers(graph):
        parts = tuple(tuple(piece for piece in layer if piece.weights) for layer in run)
        whole = tuple(joined(layer) for layer in run)
        if any(piece.is_residual for piece in parts[0]) and _keeps_kind(whole):
            found.append(Stream(whole, parts))
    return found


def first_projection(span: Span) -> Linear | None:
    """The first Linear of a span that reads its start or a norm of it; None where there is none."""
    inside = set(span.nodes)
    for node in span.nodes:
        linear = linear_at(node)
        if isinstance(linear, Linear) and _is_norm_of(linear.input, span.start, inside):
            return linear
    return None


def skip_norm(value: ir.Value) -> ir.Node | None:
    """The fused operator that yields `value` as the sum inside it, beside the norm of that sum; None for others."""
    node = value.producer()
    return node if node is not None and value is sum_inside(node) else None


def last_addition(value: ir.Value) -> Linear | None:
    """The Linear whose output was added to the stream last, right before `value`; a skip norm's sum is an `Add`."""
    label, operands = operation(value)
    while label in _PASSING and operands[0] is not None:
        label, operands = operation(operands[0])
    if label != "Add":
        return None
    linears = OperatorsByOutput().linears()
    alone = [operand for operand in operands if operand is not None and len(operand.consumers()) == 1]
    return next((linears[operand] for operand in alone if operand in linears), None)


def _keeps_kind(layers: Sequence[Block]) -> bool:
    kinds = {
        (element_type(value), None if value.shape is None else str(value.shape[-1]))
        for block in layers
        for value in (block.start, block.end)
    }
    return len({kind for kind in kinds if None not in kind}) <= 1


def _is_norm_of(value: ir.Value, start: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether `value` is `start`, or computed from it channel by channel and by sums over channels alone."""
    beside = start.producer()  # a skip norm yields the stream and its norm at once
    stack, seen = [value], {start}
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is not None and node is beside and start is sum_inside(node):
            continue
        if node is None or node not in inside or not _operands_fit(node):
            return False
        stack += [v for v in node.inputs if v is not None and folded(v) is None]
    return True


def _operands_fit(node: ir.Node) -> bool:
    """Whether a node is a step of a norm: elementwise or over channels, with constants of at most one long axis."""
    if not is_op(node, *_NORM_OPS) or any(True for _ in captured(node)):
        return False
    known = (folded(value) for value in node.inputs if value is not None)
    return all(sum(dim > 1 for dim in item.shape) <= 1 for item in known if item is not None)
