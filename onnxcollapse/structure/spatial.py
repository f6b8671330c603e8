# SPDX-License-Identifier: Apache-2.0
"""Nodes that move or pool positions but keep each channel of [N, C, positions...] to itself, and flatten at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.structure.constants import attribute, constant_array, folded, integers, is_op
from onnxcollapse.structure.convolution import depthwise_channels
from onnxcollapse.structure.pointwise import Lane
from onnxcollapse.structure.refusal import RefusedError, label

_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_FIRST_POSITION = 2  # axes 0 and 1 are samples and channels


Size = int | str | None


@dataclass(frozen=True)
class Frame:
    """How channels lie in the tensors of a region.

    Attributes:
        lane: Channels, on axis 1, where there are positions.
        flat: Features, on axis 1 of 2, where none are left.
        samples: Length of axis 0 in the region: a number, a symbol or unknown.
        read: Length of axis 0 of what the consumer yields.
    """

    lane: Lane
    flat: Lane
    samples: Size
    read: Size


def first_size(value: ir.Value | None) -> Size:
    """The declared length of axis 0."""
    if value is None or not value.shape:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else size.value


def is_spatial(node: ir.Node) -> bool:
    """Whether `node` may keep channels apart; `is_flat_behind` says whether it does."""
    if is_op(node, "Conv"):
        return depthwise_channels(node) is not None
    return is_op(node, *_POOLS, *_CHECKS)


def is_flat_behind(node: ir.Node, frame: Frame, *, is_flat: bool) -> bool:
    """Whether the output has only samples and features [N, C * positions] left.

    Args:
        node: A node for which `is_spatial` holds.
        frame: How channels lie.
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
    return check(node, frame) if check is not None else False


def _refused(node: ir.Node, fact: str) -> RefusedError:
    return RefusedError(f"{label(node)} ({node.op_type}) {fact}")


def _flatten(node: ir.Node, frame: Frame) -> bool:
    axis = attribute(node, "axis", 1)
    if axis not in (1, 1 - (frame.lane.rank or 0)):
        raise _refused(node, f"has axis {axis}, not 1: it mixes samples and channels")
    return True


def _reshape(node: ir.Node, frame: Frame) -> bool:
    """To [N, features]: how many samples there are must be known to stay as it is."""
    target = constant_array(node.inputs[1])
    if target is None:
        raise _refused(node, "has a target that is computed at run time")
    if target.size != 2 or (attribute(node, "allowzero", 0) and not target.all()):
        raise _refused(node, f"to {target.tolist()} is no flattening of all but the samples")
    rows, columns = (int(size) for size in target)
    named = columns in (-1, frame.flat.channels)
    stays = rows == 0 or (rows > 0 and rows == frame.samples)
    if not (named and (stays or (rows == -1 and _keeps_samples(node, frame)))):
        raise _refused(
            node, f"to {target.tolist()} may mix samples, of which there are {frame.samples or 'any'}"
        )
    return True


def _keeps_samples(node: ir.Node, frame: Frame) -> bool:
    """Whether declared shapes prove that a Reshape to [-1, features] leaves as many samples as there were."""
    made = first_size(node.outputs[0]), frame.read
    if frame.samples is not None and frame.samples in made:
        return True
    data = node.inputs[0]
    sizes = [] if data is None or data.shape is None else list(data.shape)[1:]
    known = [size for size in sizes if isinstance(size, int)]
    return bool(sizes) and len(known) == len(sizes) and math.prod(known) == frame.flat.channels


def _squeeze(node: ir.Node, frame: Frame) -> bool:
    axes = _axes(node, frame)
    if axes != _positions(frame):
        raise _refused(node, f"takes out axes {sorted(axes or ())}, not those of the positions")
    _check_single(node, frame)
    return True


def _reduce(node: ir.Node, frame: Frame) -> bool:
    axes = _axes(node, frame)
    if not axes or not axes <= _positions(frame):
        raise _refused(node, f"reduces over axes {sorted(axes or ()) or 'unknown'}, not over positions only")
    if attribute(node, "keepdims", 1):
        return False
    if axes != _positions(frame):
        raise _refused(node, f"takes out axes {sorted(axes)}, not all those of the positions")
    _check_single(node, frame)
    return True


def _check_single(node: ir.Node, frame: Frame) -> None:
    if frame.lane.channels != frame.flat.channels:
        raise _refused(
            node,
            f"leaves {frame.lane.channels} channels, of which {frame.flat.channels} features cannot be read",
        )


def _pad(node: ir.Node, frame: Frame) -> bool:
    pads, rank = integers(node, 1, "pads"), frame.lane.rank or 0
    if pads is None or any(value is not None and folded(value) is None for value in node.inputs[1:]):
        raise _refused(node, "pads by what is computed at run time")
    axes = integers(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(rank))
    if axes is None or len(pads) != 2 * len(axes):
        raise _refused(node, f"has {len(pads)} pads for axes {axes or 'unknown'}")
    if any(size and axis % rank < _FIRST_POSITION for axis, size in zip([*axes, *axes], pads, strict=True)):
        raise _refused(node, f"pads samples or channels: {pads}")
    return False


def _resize(node: ir.Node, frame: Frame) -> bool:
    """Only positions are scaled, and by factors or along axes that do not name the channels."""
    rank = frame.lane.rank or 0
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


def _depthwise(node: ir.Node, frame: Frame) -> bool:
    groups = depthwise_channels(node)
    if groups != frame.lane.channels:
        raise _refused(node, f"has {groups} groups for {frame.lane.channels} channels")
    return False


def _instance_normalization(node: ir.Node, frame: Frame) -> bool:
    if any(folded(value) is None for value in node.inputs[1:3]):
        raise _refused(node, "has scales that are no constants")
    return False


def _axes(node: ir.Node, frame: Frame) -> set[int] | None:
    axes, rank = integers(node, 1), frame.lane.rank or 1
    return None if axes is None else {axis % rank for axis in axes}


def _positions(frame: Frame) -> set[int]:
    return set(range(_FIRST_POSITION, frame.lane.rank or 0))


_CHECKS: dict[str, Callable[[ir.Node, Frame], bool]] = {
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
