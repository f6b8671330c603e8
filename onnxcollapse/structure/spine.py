# SPDX-License-Identifier: Apache-2.0
"""The spine: the chain of tensors through which all data from the main input to the main output must pass.

It is the dominator chain of the value graph, `Shape` and `Size` edges left out. Which input is the source matters: an
attention mask, rotary positions or a KV cache enter in every layer, and taken as sources beside the tokens they would
leave hardly a tensor that all data passes. So the chain is drawn from ONE input, the main input: the one whose chain
cuts the model's weights into the most stretches, ties going to the input that reaches the most weights, then to the
first. A mask's own chain has no stretch for any layer, a cache entry's one lacks the embedding, so tokens (or pixels)
win by structure, whatever they are called; encoder states that every decoder layer reads lose to the decoder's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.structure.channels import element_type
from onnxcollapse.structure.constants import folded, is_op, through_identity
from onnxcollapse.structure.dominators import ValueGraph, captured, ends_at

_MOST_CANDIDATES = (
    16  # inputs tried as the source, by the weights they reach; a deep decoder has 60 cache inputs
)
_JOINS = ("Concat", "ScatterElements", "ScatterND", "TensorScatter", "Where")


@dataclass(frozen=True, eq=False)
class Spine:
    """The chain, and what it was read from.

    Attributes:
        values: The chain, from the main input to the main output.
        flow: The value graph.
    """

    values: list[ir.Value]
    flow: ValueGraph


def spine(graph: ir.Graph) -> list[ir.Value]:
    """The spine of the main graph, from the main input to the main output, both included.

    Only the output itself if no data reaches it. The second output of a skip norm (the sum) is on the chain like the
    sum of an `Add`.

    Raises:
        ModelError: The graph has no outputs.
    """
    return read_spine(graph).values


def read_spine(graph: ir.Graph) -> Spine:
    """The spine with the value graph it was read from."""
    flow = ValueGraph(graph)
    output = _main_output(graph, flow)
    sink = flow.number(output)
    chain = _best_chain(flow, sink) if sink is not None else []
    return Spine([flow.values[number] for number in chain] or [output], flow)


def main_output(graph: ir.Graph) -> ir.Value:
    """The first floating output that data reaches and that is no side output of a layer.

    Side outputs are cache entries: a graph input joined with something new (by Concat, a scatter, or as a further
    output of a node that reads a graph input), or a tensor that feeds a later output without all data passing
    through it.
    The first floating output if all are side outputs; the first output if none is floating.

    Raises:
        ModelError: The graph has no outputs.
    """
    return _main_output(graph, ValueGraph(graph))


def _main_output(graph: ir.Graph, flow: ValueGraph) -> ir.Value:
    if not graph.outputs:
        raise ModelError(f"graph {graph.name!r} has no outputs")
    floating = [value for value in graph.outputs if _is_floating(value)]
    reached = [
        v for v in floating if flow.number(v) is not None and not v.is_graph_input() and not _joins_input(v)
    ]
    for value in reached:
        if not any(_is_side_of(value, other, flow) for other in reached if other is not value):
            return value
    return (reached or floating or list(graph.outputs))[0]


def _is_floating(value: ir.Value) -> bool:
    dtype = element_type(value)
    return dtype is None or dtype.is_floating_point()


def _joins_input(value: ir.Value) -> bool:
    """Whether a graph input (a cache) is handed on in `value`, joined with something new."""
    source = through_identity(value)
    node = source.producer() if source is not None else None
    if source is None or node is None:
        return False
    reads_input = any(v is not None and v.is_graph_input() for v in map(through_identity, node.inputs))
    return reads_input and (is_op(node, *_JOINS) or source is not node.outputs[0])


def _is_side_of(value: ir.Value, other: ir.Value, flow: ValueGraph) -> bool:
    """Whether `other` is computed from `value`, but not only through it."""
    number, sink = flow.number(value), flow.number(other)
    if number is None or sink is None or number >= sink or not flow.ancestors(sink)[number]:
        return False
    return number not in _best_chain(flow, sink)


def _best_chain(flow: ValueGraph, sink: int) -> list[int]:
    """The dominator chain of `sink` from its main input."""
    weights = _weights(flow, sink)
    reach = _reach(flow)
    starts = [
        number for number, sources in enumerate(flow.sources) if not sources and reach[sink] >> number & 1
    ]
    covered = {
        start: sum(size for number, size in weights.items() if reach[number] >> start & 1) for start in starts
    }
    starts.sort(key=lambda start: (-covered[start], start))
    best: tuple[int, list[int]] = (-1, [])
    for start in starts[:_MOST_CANDIDATES]:
        chain = flow.dominators(start, sink)
        score = _stretches(flow, chain, weights)
        if score > best[0]:
            best = (score, chain)
    return best[1]


def _reach(flow: ValueGraph) -> list[int]:
    """For each tensor, the inputs that reach it, as bits."""
    masks: list[int] = []
    for number, sources in enumerate(flow.sources):
        mask = 0 if sources else 1 << number
        for source in sources:
            mask |= masks[source]
        masks.append(mask)
    return masks


def _stretches(flow: ValueGraph, chain: list[int], weights: dict[int, int]) -> int:
    """How many stretches between neighbours on the chain have weights in them."""
    if not chain:
        return 0
    within, ends = flow.reached(chain[:1]), ends_at(flow, chain)
    return len({ends[number] for number in weights if within[number]})


def _weights(flow: ValueGraph, sink: int) -> dict[int, int]:
    """Elements of constants with two or more dimensions that each tensor leading to `sink` is computed with."""
    leads = flow.ancestors(sink)
    sizes: dict[ir.Value, int] = {}
    found = {}
    for number, value in enumerate(flow.values):
        node = value.producer()
        if node is None or not leads[number] or value is not node.outputs[0]:
            continue
        operands = [v for v in (*node.inputs, *captured(node)) if v is not None and flow.number(v) is None]
        sizes.update((operand, stored_weights(operand)) for operand in operands if operand not in sizes)
        size = sum(sizes[operand] for operand in operands)
        if size:
            found[number] = size
    return found


def stored_weights(value: ir.Value) -> int:
    """Elements of the matrices that a tensor no data reaches is made of, quantised ones included."""
    sizes: dict[ir.Value, int] = {}
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        known, node = folded(current), current.producer()
        if known is not None:
            sizes[known.root or current] = known.size if len(known.shape) > 1 else 0
        elif node is not None and not is_op(node, "Shape", "Size"):
            stack += [operand for operand in node.inputs if operand is not None]
        elif (
            current.is_initializer()
            and current.const_value is not None
            and len(current.const_value.shape) > 1
        ):
            sizes[current] = current.const_value.size
    return sum(sizes.values())
