# SPDX-License-Identifier: Apache-2.0
"""Blocks: the stretches between neighbours on the spine, and runs of isomorphic ones, which are a model's layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxcollapse.structure.constants import folded
from onnxcollapse.structure.dominators import ValueGraph, ends_at, operation
from onnxcollapse.structure.spine import read_spine, stored_weights

_NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
_SUMS = frozenset({"Add", "Cast", "Dropout", "Identity", "Sum"})
_COMMUTATIVE = frozenset({"Add", "And", "Equal", "Max", "Mean", "Min", "Mul", "Or", "Sum", "Xor"})


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of the spine: everything through which data gets from one point to another.

    Attributes:
        start: The spine point it reads.
        end: The spine point it computes.
        nodes: Nodes on paths from start to end, in an order that is the same for isomorphic blocks, so that `zip`
            pairs nodes that correspond. What computes masks, rotary tables and shapes is not among them; a fused skip
            norm belongs to the block that its sum ends and to the one that its norm begins.
        weights: Constants (not single numbers) that these nodes read, paired by `zip` likewise.
        signature: Equal for isomorphic blocks: ops, attributes, wiring, types and shapes of weights; no names and
            no values.
    """

    start: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]
    weights: tuple[ir.Value, ...]
    signature: str

    @property
    def name(self) -> str:
        """What the block is called in reports: the tensors that it lies between."""
        return f"{self.start.name} .. {self.end.name}"

    @property
    def is_residual(self) -> bool:
        """Whether `end` is `start` plus something: in a post-norm net the norm comes after the sum, and it is not."""
        stack, seen = [self.end], set[ir.Value]()
        while stack:
            value = stack.pop()
            label, operands = operation(value)
            if value is self.start:
                return True
            if label in _SUMS and value not in seen:
                seen.add(value)
                stack += [operand for operand in operands if operand is not None]
        return False

    @property
    def params(self) -> int:
        """Elements of its weights, each stored tensor once."""
        sizes = {}
        for value in self.weights:
            known = folded(value)
            if known is not None:
                sizes[known.root or value] = known.size
        return sum(sizes.values())


def blocks(graph: ir.Graph) -> list[Block]:
    """The stretches between neighbours on the spine, in order."""
    found = read_spine(graph)
    flow, chain = found.flow, found.values
    numbers = [flow.number(value) for value in chain]
    points = [number for number in numbers if number is not None]
    if len(points) < 2:
        return []
    members: list[list[int]] = [[] for _ in points]
    within, ends = flow.reached(points[:1]), ends_at(flow, points)
    for number in range(points[-1] + 1):
        if within[number] and ends[number] < len(points):
            members[ends[number]].append(number)
    return [_Reader(flow, points[i - 1], points[i], members[i]).block() for i in range(1, len(points))]


def layers(graph: ir.Graph) -> list[list[Block]]:
    """Runs of isomorphic layers, in order: each layer one block, of as many spine steps as repeat.

    A run is the longest repetition of a period of stretches with weights in it, with the shortest such period. Of
    placements equally long, the one that starts where the most nodes read: `[sum, ln] [attention, ln, ffn, ln] ...`
    rather than `[sum] [ln, attention, ln, ffn] ...`, then the first. What is left on both sides is searched again.
    """
    return [[joined(pieces) for pieces in run] for run in pieces_of_layers(graph)]


def pieces_of_layers(graph: ir.Graph) -> list[list[Sequence[Block]]]:
    """The same runs with each layer as the stretches that it is made of."""
    return list(_runs(blocks(graph)))


