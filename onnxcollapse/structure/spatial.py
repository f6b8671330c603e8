# SPDX-License-Identifier: Apache-2.0
"""Nodes that move or pool positions but keep each channel of [N, C, positions...] to itself, and flatten at the end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure.constants import attribute, constant_array, folded, integers, is_op
from onnxcollapse.structure.convolution import depthwise_channels
from onnxcollapse.structure.pointwise import Lane
from onnxcollapse.structure.refusal import RefusedError, label

_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_FIRST_POSITION = 2  # axes 0 and 1 are samples and channels


def is_spatial(node: ir.Node) -> bool:
    """Whether `node` may keep channels apart; `is_flat_behind` says whether it does."""
    if is_op(node, "Conv"):
        return depthwise_channels(node) is not None
    return is_op(node, *_POOLS, *_CHECKS)


def is_flat_behind(node: ir.Node, lane: Lane, flat: Lane, *, is_flat: bool) -> bool:
    """Whether the output has only samples and features [N, C * positions] left.

    Args:
        node: A node for which `is_spatial` holds.
        lane: How channels lie in tensors with positions, on axis 1.
        flat: How features lie where none are left, on axis 1 of 2.
        is_flat: Whether the data operand is flat already.

    Raises:
        RefusedError: It mixes channels, or what it does is not known before it runs.
    """
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise RefusedError(f"{label(node)} ({node.op_type}): its second output is used")
    if any(attr.is_ref() for attr in node.attributes.values()):
        raise RefusedError(f"{label(node)} has an attribute set by the function's caller")
    if is_flat and not is_op(node, "Flatten", "Reshape"):
        raise _refused(node, "reads features that were flattened before")
    check = _CHECKS.get(node.op_type)
    return check(node, lane, flat) if check is not None else False


def _refused(node: ir.Node, fact: str) -> RefusedError:
    return RefusedError(f"{label(node)} ({node.op_type}) {fact}")


def _flatten(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    axis = attribute(node, "axis", 1)
    if axis not in (1, 1 - (lane.rank or 0)):
        raise _refused(node, f"has axis {axis}, not 1: it mixes samples and channels")
    return True


def _reshape(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    """To [N, features]: how many samples there are must be known to stay as it is."""
    target = constant_array(node.inputs[1])
    if target is None:
        raise _refused(node, "has a target that is computed at run time")
    if target.size != 2 or (attribute(node, "allowzero", 0) and not target.all()):
        raise _refused(node, f"to {target.tolist()} is no flattening of all but the samples")
    rows, columns = (int(size) for size in target)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    sizes = () if shape is None else tuple(shape)
    if columns in (-1, flat.channels):
        if rows == 0 or (rows > 0 and sizes[:1] == (rows,)):
            return True
        positions = [size for size in sizes[1:] if isinstance(size, int)]
        whole = sizes and len(positions) == len(sizes) - 1 and int(np.prod(positions)) == flat.channels
        if rows == -1 and whole:
            return True
    raise _refused(
        node, f"to {target.tolist()} may mix samples: its operand has the shape {list(sizes) or 'unknown'}"
    )


def _squeeze(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    axes = _axes(node, lane)
    if axes != _positions(lane):
        raise _refused(node, f"takes out axes {sorted(axes or ())}, not those of the positions")
    _check_single(node, lane, flat)
    return True


def _reduce(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    axes = _axes(node, lane)
    if not axes or not axes <= _positions(lane):
        raise _refused(node, f"reduces over axes {sorted(axes or ()) or 'unknown'}, not over positions only")
    if attribute(node, "keepdims", 1):
        return False
    if axes != _positions(lane):
        raise _refused(node, f"takes out axes {sorted(axes)}, not all those of the positions")
    _check_single(node, lane, flat)
    return True


def _check_single(node: ir.Node, lane: Lane, flat: Lane) -> None:
    if lane.channels != flat.channels:
        raise _refused(
            node, f"leaves {lane.channels} channels, of which {flat.channels} features cannot be read"
        )


def _pad(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    pads, rank = integers(node, 1, "pads"), lane.rank or 0
    if pads is None or any(value is not None and folded(value) is None for value in node.inputs[1:]):
        raise _refused(node, "pads by what is computed at run time")
    axes = integers(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(rank))
    if axes is None or len(pads) != 2 * len(axes):
        raise _refused(node, f"has {len(pads)} pads for axes {axes or 'unknown'}")
    if any(size and axis % rank < _FIRST_POSITION for axis, size in zip([*axes, *axes], pads, strict=True)):
        raise _refused(node, f"pads samples or channels: {pads}")
    return False


def _resize(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    """Only positions are scaled, and by factors or along axes that do not name the channels."""
    rank = lane.rank or 0
    axes = attribute(node, "axes", range(rank))
    untouched = all(axis % rank >= _FIRST_POSITION for axis in axes)
    if any(value is not None and folded(value) is None for value in node.inputs[1:]):
        raise _refused(node, "has a size that is computed at run time")
    if len(node.inputs) > 3 and node.inputs[3] is not None and not untouched:
        raise _refused(node, "names the number of channels in its target size")
    place = 1 if node.op_type == "Upsample" or len(node.inputs) == 2 else 2
    given = attribute(node, "scales", None)
    scales = constant_array(node.inputs[place]) if given is None and len(node.inputs) > place else given
    kept = scales is None or all(
        scale == 1 for axis, scale in zip(axes, scales, strict=False) if axis % rank < _FIRST_POSITION
    )
    if not kept or attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise _refused(node, "resizes samples or channels")
    return False


def _depthwise(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    groups = depthwise_channels(node)
    if groups != lane.channels:
        raise _refused(node, f"has {groups} groups for {lane.channels} channels")
    return False


def _instance_normalization(node: ir.Node, lane: Lane, flat: Lane) -> bool:
    if any(folded(value) is None for value in node.inputs[1:3]):
        raise _refused(node, "has scales that are no constants")
    return False


def _axes(node: ir.Node, lane: Lane) -> set[int] | None:
    axes, rank = integers(node, 1), lane.rank or 1
    return None if axes is None else {axis % rank for axis in axes}


def _positions(lane: Lane) -> set[int]:
    return set(range(_FIRST_POSITION, lane.rank or 0))


_CHECKS: dict[str, Callable[[ir.Node, Lane, Lane], bool]] = {
    "Conv": _depthwise,
    "Flatten": _flatten,
    "InstanceNormalization": _instance_normalization,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Squeeze": _squeeze,
    "Upsample": _resize,
    **dict.fromkeys(_REDUCTIONS, _reduce),
}
