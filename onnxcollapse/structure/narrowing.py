# SPDX-License-Identifier: Apache-2.0
"""Cutting hidden channels: all tensors that hold something for each channel are cut together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.structure.building import build_convolution, build_linear
from onnxcollapse.structure.constants import Array, constant_array, folded, is_op
from onnxcollapse.structure.convolution import Convolution, Operator
from onnxcollapse.structure.feedforward import FeedForward
from onnxcollapse.structure.hidden import HiddenLayer, channel_operands, holds_vectors


def narrow(
    model: Model,
    site: HiddenLayer,
    keep: Array,
    matrix: Array,
    offset: Array,
    skip: tuple[Array, ...] | None = None,
) -> None:
    """Keep some hidden channels of a site and give its consumer new weights.

    ::

        y = region(sources(x)) W + b    ->    y = region(sources(x)[keep]) matrix + offset
        with a skip                     ->    y = [region(sources(x)[keep]), x] [matrix; skip] + offset

    The skip is no second product: x is joined to what the consumer reads, so that a neighbour whose input this is
    goes on reading one Linear.

    What is cut is copied bit for bit and what is shared stays as it is. The output keeps its name; tensors that lose
    channels get new ones, so a neighbour whose output is cut here is found under another name. Without a channel to
    keep only the skip is left or, where there is none, a silent channel that gives the output its shape.

    Args:
        model: The model.
        site: The site, found in the model as it is now.
        keep: The channels that stay, in order, each once.
        matrix: The consumer's new weights [len(keep) * group, d_out], rows channel-major as in `HiddenLayer.matrix`.
        offset: The consumer's new bias [d_out].
        skip: A matrix [d_in, d_out], or factors [d_in, r] and [r, d_out], of a linear path beside the site; only for
            FeedForward sites with input and output channels on one axis.

    Raises:
        ModelError: Channels, shapes or skip do not fit the site, or a weight overflows the element type.
    """
    keep = np.asarray(keep, np.intp)
    _check(site, keep, matrix, offset)
    graph, anchor = model.graph, site.consumer.nodes[-1]
    bias = offset if site.consumer.bias is not None or offset.any() else None
    block = None if skip is None else _checked_block(site, skip)
    if block is not None and skip is not None and not len(keep):
        value = _linear_path(graph, anchor, block, skip, bias)
    else:
        if not len(keep):
            keep, matrix = np.zeros(1, np.intp), np.zeros((site.group, site.d_out))
        features = _hidden(graph, anchor, site, keep)
        if block is not None and skip is not None:
            features = _joined(
                graph, anchor, features, _linear_path(graph, anchor, block, skip[:-1], None), site
            )
            matrix = np.concatenate([matrix, skip[-1]])
        value = _consumer(graph, anchor, site, features, matrix, bias)
    edit.substitute(model, site.output, value)


def _check(site: HiddenLayer, keep: Array, matrix: Array, offset: Array) -> None:
    inside = keep.ndim == 1 and (not keep.size or 0 <= keep[0] <= keep[-1] < site.width)
    if not inside or (np.diff(keep) <= 0).any():
        raise ModelError(f"{site.name}: name the channels to keep in order, each once, below {site.width}")
    wanted = (len(keep) * site.group, site.d_out)
    if matrix.shape != wanted or offset.shape != wanted[1:]:
        raise ModelError(
            f"{site.name}: {len(keep)} channels need a matrix {wanted} and an offset {wanted[1:]}, not "
            f"{matrix.shape} and {offset.shape}"
        )


def _checked_block(site: HiddenLayer, skip: Sequence[Array]) -> FeedForward:
    """The block that the skip goes beside."""
    block = site.block
    same = block is not None and block.up.dtype == block.down.dtype
    if block is None or site.input is None or site.in_axis != site.out_axis or not same:
        raise ModelError(
            f"{site.name}: a skip needs a feed-forward block with input and output channels on one axis and of "
            "one type; narrow it without"
        )
    shapes = [factor.shape for factor in skip]
    ends = [block.d_in, *(shape[-1] for shape in shapes if len(shape))]
    if len(shapes) not in (1, 2) or shapes != list(pairwise(ends)) or ends[-1] != block.d_out:
        raise ModelError(
            f"{site.name}: a skip of shapes {shapes} does not map {block.d_in} channels to {block.d_out}; give "
            "one matrix or two factors"
        )
    return block


def _linear_path(
    graph: ir.Graph, anchor: ir.Node, block: FeedForward, skip: Sequence[Array], bias: Array | None
) -> ir.Value:
    """The input times all factors, plus the bias after the last."""
    value = block.input
    for index, factor in enumerate(skip):
        offset = bias if index == len(skip) - 1 else None
        value = build_linear(graph, anchor, block.down, value, factor, offset)
    return value


def _joined(
    graph: ir.Graph, anchor: ir.Node, features: ir.Value, beside: ir.Value, site: HiddenLayer
) -> ir.Value:
    """Features with more of them behind, along the channels."""
    output = edit.like(features)
    if output.shape is not None:
        old = site.features.shape
        output.shape = None if old is None else old.copy()
        if output.shape is not None:
            sizes = [value.shape[site.out_axis] if value.shape else None for value in (features, beside)]
            total = sum(size for size in sizes if isinstance(size, int))
            output.shape[site.out_axis] = total if all(isinstance(size, int) for size in sizes) else None
    node = ir.Node("", "Concat", [features, beside], [ir.AttrInt64("axis", site.out_axis)], outputs=[output])
    edit.insert_before(graph, anchor, node)
    return output


def _consumer(
    graph: ir.Graph, anchor: ir.Node, site: HiddenLayer, features: ir.Value, matrix: Array, bias: Array | None
) -> ir.Value:
    like = site.consumer
    if isinstance(like, Convolution):
        return build_convolution(graph, anchor, like, features, matrix, bias)
    return build_linear(graph, anchor, like, features, matrix, bias)


def _hidden(graph: ir.Graph, anchor: ir.Node, site: HiddenLayer, keep: Array) -> ir.Value:
    """What the consumer reads, of the channels that stay."""
    cut = _Cut(graph, site, keep)
    for source in site.sources:
        cut.source(source)
    for node in site.region:
        cut.repeat(node)
    edit.insert_before(graph, anchor, cut.made)
    return cut.values[site.features]


class _Cut:
    """A site's nodes once more, with fewer channels.

    Attributes:
        made: New nodes, each after those it reads.
        values: New tensors by those that they stand for.
    """

    def __init__(self, graph: ir.Graph, site: HiddenLayer, keep: Array) -> None:
        self.made: list[ir.Node] = []
        self.values: dict[ir.Value, ir.Value] = {}
        self._graph, self._site, self._keep = graph, site, keep
        self._constants: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def source(self, source: Operator) -> None:
        """Cut a source's output channels; how it is spelled stays."""
        axis = 0 if isinstance(source, Convolution) or source.transposed else 1
        cut = {source.weight: self._taken(source.weight, axis, 1)}
        if source.bias is not None:
            cut[source.bias] = self._constant(source.bias, 1)
        for node in source.nodes:
            self._copy(node, [value if value is None else self._new(value, cut) for value in node.inputs])

    def repeat(self, node: ir.Node) -> None:
        """Repeat a node of the region; one that reads no channels stays."""
        per = self._per(node.outputs[0])
        axis = 0 if holds_vectors(node) else None
        cut = {value: self._constant(value, per, axis) for value in channel_operands(node)}
        operands = [value if value is None else self._new(value, cut) for value in node.inputs]
        if operands == list(node.inputs):
            return
        changed = {}
        if is_op(node, "Reshape"):
            operands[1] = self._target(node, per)
        if is_op(node, "Conv"):
            changed["group"] = len(self._keep)
        self._copy(node, operands, **changed)

    def _new(self, value: ir.Value, cut: dict[ir.Value, ir.Value]) -> ir.Value:
        return self.values[value] if value in self.values else cut.get(value, value)

    def _per(self, value: ir.Value) -> int:
        """How many entries of the channel axis a channel owns."""
        return self._site.consumer.in_features // self._site.width if value in self._site.flat else 1

    def _constant(self, value: ir.Value, per: int, axis: int | None = None) -> ir.Value:
        """A per-channel constant without the channels that go; one number for all channels stays as it is."""
        known = folded(value)
        varying = [i for i, dim in enumerate(known.shape) if dim != 1] if known is not None else []
        if axis is None and not varying:
            return value
        return self._taken(value, varying[0] if axis is None else axis, per)

    def _taken(self, value: ir.Value, axis: int, per: int) -> ir.Value:
        key = (value, axis, per)
        if key not in self._constants:
            known = folded(value)
            if known is None:
                raise ModelError(
                    f"{self._site.name}: {value.name} is no longer a constant; search the graph again after an edit"
                )
            entries = (self._keep[:, None] * per + np.arange(per)).reshape(-1)
            taken = known.take(entries, axis)
            self._constants[key] = edit.add_initializer(
                self._graph, value.name or "constant", taken, known.dtype
            )
        return self._constants[key]

    def _target(self, node: ir.Node, per: int) -> ir.Value | None:
        """A Reshape's target, new where it names the number of features."""
        old = constant_array(node.inputs[1])
        if old is None or old[1] == -1:
            return node.inputs[1]
        new = np.array([old[0], len(self._keep) * per])
        return edit.add_initializer(self._graph, f"{node.outputs[0].name}_shape", new, ir.DataType.INT64)

    def _copy(self, node: ir.Node, operands: Sequence[ir.Value | None], **changed: int) -> None:
        """A node like another, whose first output has fewer channels."""
        old = node.outputs[0]
        output = edit.like(old)
        output.name, output.shape = old.name, self._shape(old)
        attributes = [attr for name, attr in node.attributes.items() if name not in changed]
        attributes += [ir.AttrInt64(name, value) for name, value in changed.items()]
        new = ir.Node(
            node.domain,
            node.op_type,
            operands,
            attributes,
            overload=node.overload,
            outputs=[output],
            name=node.name,
        )
        new.doc_string = node.doc_string
        new.metadata_props.update(node.metadata_props)
        self.made.append(new)
        self.values[old] = output

    def _shape(self, old: ir.Value) -> ir.Shape | None:
        """The shape of a tensor without the channels that go; None where they are not seen to lie."""
        if old.shape is None:
            return None
        axis = 1 if old in self._site.flat else self._site.pre_axis
        shape, per = old.shape.copy(), self._per(old)
        if not -len(shape) <= axis < len(shape) or shape[axis] != self._site.width * per:
            return None
        shape[axis] = len(self._keep) * per
        return shape
