# SPDX-License-Identifier: Apache-2.0
"""Windows of equal feed-forward blocks, and the same weights in all places of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.structure.building import build_linear
from onnxcollapse.structure.constants import Array
from onnxcollapse.structure.feedforward import FeedForward
from onnxcollapse.structure.linear import Linear


@dataclass(frozen=True, eq=False)
class FfnWindow:
    """Feed-forward blocks, each the next one of its kind behind the one before it.

    Attributes:
        blocks: The blocks in graph order.
        nodes: Their nodes and all nodes on the ways from the first block's output to the last one's input: what is
            between them sees what they compute.
    """

    blocks: tuple[FeedForward, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """The last block's name, which is the output of all of it."""
        return self.blocks[-1].name

    @property
    def biased(self) -> bool:
        """Whether the blocks' outputs have biases."""
        return self.blocks[0].down.bias is not None


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the Linears of a block: first those that read its input (gate, if any, and up), then the last.

    Attributes:
        matrices: W [in, out] of each.
        offsets: b [out] of each, or None for no bias.
        scale: What each hidden channel is multiplied by before the last Linear, [h]; None for nothing.
    """

    matrices: tuple[Array, ...]
    offsets: tuple[Array | None, ...]
    scale: Array | None = None


def windows(blocks: Sequence[FeedForward], size: int, order: Mapping[ir.Node, int]) -> Iterator[FfnWindow]:
    """The runs of `size` blocks of one form that follow each other.

    Args:
        blocks: All blocks of a graph, in graph order.
        size: Blocks in a window, at least 2.
        order: Number of each node in the graph.
    """
    kinds: dict[object, list[FeedForward]] = {}
    for block in blocks:
        kinds.setdefault(form(block), []).append(block)
    found = []
    for alike in kinds.values():
        for start in range(len(alike)):
            run = _apart(alike[start:])[:size]
            if len(run) < size:
                break
            between = _between(run[0].output, run[-1].input)
            own = {node for block in run for node in block.nodes}
            nodes = sorted(own | between, key=lambda node: order.get(node, -1))
            if between and all(block.output.producer() in between for block in run[1:-1]):
                found.append(FfnWindow(tuple(run), tuple(nodes)))
    yield from sorted(found, key=lambda window: order.get(window.blocks[-1].down.node, -1))


def _apart(blocks: Sequence[FeedForward]) -> list[FeedForward]:
    """The first block and each further one that shares no node with those taken: in a chain every other one."""
    taken: set[ir.Node] = set()
    found = []
    for block in blocks:
        if taken.isdisjoint(block.nodes):
            taken.update(block.nodes)
            found.append(block)
    return found


def form(block: FeedForward) -> object:
    """What two blocks have in common when they can have the same weights: sizes, spelling and activation."""
    region = tuple(
        (node.domain, node.op_type, str(sorted(map(_told, node.attributes.values()))))
        for node in block.region
    )
    constants = tuple((array.shape, array.tobytes()) for array in block.pointwise.constants.values())
    return tuple(map(_spelling, block.linears)), region, constants


def _told(attribute: ir.Attr) -> str:
    return f"{attribute.name}={attribute.value}"


def _spelling(linear: Linear) -> object:
    return (
        linear.kind,
        linear.transposed,
        linear.weight_left,
        linear.in_features,
        linear.out_features,
        linear.axis,
        linear.dtype,
        linear.rank if linear.kind == "conv" else None,
        linear.bias is not None,
    )


def _between(start: ir.Value, end: ir.Value) -> set[ir.Node]:
    """Nodes on the ways from a tensor to another; the makers of both count, where there is a way."""
    ahead = _reached([start])
    found: set[ir.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found or not ahead & set(node.outputs):
            continue
        found.add(node)
        waiting += [value for value in node.inputs if value is not None and value is not start]
    return found


def _reached(values: Iterable[ir.Value]) -> set[ir.Value]:
    """These tensors and all that is computed from them."""
    found: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += [out for node in value.consumers() for out in node.outputs]
    return found


def block_weights(block: FeedForward) -> Weights:
    """What a block's Linears have now."""
    return Weights(
        tuple(linear.matrix() for linear in block.linears),
        tuple(None if linear.bias is None else linear.offset() for linear in block.linears),
    )


