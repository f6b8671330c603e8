# SPDX-License-Identifier: Apache-2.0
"""Pointwise regions: stretches of elementwise nodes behind a tensor, back to the Linears they depend on."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.structure.affine import batch_normalization, is_inference
from onnxcollapse.structure.channels import as_channels, lies_along
from onnxcollapse.structure.constants import Array, attribute, folded, is_op, is_overridable, through_identity
from onnxcollapse.structure.evaluation import evaluate
from onnxcollapse.structure.linear import Linear
from onnxcollapse.structure.refusal import Refusal, RefusedError, label

ELEMENTWISE = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "Cast",
    "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
    "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
})  # fmt: skip
CONTRIB_ELEMENTWISE = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})
# Ops that are affine in their data when their other operands are constants.
_AFFINE = frozenset(
    {"Add", "BatchNormalization", "Cast", "Div", "Dropout", "Identity", "Mul", "Neg", "Sub", "Sum"}
)
_MOST_SOURCES = 2
# Ops that keep elements as they are but move channels: a site with one inside is named, not read.
_MOVES = frozenset({"Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})


def is_elementwise(node: ir.Node) -> bool:
    """Whether each element of the output depends on that element of the operands only."""
    if node.domain == "com.microsoft":
        return node.op_type in CONTRIB_ELEMENTWISE
    return is_op(node, node.op_type) and node.op_type in ELEMENTWISE


@dataclass(frozen=True)
class Lane:
    """How channels lie in the tensors of a region.

    Attributes:
        name: What makes them, for messages.
        axis: Their axis.
        rank: The tensors' rank, None if unknown.
        channels: How many there are.
    """

    name: str
    axis: int
    rank: int | None
    channels: int


@dataclass(frozen=True, eq=False)
class Region:
    """Elementwise nodes between the outputs of Linears and one tensor.

    Attributes:
        nodes: The nodes in graph order; none if the tensor is a Linear's output itself.
        sources: The Linears that the region reads, in graph order.
        output: The tensor it computes.
        constants: Its constant operands, per channel [C] or 0-d.
    """

    nodes: tuple[ir.Node, ...]
    sources: tuple[Linear, ...]
    output: ir.Value
    constants: Mapping[ir.Value, Array]

    def evaluate(self, *inputs: Array) -> Array:
        """The region's output [n, C] for the sources' outputs [n, C], in the order of `sources`."""
        known = {linear.output: array for linear, array in zip(self.sources, inputs, strict=True)}
        dtype = inputs[0].dtype
        for value, array in self.constants.items():
            known[value] = array.astype(dtype) if array.dtype.kind not in "biu" else array
        return evaluate(self.nodes, known, self.output)

    def depends(self, source: Linear) -> frozenset[ir.Node]:
        """The nodes that read `source`, directly or not."""
        reached, found = {source.output}, set()
        for node in self.nodes:
            if any(value in reached for value in node.inputs):
                found.add(node)
                reached.update(node.outputs)
        return frozenset(found)

    def is_nonlinear(self, nodes: frozenset[ir.Node]) -> bool:
        """Whether any of `nodes` is not affine in what it reads."""
        return any(not self._is_affine(node) for node in nodes)

    def _is_affine(self, node: ir.Node) -> bool:
        if node.op_type not in _AFFINE or node.domain == "com.microsoft":
            return False
        data = [value for value in node.inputs if value is not None and value not in self.constants]
        product = node.op_type == "Mul" and len(data) > 1
        quotient = node.op_type == "Div" and (len(data) > 1 or node.inputs[1] in data)
        return not product and not quotient


def region_behind(value: ir.Value, stop: Mapping[ir.Value, Linear]) -> Region | Refusal:
    """The pointwise region that computes `value`, walked back to Linears' outputs.

    Args:
        value: The tensor to explain.
        stop: Linears by their outputs, where the walk ends.

    Returns:
        The region, or a refusal: a node on the way is not elementwise (no candidate), more than two Linears
        are read, or a constant does not lie along their channel axis.
    """
    producer = value.producer()
    name = value.name or "" if producer is None else label(producer)
    try:
        nodes, sources, constants = _walk(value, stop)
        _check_axes(sources)
        first = sources[0]
        lane = Lane(first.name, first.axis, first.rank, first.out_features)
        arrays = {v: channel_constant(v, node, lane) for v, node in constants.items()}
        for node in nodes:
            check_mode(node, lane)
        return Region(nodes, sources, value, arrays)
    except RefusedError as refused:
        return Refusal(name, refused.reason, refused.candidate)


_Walked = tuple[tuple[ir.Node, ...], tuple[Linear, ...], dict[ir.Value, ir.Node]]


def _walk(value: ir.Value, stop: Mapping[ir.Value, Linear]) -> _Walked:
    """Nodes in topological order, Linears, and constants with a node that reads each."""
    nodes: set[ir.Node] = set()
    sources: dict[ir.Value, Linear] = {}
    constants: dict[ir.Value, ir.Node] = {}
    objections: list[str] = []
    stack: list[tuple[ir.Value, ir.Node | None]] = [(value, None)]
    while stack:
        current, reader = stack.pop()
        node = current.producer()
        if current in stop:
            sources[current] = stop[current]
        elif reader is not None and folded(current) is not None:
            constants[current] = reader
        elif is_overridable(current):
            objections.append(f"{current.name} is overridable: it is also a graph input")
        elif node is not None and is_op(node, *_MOVES):
            objections.append(f"{label(node)}, a {node.op_type}, lies between the Linears")
            stack += [(operand, node) for operand in node.inputs[:1] if operand is not None]
        elif node is None or not is_elementwise(node):
            raise RefusedError(f"{current.name} is no elementwise function of a Linear", candidate=False)
        elif node not in nodes:
            nodes.add(node)
            stack += [(operand, node) for operand in node.inputs if operand is not None]
    if objections and sources:
        raise RefusedError(objections[0])
    return in_dependency_order(value, nodes, sources), _in_order(sources), constants


def _in_order(sources: Mapping[ir.Value, Linear]) -> tuple[Linear, ...]:
    """The Linears, in graph order."""
    linears = list(sources.values())
    if not linears:
        raise RefusedError("no Linear is behind it", candidate=False)
    if len(linears) > _MOST_SOURCES:
        names = ", ".join(sorted(linear.name for linear in linears)[:4])
        raise RefusedError(f"the pointwise region reads {len(linears)} Linears ({names}, ...)")
    if len(linears) == 1:
        return (linears[0],)
    first = next(node for node in linears[0].node.graph or () if node in (linears[0].node, linears[1].node))
    return tuple(sorted(linears, key=lambda linear: linear.node is not first))


def in_dependency_order(
    value: ir.Value, nodes: Collection[ir.Node], sources: Container[ir.Value]
) -> tuple[ir.Node, ...]:
    """`nodes`, which compute `value` from `sources`, so that each comes after those it reads."""
    done: dict[ir.Node, None] = {}
    stack = [(value.producer(), False)] if value not in sources else []
    while stack:
        node, expanded = stack.pop()
        if node is None or node not in nodes or node in done:
            continue
        if expanded:
            done[node] = None
            continue
        stack.append((node, True))
        stack += [(v.producer(), False) for v in reversed(node.inputs) if v is not None and v not in sources]
    return tuple(done)


def _check_axes(sources: tuple[Linear, ...]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.axis != first.axis:
            raise RefusedError(f"{first.name} and {other.name} have their channels on different axes")
        if other.out_features != first.out_features:
            raise RefusedError(
                f"{first.name} and {other.name} have {first.out_features} and {other.out_features} channels"
            )


def channel_constant(value: ir.Value, node: ir.Node, lane: Lane) -> Array:
    """The constant operand per channel; refused if it differs between rows or its place is unknown."""
    known = folded(value)
    if known is None:
        raise RefusedError(f"{value.name} is no constant")
    if node.op_type == "BatchNormalization":
        return as_channels(known.load())  # checked by check_mode: these lie along axis 1, not right-aligned
    if not lies_along(known.shape, lane.axis, lane.rank, lane.channels):
        what = f"constant {value.name} of shape {known.shape} at {label(node)}"
        if lane.rank is None and len(known.shape) > 1:
            raise RefusedError(
                f"the rank of {lane.name} is unknown, so {what} cannot be placed; infer shapes first"
            )
        raise RefusedError(f"{what} does not lie along the {lane.channels} channels: it would mix rows")
    return as_channels(known.load())


def check_mode(node: ir.Node, lane: Lane) -> None:
    """Refuse nodes that are elementwise only in other modes."""
    if node.op_type == "BatchNormalization":
        _check_batch_normalization(node, lane)
    if node.op_type == "Dropout" and not is_inference(node):
        raise RefusedError(f"{label(node)}: Dropout may run in training mode, or its mask is used")
    if node.op_type == "Cast":
        to = attribute(node, "to")
        if to is None or ir.DataType(int(to)).is_string():
            raise RefusedError(f"{label(node)} casts to text")
    if any(attr.is_ref() for attr in node.attributes.values()):
        raise RefusedError(f"{label(node)} has an attribute set by the function's caller")


def _check_batch_normalization(node: ir.Node, lane: Lane) -> None:
    if batch_normalization(node) is None:
        raise RefusedError(
            f"{label(node)}: BatchNormalization is not at inference or its values are no constants"
        )
    rank = lane.rank
    if lane.axis != 1 and (rank is None or lane.axis + rank != 1):
        raise RefusedError(
            f"{label(node)}: BatchNormalization acts on axis 1, not on the channels (axis {lane.axis})"
        )
    sizes = {
        known.size for value in node.inputs[1:5] if (known := folded(through_identity(value))) is not None
    }
    if sizes != {lane.channels}:
        raise RefusedError(
            f"{label(node)}: BatchNormalization has {sorted(sizes)} channels, not {lane.channels}"
        )
