# SPDX-License-Identifier: Apache-2.0
"""What computed shapes say: which axis of which tensor each of their numbers is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxcollapse.model import Model, carry, skeleton
from onnxcollapse.model.shapes import infer
from onnxcollapse.structure.constants import attribute, folded

_DEEP, _LONG = 16, 64

_BROADCASTING = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
    "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
})  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """The size of an axis, which only a run tells and nothing else is known of.

    Attributes:
        value: The tensor.
        axis: The axis.
    """

    value: ir.Value
    axis: int


Known = int | str | None
"""A size, or the name of one that only a run tells; axes whose sizes have one name are equally long."""

Dim = int | str | Axis


def inferred(model: Model) -> dict[str, tuple[Known, ...]]:
    """Shapes of all tensors of the main graph whose rank can be inferred; None for sizes of which nothing is known.

    They follow from inputs and weights alone: what a file declares of other tensors nobody holds it to.
    """
    bare = skeleton.for_inference(model.ir)
    for graph in carry.proto_graphs(bare):
        del graph.value_info[:]
        if isinstance(graph, onnx.GraphProto):
            for value in (*graph.output, *(() if graph is bare.graph else graph.input)):
                value.type.tensor_type.ClearField("shape")
    for given in bare.graph.input:
        dims = given.type.tensor_type.shape.dim
        names = Counter(dim.dim_param for dim in dims if dim.dim_param)
        for axis, dim in enumerate(dims):
            # A name lets inference follow a size; two of one name are "?" more often than they are equal.
            if _known(dim) is None or names[dim.dim_param] > 1:
                dim.dim_param = f"axis {axis} of {given.name}"
    proto = infer(bare, computed=False)
    found = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = info.type.tensor_type
        if kind.HasField("shape"):
            found[info.name] = tuple(map(_known, kind.shape.dim))
    return found


def _known(dim: onnx.TensorShapeProto.Dimension) -> Known:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def _reshaped(
    source: Sequence[Dim] | None, target: Sequence[Dim] | None, *, copies: bool
) -> Sequence[Dim | None] | None:
    """The sizes behind a Reshape. For -1 it counts the one axis of its source that its target does not name.

    Args:
        source: Sizes of what is reshaped.
        target: What it is told.
        copies: Whether 0 stands for the source's size at its place.
    """
    if source is None or target is None:
        return None
    if copies:
        target = [source[at] if size == 0 and at < len(source) else size for at, size in enumerate(target)]
    have, want = (Counter(size for size in sizes if size not in (1, -1)) for sizes in (source, target))
    left = [*(have - want).elements()] or [1]
    counted = left[0] if len(left) == 1 and not want - have else None
    return [counted if size == -1 else size for size in target]


def _broadcast(shapes: Sequence[Sequence[Dim] | None], rank: int) -> Sequence[Dim | None] | None:
    """The sizes of what tensors broadcast to, where all those of an axis that are not 1 are known to be one."""
    found: list[Dim | None] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if shape is not None and len(shape) >= -axis} - {1}
        found.append(next(iter(sizes), 1) if len(sizes) < 2 else None)
    return None if None in shapes else found


class ShapeReader:
    """Reads shapes, and tensors that hold some.

    Inference leaves some sizes without a name that have one: these are followed here.

    Args:
        model: Whose main graph is read.
    """

    def __init__(self, model: Model) -> None:
        self._shapes = inferred(model)
        self._given = {
            size for value in model.graph.inputs for size in self._shapes.get(value.name or "", ())
        }
        self._same_as: dict[str, Dim] = {}
        for node in model.graph:
            if node.domain == "" and node.outputs:
                self._follow(node)

    def shape(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """The sizes of a tensor's axes; None where its rank cannot be inferred."""
        known = self._shapes.get(value.name or "")
        if known is None:
            return None
        sizes = (Axis(value, axis) if size is None else size for axis, size in enumerate(known))
        return tuple(map(self._named, sizes))

    def _named(self, size: Dim) -> Dim:
        while isinstance(size, str) and size in self._same_as:
            size = self._same_as[size]
        return size

    def _follow(self, node: ir.Node) -> None:
        """Finds out what the names stand for that inference made up for the sizes of an output."""
        made = self.shape(node.outputs[0])
        if made is None or all(isinstance(size, int) for size in made):
            return
        for size, found in zip(made, self._sizes(node, len(made)), strict=True):
            for name, other in ((size, found), (found, size)):
                if isinstance(name, str) and name not in self._given and other not in (None, name):
                    self._same_as[name] = other
                    break

    def _sizes(self, node: ir.Node, rank: int) -> Sequence[Dim | None]:
        """The sizes of an output as its operator makes them; None where that is not known."""
        found: Sequence[Dim | None] | None = None
        shapes = [None if value is None else self.shape(value) for value in node.inputs]
        if node.op_type == "Range":
            start, limit, step = map(self.read, node.inputs)
            found = limit if (start, step) == ((0,), (1,)) else None
        elif node.op_type == "Reshape" and len(shapes) == 2:
            found = _reshaped(
                shapes[0], self.read(node.inputs[1]), copies=not attribute(node, "allowzero", 0)
            )
        elif node.op_type in _BROADCASTING:
            found = _broadcast(shapes, rank)
        return found if found is not None and len(found) == rank else [None] * rank

    def read(self, value: ir.Value | None, depth: int = _DEEP) -> tuple[Dim, ...] | None:
        """The numbers that a tensor of rank 0 or 1 holds; None where one of them is computed in another way."""
        known = folded(value)
        if known is not None:
            if known.size > _LONG or not known.dtype.is_integer() or len(known.shape) > 1:
                return None
            return tuple(int(number) for number in known.load().reshape(-1))
        node = None if value is None else value.producer()
        if node is None or node.domain != "" or not depth:
            return None
        step = getattr(self, f"_{node.op_type.lower()}", None)
        found: tuple[Dim, ...] | None = None if step is None else step(node, depth - 1)
        return found

    def _shape(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        source = node.inputs[0]
        dims = None if source is None else self.shape(source)
        if dims is None:
            return None
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        return dims[None if start is None else start.as_int() : None if end is None else end.as_int()]

    def _same(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        return self.read(node.inputs[0], depth)

    _squeeze = _identity = _same

    def _unsqueeze(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        found = self.read(node.inputs[0], depth)
        return found if found is not None and len(found) == 1 else None

    def _cast(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        kept = node.attributes["to"].as_int() in (ir.DataType.INT32, ir.DataType.INT64)
        return self.read(node.inputs[0], depth) if kept else None

    def _concat(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        parts = [self.read(value, depth) for value in node.inputs]
        return None if None in parts else tuple(dim for part in parts if part is not None for dim in part)

    def _gather(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        dims, places = (self.read(value, depth) for value in node.inputs)
        if dims is None or places is None:
            return None
        taken = [p for p in places if isinstance(p, int) and -len(dims) <= p < len(dims)]
        return tuple(dims[place] for place in taken) if len(taken) == len(places) else None

    def _slice(self, node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
        if len(node.inputs) < 3:
            return None
        dims, *rest = (self.read(value, depth) for value in (*node.inputs[:3], *node.inputs[4:5]))
        numbers = [
            part[0] for part in rest if part is not None and len(part) == 1 and isinstance(part[0], int)
        ]
        if dims is None or len(numbers) < len(rest):
            return None
        return dims[slice(*numbers)]