class Shelf:
    """Stores arrays as initializers of one graph, each once however often it is asked for.

    An array is known by where it lies in memory, so that views of one are one; all of them are kept until the end.
    """

    def __init__(self) -> None:
        self._stored: dict[object, ir.Value] = {}
        self._kept: list[Array] = []

    def store(self, graph: ir.Graph, hint: str, array: Array, dtype: ir.DataType) -> ir.Value:
        """The initializer of an array."""
        key = array.ctypes.data, array.shape, array.strides, dtype
        if key not in self._stored:
            self._stored[key] = edit.add_initializer(graph, hint, array, dtype)
            self._kept.append(array)
        return self._stored[key]


def tie(model: Model, blocks: Sequence[FeedForward], weights: Sequence[Weights]) -> None:
    """Gives each block its weights; an array that several of them have is stored once.

    Args:
        model: The model that the blocks are in; outputs keep their names.
        blocks: Blocks of one form.
        weights: Those of each block.

    Raises:
        ModelError: A weight overflows its element type.
    """
    shelf = Shelf()
    for block, own in zip(blocks, weights, strict=True):
        for linear, matrix, offset in zip(block.linears, own.matrices, own.offsets, strict=True):
            anchor, x = linear.nodes[-1], linear.input
            if linear is block.down and own.scale is not None:
                x = _scaled(model.graph, anchor, linear, own.scale)
            value = build_linear(model.graph, anchor, linear, x, matrix, offset, shelf.store)
            edit.substitute(model, linear.output, value)


def probe_hidden(scratch: Model, block: FeedForward, weights: Weights, shelf: Shelf) -> str:
    """Adds an output to a copy of a block's model, its hidden tensor as other weights make it; returns the name.

    Tensors are found by their names, as what was added to the copy before may read those of the block.

    Args:
        scratch: The copy.
        block: The block in the model that was copied.
        weights: The other weights; the last Linear's are not looked at.
        shelf: Stores them.

    Raises:
        ModelError: A weight overflows its element type.
    """
    graph = scratch.graph
    there = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    anchor = there[block.name].producer()
    if anchor is None:
        raise ModelError(f"'{block.name}' is computed by no node of the copy")
    known: dict[ir.Value, ir.Value] = {}
    for linear, matrix, offset in zip(block.linears[:-1], weights.matrices, weights.offsets, strict=False):
        x = there[linear.input.name or ""]
        known[linear.output] = build_linear(graph, anchor, linear, x, matrix, offset, shelf.store)
    copies: list[ir.Node] = []
    for node in block.region:
        if known.keys().isdisjoint(node.inputs):
            continue
        operands = [
            value if value is None else known.get(value) or there[value.name or ""] for value in node.inputs
        ]
        outputs = []
        for old in node.outputs:
            outputs.append(edit.like(old))
            outputs[-1].name = old.name
            known[old] = outputs[-1]
        attributes = list(node.attributes.values())
        copies.append(
            ir.Node(node.domain, node.op_type, operands, attributes, outputs=outputs, name=node.name)
        )
    edit.insert_before(graph, anchor, copies)
    graph.outputs.append(known[block.hidden])
    return known[block.hidden].name or ""


def _scaled(graph: ir.Graph, anchor: ir.Node, down: Linear, scale: Array) -> ir.Value:
    """The hidden tensor times a number a channel."""
    shape = [1] * -down.axis if down.axis < 0 else [1] * (down.rank or 4)
    shape[down.axis] = len(scale)
    factor = edit.add_initializer(graph, f"{down.name}_scale", np.reshape(scale, shape), down.dtype)
    output = edit.like(down.input)
    output.name = f"{down.input.name}_scaled"
    node = ir.Node("", "Mul", [down.input, factor], outputs=[output], name=f"{output.name}_Mul")
    edit.insert_before(graph, anchor, node)
    return output