def _runs(stretches: Sequence[Block]) -> Iterator[list[Sequence[Block]]]:
    """The runs within `stretches`, in order, each a list of periods."""
    best: tuple[tuple[int, ...], int, int, int] | None = None
    kinds = [block.signature for block in stretches]
    for period in range(1, len(kinds) // 2 + 1):
        for start, count in _repetitions(kinds, period):
            if any(block.weights for block in stretches[start : start + period]):
                key = (count * period, -period, _readers(stretches[start]), -start)
                if best is None or key > best[0]:
                    best = (key, start, period, count)
    if best is None:
        return
    _, start, period, count = best
    end = start + period * count
    yield from _runs(stretches[:start])
    yield [stretches[i : i + period] for i in range(start, end, period)]
    yield from _runs(stretches[end:])


def _readers(block: Block) -> int:
    """How many of the block's nodes read its start."""
    return sum(block.start in node.inputs for node in block.nodes)


def _repetitions(kinds: Sequence[str], period: int) -> Iterator[tuple[int, int]]:
    """(start, count) of every placement of the longest repetitions of `period`."""
    begin, last = 0, len(kinds) - period
    for position in range(last + 1):
        if position < last and kinds[position] == kinds[position + period]:
            continue
        length = position + period - begin  # kinds[begin : position + period] has that period
        count = length // period
        if count > 1:
            yield from ((start, count) for start in range(begin, begin + length - count * period + 1))
        begin = position + 1


def joined(pieces: Sequence[Block]) -> Block:
    """Stretches one behind the other as one block."""
    if len(pieces) == 1:
        return pieces[0]
    nodes = dict.fromkeys(node for piece in pieces for node in piece.nodes)
    weights = tuple(value for piece in pieces for value in piece.weights)
    signature = _digest([piece.signature for piece in pieces])
    return Block(pieces[0].start, pieces[-1].end, tuple(nodes), weights, signature)


class _Reader:
    """Reads one stretch into a canonical form."""

    def __init__(self, flow: ValueGraph, start: int, end: int, members: list[int]) -> None:
        self._flow, self._start, self._end = flow, flow.values[start], flow.values[end]
        self._members = {flow.values[number] for number in members}
        self._kinds: dict[ir.Value, str] = {self._start: "start"}
        for number in members:
            value = flow.values[number]
            self._kinds[value] = self._kind(value)

    def block(self) -> Block:
        nodes, weights = self._walk()
        counts = [len(nodes), len(set(weights))]
        signature = _digest([self._kinds[self._end], counts])
        return Block(self._start, self._end, tuple(nodes), tuple(weights), signature)

    def _kind(self, value: ir.Value) -> str:
        """Digest of how `value` is computed from the start, with constants by type and shape only."""
        label, operands = operation(value)
        kinds = ["" if operand is None else self._operand_kind(operand) for operand in operands]
        if label in _COMMUTATIVE:
            kinds.sort()
        return _digest([label, _attributes(label, value.producer()), _port(label, value), kinds])

    def _operand_kind(self, value: ir.Value) -> str:
        if value in self._kinds:
            return self._kinds[value]
        if self._flow.number(value) is not None:
            return "data"  # from other inputs, or from before the stretch
        known = folded(value)
        if known is not None and known.size > 1 and known.dtype.is_floating_point():
            return f"{known.dtype.name}{list(known.shape)}"
        return f"stored {stored_weights(value)}"

    def _walk(self) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes and weights, depth first from the end, operands in canonical order."""
        nodes: dict[ir.Node, None] = {}
        weights: list[ir.Value] = []
        seen = {self._start}
        stack = [(self._end, False)]
        while stack:
            value, expanded = stack.pop()
            node = value.producer()
            if node is None or (value in seen and not expanded):
                continue
            operands = self._canonical(value)
            if expanded:
                nodes[node] = None
                weights += [operand for operand in operands if self._is_weight(operand)]
                continue
            seen.add(value)
            stack.append((value, True))
            stack += [(operand, False) for operand in reversed(operands) if operand in self._members]
        return list(nodes), weights

    def _canonical(self, value: ir.Value) -> list[ir.Value]:
        label, operands = operation(value)
        present = [operand for operand in operands if operand is not None]
        return sorted(present, key=self._operand_kind) if label in _COMMUTATIVE else present

    def _is_weight(self, value: ir.Value) -> bool:
        known = folded(value) if self._flow.number(value) is None else None
        return known is not None and known.size > 1 and known.dtype.is_floating_point()


def _port(label: str, value: ir.Value) -> int:
    """Which output of the operation `value` is; the sum of a skip norm is the only output of an Add."""
    return 0 if label in _COMMUTATIVE or label in _NORMS else value.index() or 0


def _attributes(label: str, node: ir.Node | None) -> list[Any]:
    """Attributes by name; tensors by type and shape, subgraphs by their ops. Of a norm, fused or not, epsilon."""
    described: list[Any] = []
    for name, attr in (
        sorted(node.attributes.items()) if node is not None and label not in _COMMUTATIVE else ()
    ):
        if attr.is_ref():
            described.append([name, attr.ref_attr_name])
        elif attr.type == ir.AttributeType.TENSOR:
            described.append([name, attr.as_tensor().dtype.name, list(attr.as_tensor().shape)])
        elif attr.type == ir.AttributeType.GRAPH:
            described.append([name, [inner.op_type for inner in attr.as_graph()]])
        elif label not in _NORMS or name == "epsilon":
            described.append([name, str(attr.value)])
    return described


def _digest(content: Sequence[Any]) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()
