# SPDX-License-Identifier: Apache-2.0
"""The value graph of a model and its dominators: which tensors all data must pass through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from onnxcollapse.model import walk
from onnxcollapse.structure.constants import is_op

_CONTRIB = "com.microsoft"
# Skip norms: the norm that they hold, and how many operands after data and skip belong to it.
_NORMS = {
    "SkipLayerNormalization": ("LayerNormalization", 2),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 1),
}
_STREAM = 3  # the output of a skip norm that holds the sum before the norm
_MASK = 7  # the operand of an embedding norm that its mask index is computed from


def inputs_of(graph: ir.Graph) -> list[ir.Value]:
    """Graph inputs that data comes through: those without a default."""
    return [value for value in graph.inputs if not value.is_initializer()]


def sources_of(value: ir.Value) -> Sequence[ir.Value]:
    """The tensors that `value` is computed from in one step.

    `Shape` and `Size` hand no data on. A node with subgraphs reads what these capture, too. A skip norm is Add + norm:
    its first output is computed from the sum, if the sum is an output as well.
    """
    node = value.producer()
    if node is None or is_op(node, "Shape", "Size"):
        return ()
    return [operand for operand in operation(value)[1] if operand is not None]


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values from around `node` that its subgraphs read."""
    for body in walk.subgraphs(node):
        inner = set(body.inputs) | set(body.initializers.values())
        inner.update(value for held in body for value in held.outputs)
        for held in body:
            yield from (v for v in (*held.inputs, *captured(held)) if v is not None and v not in inner)
        yield from (value for value in body.outputs if value not in inner)


class ValueGraph:
    """The tensors of a graph in topological order, numbered, with what each is computed from.

    Attributes:
        values: The tensors that data can reach, inputs first, each after those it is computed from.
        sources: For each, the numbers of those it is computed from, `Shape` and `Size` edges left out.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.values: list[ir.Value] = []
        self.sources: list[tuple[int, ...]] = []
        self._number: dict[ir.Value, int] = {}
        for value in inputs_of(graph):
            self._append(value, ())
        for node in _sorted(graph):
            for value in _sum_first(node):
                known = (self._number.get(source) for source in sources_of(value))
                sources = tuple(sorted({number for number in known if number is not None}))
                if sources:
                    self._append(value, sources)

    def _append(self, value: ir.Value, sources: tuple[int, ...]) -> None:
        self._number[value] = len(self.values)
        self.values.append(value)
        self.sources.append(sources)

    def number(self, value: ir.Value) -> int | None:
        """Place of `value` in the order; None if no data reaches it."""
        return self._number.get(value)

    def ancestors(self, sink: int) -> list[bool]:
        """For each tensor, whether `sink` is computed from it."""
        found = [False] * len(self.values)
        found[sink] = True
        for number in range(sink, -1, -1):
            if found[number]:
                for source in self.sources[number]:
                    found[source] = True
        return found

    def reached(self, starts: Iterable[int]) -> list[bool]:
        """For each tensor, whether it is computed from one of `starts` (which count as reached)."""
        found = [False] * len(self.values)
        for number in starts:
            found[number] = True
        for number, sources in enumerate(self.sources):
            found[number] = found[number] or any(found[source] for source in sources)
        return found

    def dominators(self, start: int, sink: int) -> list[int]:
        """The tensors on every path from `start` to `sink`, both included, in order; empty if there is no path.

        One walk in topological order: a tensor's immediate dominator is the nearest common dominator of all that it is
        computed from (Cooper, Harvey and Kennedy 2001, which needs one pass on an acyclic graph).
        """
        reached, above, depth = self.reached([start]), [-1] * (sink + 1), [0] * (sink + 1)
        if not reached[sink]:
            return []
        for number in range(start + 1, sink + 1):
            sources = [source for source in self.sources[number] if reached[source]]
            if not sources:
                continue
            common = sources[0]
            for other in sources[1:]:
                while common != other:
                    if depth[common] >= depth[other]:
                        common = above[common]
                    else:
                        other = above[other]
            above[number], depth[number] = common, depth[common] + 1
        chain = [sink]
        while chain[-1] != start:
            chain.append(above[chain[-1]])
        return chain[::-1]


def ends_at(flow: ValueGraph, chain: Sequence[int]) -> list[int]:
    """For each tensor, the index of the first point of `chain` computed from it; len(chain) if there is none.

    For tensors that lie between a dominator chain's ends this is the stretch they belong to: one that lies behind
    chain[i] but not behind chain[i + 1] leads to chain[i + 1], for every path to the end does.
    """
    ends = [len(chain)] * len(flow.values)
    for index, number in enumerate(chain):
        ends[number] = index
    for number in range(len(ends) - 1, -1, -1):
        for source in flow.sources[number]:
            ends[source] = min(ends[source], ends[number])
    return ends


def operation(value: ir.Value) -> tuple[str, list[ir.Value | None]]:
    """What computes `value`, as a word, and from what.

    ONNX Runtime's fused ops that hide the stream are taken apart: a skip norm that yields the sum, too, is an Add and
    a norm; the mask index of an embedding norm is computed from the mask alone.
    """
    node = value.producer()
    if node is None:
        return "", []
    if _has_sum(node):
        data, skip, *rest = node.inputs
        scales = _NORMS[node.op_type][1]
        if value is node.outputs[_STREAM]:
            return "Add", [data, skip, *rest[scales:]]
        return _NORMS[node.op_type][0], [node.outputs[_STREAM], *rest[:scales]]
    if node.op_type == "EmbedLayerNormalization" and node.domain == _CONTRIB and value.index() == 1:
        return "MaskIndex", list(node.inputs[_MASK : _MASK + 1])
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return name, [*node.inputs, *captured(node)]


def _has_sum(node: ir.Node) -> bool:
    """Whether `node` is a skip norm that yields the sum before the norm as well."""
    known = node.op_type in _NORMS and node.domain == _CONTRIB
    return known and len(node.outputs) > _STREAM and node.outputs[_STREAM].name != ""


def sum_inside(node: ir.Node) -> ir.Value | None:
    """The output of a skip norm that is the sum before the norm; None where it yields none."""
    return node.outputs[_STREAM] if _has_sum(node) else None


def skip_bias(node: ir.Node) -> int:
    """The place of a skip norm's bias among its inputs: behind data, skip and the operands of its norm."""
    return 2 + _NORMS[node.op_type][1]


def _sum_first(node: ir.Node) -> list[ir.Value]:
    """The node's outputs, the sum of a skip norm before what is computed from it."""
    outputs = [value for value in node.outputs if value.name != ""]
    if _has_sum(node):
        outputs.sort(key=lambda value: value is not node.outputs[_STREAM])
    return outputs


def _sorted(graph: ir.Graph) -> list[ir.Node]:
    """Nodes in topological order (which ONNX requires of files; graphs under edit may be out of order)."""
    order: list[ir.Node] = []
    done: set[ir.Node] = set()
    for node in graph:
        stack = [(node, False)]
        while stack:
            current, expanded = stack.pop()
            if current in done or current.graph is not graph:
                continue
            if expanded:
                done.add(current)
                order.append(current)
                continue
            before = [v.producer() for v in (*current.inputs, *captured(current)) if v is not None]
            stack.append((current, True))
            stack += [(p, False) for p in before if p is not None and p not in done]
    return order
