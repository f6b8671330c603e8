# SPDX-License-Identifier: Apache-2.0
"""What computed shapes say: which axis of which tensor each of their numbers is."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.model import Model, skeleton
from onnxcollapse.model.shapes import infer
from onnxcollapse.structure.constants import folded

_DEEP, _LONG = 16, 64


@dataclass(frozen=True)
class Axis:
    """The size of an axis, which only a run tells.

    Attributes:
        value: The tensor.
        axis: The axis.
    """

    value: ir.Value
    axis: int


Dim = int | Axis


def inferred(model: Model) -> dict[str, tuple[int | None, ...]]:
    """Shapes of all tensors of the main graph whose rank can be inferred; None for sizes that only a run tells.

    They follow from inputs and weights alone: what a file declares of other tensors nobody holds it to.
    """
    bare = skeleton.for_inference(model.ir)
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    proto = infer(bare)
    found = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = info.type.tensor_type
        if kind.HasField("shape"):
            found[info.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
                for dim in kind.shape.dim
            )
    return found


class ShapeReader:
    """Reads tensors that hold shapes.

    Args:
        shapes: See `inferred`.
    """

    def __init__(self, shapes: dict[str, tuple[int | None, ...]]) -> None:
        self._shapes = shapes

    def shape(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """The shape of a tensor as far as it can be inferred; None where its rank cannot."""
        return self._shapes.get(value.name or "")

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
        shape = None if source is None else self.shape(source)
        if source is None or shape is None:
            return None
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        dims = tuple(Axis(source, axis) if size is None else size for axis, size in enumerate(shape))
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
