# SPDX-License-Identifier: Apache-2.0
"""Regions behind a tensor in which each channel is computed from the same channel of one Conv's output only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.structure.channels import rank
from onnxcollapse.structure.constants import folded, is_op, is_overridable
from onnxcollapse.structure.convolution import Convolution, Operator
from onnxcollapse.structure.pointwise import (
    Lane,
    channel_constant,
    check_mode,
    in_dependency_order,
    is_elementwise,
)
from onnxcollapse.structure.refusal import RefusedError, label
from onnxcollapse.structure.spatial import Frame, first_size, is_flat_behind, is_spatial

# Ops that hand channels on but mix or move them: a region with one inside is named, not read.
_MIXES = frozenset({
    "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Expand", "Gather", "GroupNormalization", "LRN",
    "Slice", "SpaceToDepth", "Split", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Channelwise:
    """A region that keeps channels apart.

    Attributes:
        nodes: Its nodes, each after those it reads; none if the tensor is the source's output itself.
        source: The Conv that makes the channels.
        flat: The tensors [N, features] in which a channel owns consecutive features.
        hidden: The last tensor on the way in which a channel is one entry of axis 1.
    """

    nodes: tuple[ir.Node, ...]
    source: Operator
    flat: frozenset[ir.Value]
    hidden: ir.Value


def is_convolutional(operator: Operator) -> bool:
    """Whether a `Conv` spells the operator."""
    return isinstance(operator, Convolution) or operator.kind == "conv"


def channelwise_behind(consumer: Operator, stop: Mapping[ir.Value, Operator]) -> Channelwise:
    """The region between `consumer` and the one Conv whose channels it reads.

    Args:
        consumer: What reads the channels.
        stop: Operators by their outputs, where the walk ends.

    Raises:
        RefusedError: There is no such region; a candidate if a Conv's output runs into the consumer through nodes
            that mix or join channels.
    """
    value, dims = consumer.input, rank(consumer.input)
    if not is_convolutional(consumer) and dims is not None and consumer.axis % dims != 1:
        raise RefusedError(f"{consumer.name} does not read axis 1", candidate=False)  # tokens, say
    nodes, source = _walk(value, stop)
    frame = _frame(consumer, source)
    lane, flat = frame.lane, frame.flat
    lanes = {source.output: lane}
    scalars: set[ir.Value] = set()
    hidden = value
    for node in in_dependency_order(value, nodes, {source.output}):
        operands = [x for x in node.inputs if x is not None]
        data = [x for x in operands if x in lanes]
        if data:
            lanes[node.outputs[0]] = found = _lane_behind(node, data, lanes, scalars, frame)
            if found is flat and lanes[data[0]] is lane and lane.channels != flat.channels:
                hidden = data[0]
        elif all(x in scalars or ((known := folded(x)) is not None and known.size == 1) for x in operands):
            scalars.update(node.outputs)
        else:
            raise RefusedError(f"{label(node)} ({node.op_type}) makes per-channel numbers at run time")
    _check_consumer(consumer, source, lanes[value], flat)
    kept = tuple(n for n in in_dependency_order(value, nodes, {source.output}) if n.outputs[0] in lanes)
    return Channelwise(kept, source, frozenset(v for v in lanes if lanes[v] is flat), hidden)


def _walk(value: ir.Value, stop: Mapping[ir.Value, Operator]) -> tuple[dict[ir.Node, None], Operator]:
    """The nodes behind `value`, and the one operator that they read."""
    nodes: dict[ir.Node, None] = {}
    sources: dict[ir.Value, Operator] = {}
    objections, foreign = [], []
    stack: list[tuple[ir.Value, ir.Node | None]] = [(value, None)]
    while stack and len(sources) < 2:  # a residual stream goes on for ever, and two say enough
        current, reader = stack.pop()
        node = current.producer()
        if current in stop:
            sources[current] = stop[current]
        elif reader is not None and folded(current) is not None:
            continue
        elif is_overridable(current):
            objections.append(f"{current.name} is overridable: it is also a graph input")
        elif node is None or not (is_elementwise(node) or is_spatial(node) or is_op(node, *_MIXES)):
            foreign.append(current)
        elif node not in nodes:
            nodes[node] = None
            if is_op(node, *_MIXES) and not is_spatial(node):
                objections.append(f"{label(node)} ({node.op_type}) mixes or moves channels on the way")
            stack += [(x, node) for x in _data(node)]
    _check_walk(nodes, list(sources.values()), objections, foreign)
    return nodes, next(iter(sources.values()))


def _data(node: ir.Node) -> Iterator[ir.Value]:
    """The operands that channels may come from."""
    whole = is_elementwise(node) or node.op_type == "Concat"
    return (value for value in (node.inputs if whole else node.inputs[:1]) if value is not None)


def _check_walk(
    nodes: Mapping[ir.Node, None], sources: list[Operator], objections: list[str], foreign: list[ir.Value]
) -> None:
    if not any(map(is_convolutional, sources)):
        raise RefusedError("no Conv is behind it", candidate=False)
    if len(sources) > 1:
        names = " and ".join(source.name for source in sources)
        raise RefusedError(f"{_join(nodes)} the channels of {names}: neither can be cut alone")
    if objections:
        raise RefusedError(objections[0])
    if foreign:
        other = foreign[0].name
        raise RefusedError(
            f"{_join(nodes)} the channels of {sources[0].name} with {other}, which cannot be cut"
        )


def _join(nodes: Mapping[ir.Node, None]) -> str:
    """The node nearest to the consumer that joins tensors, sums first: x * Sigmoid(x) joins nothing new."""
    joins = [n for n in nodes if sum(folded(x) is None for x in _data(n)) > 1]
    sums = [n for n in joins if is_op(n, "Add", "Concat", "Sum")]
    first = next(iter(sums or joins), None)
    return "the region joins" if first is None else f"{label(first)} ({first.op_type}) joins"


def _frame(consumer: Operator, source: Operator) -> Frame:
    """How channels lie before and behind a flattening."""
    if source.rank is None or source.axis % source.rank != 1:
        raise RefusedError(f"{source.name} has its channels on axis {source.axis}, not 1")
    lane = Lane(source.name, 1, source.rank, source.out_features)
    flat = Lane(source.name, 1, 2, consumer.in_features)
    return Frame(lane, flat, first_size(source.input), first_size(consumer.output))


def _lane_behind(
    node: ir.Node,
    data: list[ir.Value],
    lanes: Mapping[ir.Value, Lane],
    scalars: set[ir.Value],
    frame: Frame,
) -> Lane:
    """How channels lie in a node's output."""
    given = lanes[data[0]]
    if not is_elementwise(node):
        return frame.flat if is_flat_behind(node, frame, is_flat=given is frame.flat) else frame.lane
    if any(lanes[value] is not given for value in data):
        raise RefusedError(f"{label(node)} ({node.op_type}) joins tensors of different ranks")
    for value in node.inputs:
        if value is not None and value not in lanes and value not in scalars:
            channel_constant(value, node, given)
    check_mode(node, given)
    return given


def _check_consumer(consumer: Operator, source: Operator, given: Lane, flat: Lane) -> None:
    conv = is_convolutional(consumer)
    dims = given.rank or 0
    if given is flat and conv:
        raise RefusedError(f"{consumer.name} is a Conv that reads what was flattened")
    if (conv and consumer.rank != dims) or consumer.axis % dims != 1 or -consumer.axis > dims:
        raise RefusedError(
            f"{source.name} has its channels on axis 1 of {dims}, {consumer.name} reads axis {consumer.axis}"
        )
    if given.channels != consumer.in_features:
        raise RefusedError(
            f"{source.name} has {given.channels} channels, {consumer.name} reads {consumer.in_features}"
        )
    if consumer.in_features % source.out_features:
        raise RefusedError(
            f"{consumer.name} reads {consumer.in_features} features, no multiple of the {source.out_features} "
            f"channels of {source.name}"
        )
