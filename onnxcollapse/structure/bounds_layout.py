# SPDX-License-Identifier: Apache-2.0
"""Bounds of ops that move, join or pick elements."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure import intervals
from onnxcollapse.structure.channels import rank
from onnxcollapse.structure.constants import attribute, constant_array, folded
from onnxcollapse.structure.intervals import UNBOUNDED, Bounds, Interval, Rule, computed_in, make


def _whole(node: ir.Node, bounds: Bounds) -> Interval:
    return bounds(0).whole()


def _transpose(node: ir.Node, bounds: Bounds) -> Interval:
    perm, x = attribute(node, "perm"), bounds(0)
    if perm is None or x.low.ndim > len(perm):
        return x.whole()
    x = x.padded(len(perm))
    return make(x.low.transpose(perm), x.high.transpose(perm))


def _flatten(node: ir.Node, bounds: Bounds) -> Interval:
    axis, tensor_rank = int(attribute(node, "axis", 1)), rank(node.inputs[0])
    if axis < 0:
        axis += tensor_rank or 0
    return _flattened(node.inputs[0], axis, bounds(0)) if axis >= 0 else bounds(0).whole()


def _flattened(value: ir.Value | None, axis: int, x: Interval) -> Interval:
    """Bounds after the axes from `axis` on became one: [C, H, W] repeats each channel H W times."""
    dims = None if value is None or value.shape is None else value.shape.dims[axis:]
    if not dims or x.low.ndim > len(dims) or not all(isinstance(dim, int) for dim in dims):
        return x.whole()
    shape = tuple(int(dim) for dim in dims)  # type: ignore[arg-type]
    try:
        return make(np.broadcast_to(x.low, shape).reshape(-1), np.broadcast_to(x.high, shape).reshape(-1))
    except ValueError:  # the declared shape is wrong
        return x.whole()


def _reshape(node: ir.Node, bounds: Bounds) -> Interval:
    """Keeps channels that stay the last axis, or that the new shape flattens; else one pair for the whole."""
    x, target, value = bounds(0), constant_array(node.inputs[1]), node.inputs[0]
    if target is None or target.size == 0 or value is None:
        return x.whole()
    sizes = [int(size) for size in target.reshape(-1)]
    if x.low.ndim and x.shape[-1] > 1 and sizes[-1] == x.shape[-1]:
        last = x.along(-1, x.shape[-1])
        return last if x.low.ndim == 1 else make(last.low, last.high)
    if len(sizes) == 2 and value.shape is not None and len(value.shape) > 2:
        rest = value.shape.dims[1:]
        known = all(isinstance(dim, int) for dim in rest)
        count = int(np.prod([int(dim) for dim in rest])) if known else -1  # type: ignore[arg-type]
        if known and (sizes[1] == count or (sizes[0] == 0 and sizes[1] == -1)):
            return _flattened(value, 1, x)
    return x.whole()


def _concat(node: ir.Node, bounds: Bounds) -> Interval:
    parts = [bounds(i) for i in range(len(node.inputs))]
    axis, tensor_rank = int(attribute(node, "axis", 0)), rank(node.outputs[0])
    if axis >= 0 and tensor_rank is None:
        return intervals.hull(*(part.whole() for part in parts))
    axis -= (tensor_rank or 0) if axis >= 0 else 0
    sizes = [_size(value, axis) for value in node.inputs]
    try:
        if None not in sizes:
            return _joined(parts, axis, [size for size in sizes if size is not None])
        return intervals.hull(*(_without(part, axis) for part in parts))
    except ValueError:
        return intervals.hull(*(part.whole() for part in parts))


def _size(value: ir.Value | None, axis: int) -> int | None:
    """Declared length of `value` along the negative `axis`."""
    if value is None or value.shape is None or len(value.shape) < -axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _joined(parts: list[Interval], axis: int, sizes: list[int]) -> Interval:
    depth = max(-axis, *(part.low.ndim for part in parts))
    padded = [part.padded(depth) for part in parts]
    common = list(np.broadcast_shapes(*(_without(part, axis).shape for part in padded)))
    lows, highs = [], []
    for part, size in zip(padded, sizes, strict=True):
        common[axis] = size
        lows.append(np.broadcast_to(part.low, common))
        highs.append(np.broadcast_to(part.high, common))
    return make(np.concatenate(lows, axis), np.concatenate(highs, axis))


def _without(part: Interval, axis: int) -> Interval:
    return part.reduced((part.low.ndim + axis,)) if part.low.ndim >= -axis else part


def _gather(node: ir.Node, bounds: Bounds) -> Interval:
    """Rows of a constant table: the bounds of its columns. Of other tensors the whole's."""
    table, axis = folded(node.inputs[0]), int(attribute(node, "axis", 0))
    if table is None or axis != 0 or len(table.shape) != 2 or table.dtype not in intervals.FLOATS:
        return bounds(0).whole()
    array = table.load()
    return make(array.min(axis=0).astype(np.float64), array.max(axis=0).astype(np.float64))


def _pad(node: ir.Node, bounds: Bounds) -> Interval:
    x = bounds(0).whole()
    if attribute(node, "mode", "constant") != "constant":
        return x
    given = (
        bounds(2)
        if len(node.inputs) > 2 and node.inputs[2] is not None
        else make(*[attribute(node, "value", 0.0)] * 2)
    )
    return intervals.hull(x, given.whole())


def _mean(node: ir.Node, bounds: Bounds) -> Interval:
    x = bounds(0).whole()
    return (
        x
        if x.is_unbounded
        else x.widened(0.0, x.magnitude * (1 << 16) * intervals.roundoff(computed_in(node)))
    )


def _unknown(node: ir.Node, bounds: Bounds) -> Interval:
    return UNBOUNDED


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Expand": lambda node, bounds: bounds(0),
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _whole,
    "GatherND": _whole,
    "Pad": _pad,
    "ReduceMax": _whole,
    "ReduceMean": _mean,
    "ReduceMin": _whole,
    "Reshape": _reshape,
    "Slice": _whole,
    "Split": _whole,
    "Squeeze": _whole,
    "Tile": _whole,
    "Transpose": _transpose,
    "Unsqueeze": _whole,
}
