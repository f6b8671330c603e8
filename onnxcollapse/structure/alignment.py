# SPDX-License-Identifier: Apache-2.0
"""Which tensors of two graphs of the same layers correspond, whatever they are called.

Exporters write a decoder twice, for runs without and with a cache. The weights are the same, so nodes that read equal
ones correspond, and from these correspondence grows: forward to the only reader of its kind, backward to what a node of
the same kind reads. It ends where the graphs differ, as they do around caches and masks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator

import onnx_ir as ir

from onnxcollapse.model import edit, walk
from onnxcollapse.model.weights import digest, key


def align(graph: ir.Graph, like: ir.Graph) -> None:
    """Gives tensors of a graph the names that those which correspond to them have in another; others get free ones.

    Inputs and outputs keep their names. Names then mean the same in both.

    Args:
        graph: Its tensors are renamed.
        like: Another graph of the same layers.
    """
    partners = _Alignment(graph, like).partners
    fixed = dict.fromkeys((*graph.inputs, *graph.outputs))
    moved = [value for value in _values(graph) if value not in fixed]
    held = {value.name for value in fixed}
    taken = held | {value.name for value in _values(like)}

    def wanted(value: ir.Value) -> str | None:
        name = partners[value].name if value in partners else None
        return edit.free_name(value.name or "", taken) if name is None or name in held else name

    names = [wanted(value) for value in moved]
    for number, value in enumerate(moved):  # names pass each other, so all are given up first
        value.name = f"{value.name} {number}"
    for value, name in zip(moved, names, strict=True):
        value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All tensors with a name, each once."""
    return iter(dict.fromkeys(value for value in walk.values(graph) if value.name))


class _Alignment:
    """Tensors of a graph and their partners in another, one to one."""

    def __init__(self, graph: ir.Graph, like: ir.Graph) -> None:
        self.partners: dict[ir.Value, ir.Value] = {}
        self._taken: set[ir.Value] = set()
        self._forward: deque[ir.Value] = deque()
        self._backward: deque[ir.Value] = deque()
        self._digests: dict[Hashable, str] = {}
        for ours, theirs in ((graph.inputs, like.inputs), (graph.outputs, like.outputs)):
            named = {value.name: value for value in theirs}
            for value in ours:
                self._pair(value, named.get(value.name))
        kinds, known = self._by_weights(graph), self._by_weights(like)
        for kind, nodes in kinds.items():
            if len(nodes) == len(known.get(kind, ())):
                for node, partner in zip(nodes, known[kind], strict=True):
                    self._pair_nodes(node, partner)
        self._grow()

    def _by_weights(self, graph: ir.Graph) -> dict[Hashable, list[ir.Node]]:
        """The nodes that read weights, by these and by what they do, in graph order."""
        found: dict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in graph:
            weights = tuple(
                (place, self._digest(value.const_value))
                for place, value in enumerate(node.inputs)
                if value is not None and value.const_value is not None and value.const_value.size > 1
            )
            if weights:
                found[_kind(node), weights].append(node)
        return found

    def _digest(self, tensor: ir.TensorProtocol) -> str:
        stored = key(tensor)
        if stored not in self._digests:
            self._digests[stored] = digest(tensor)
        return self._digests[stored]

    def _grow(self) -> None:
        """What lies behind is surer than what lies before, where caches come in."""
        while self._forward or self._backward:
            if self._forward:
                self._pair_reader(self._forward.popleft())
            else:
                value = self._backward.popleft()
                made, partner = value.producer(), self.partners[value].producer()
                if made is not None and partner is not None and _kind(made) == _kind(partner):
                    self._pair_nodes(made, partner)

    def _pair_reader(self, value: ir.Value) -> None:
        """Pairs nodes that read two partners, where each is the only one of its kind to do so."""
        ours, theirs = _readers(value), _readers(self.partners[value])
        for kind, nodes in ours.items():
            others = theirs.get(kind, [])
            if len(nodes) == len(others) == 1:
                for output, partner in zip(nodes[0].outputs, others[0].outputs, strict=False):
                    self._pair(output, partner)

    def _pair_nodes(self, node: ir.Node, partner: ir.Node) -> None:
        for ours, theirs in ((node.outputs, partner.outputs), (node.inputs, partner.inputs)):
            for value, other in zip(ours, theirs, strict=False):
                self._pair(value, other)

    def _pair(self, value: ir.Value | None, partner: ir.Value | None) -> None:
        if value is None or partner is None or value in self.partners or partner in self._taken:
            return
        if not self._may_be(value, partner):
            return
        self.partners[value] = partner
        self._taken.add(partner)
        self._forward.append(value)
        self._backward.append(value)

    def _may_be(self, value: ir.Value, partner: ir.Value) -> bool:
        """Whether both are computed, or both the same constant; and of one type."""
        mine, other = value.const_value, partner.const_value
        if mine is None or other is None:
            return mine is other and (None in (value.dtype, partner.dtype) or value.dtype == partner.dtype)
        return self._digest(mine) == self._digest(other)


def _readers(value: ir.Value) -> dict[Hashable, list[ir.Node]]:
    found: dict[Hashable, list[ir.Node]] = defaultdict(list)
    for node, place in value.uses():
        found[_kind(node), place].append(node)
    return found


def _kind(node: ir.Node) -> Hashable:
    """What a node does: its operator, how many operands it has, and its attributes."""
    attributes = tuple(sorted((name, _plain(attribute)) for name, attribute in node.attributes.items()))
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes


def _plain(attribute: ir.Attr) -> str:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return digest(value)
    if attribute.type == ir.AttributeType.GRAPH:
        return " ".join(node.op_type for node in value)
    return str(value)
