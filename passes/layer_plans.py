# SPDX-License-Identifier: Apache-2.0
"""How a span of layers goes, and the edits that this takes; `collapse_layers` says which and why."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.statistics import Cosine, Cross, Gram, Moments, Ref, Request
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, weights
from onnxcollapse.structure import Linear, build_linear, folded, operator_of
from onnxcollapse.structure.dominators import skip_bias
from onnxcollapse.structure.spans import skip_norm

Merge = Literal["fit", "drop", "fold", "rdsc", "last", "mean"]


@dataclass(frozen=True)
class Plan:
    """How one span goes, by names, which mean the same in every copy of the graph.

    Attributes:
        merge: How.
        start: Tensor that the stream is before what is taken away.
        end: Tensor that the stream is behind it.
        removed: Tensors that the nodes taken away or changed compute.
        gone: Those of the nodes taken away.
        features: Tensor that the fit reads, or None.
        like: Output of the Linear that the map is spelled like, or that it is folded into; None without a map.
        axis: Channel axis of the stream.
        weights: For merges of weights: a list for each weight of the layer that stays, its own name first.
        params: Parameters of what is taken away.
        layers: Whole layers that these are; 0 for a part of one.
        fit: Matrices and offset of the map, when fitted.
    """

    merge: Merge
    start: str
    end: str
    removed: frozenset[str]
    gone: frozenset[str]
    features: str | None = None
    like: str | None = None
    axis: int = -1
    weights: tuple[tuple[str, ...], ...] = ()
    params: int = 0
    layers: int = 0
    fit: tuple[tuple[ir.TensorProtocol, ...], np.ndarray] | None = None

    @property
    def behind(self) -> Ref:
        """The stream behind it, as the original has it."""
        return Ref(self.end, "reference", self.axis)

    @property
    def alike(self) -> Cosine:
        """How alike its ends are."""
        return Cosine(Ref(self.start, axis=self.axis), self.behind)

    @property
    def gram(self) -> Gram:
        """Sums of what the fit reads."""
        return Gram((Ref(self.features or "", axis=self.axis),))

    @property
    def cross(self) -> Cross:
        """Its products with what the stream gains."""
        return Cross(self.gram.features[0], replace(self.behind, minus=self.start))

    def requests(self) -> list[Request]:
        """The statistics of its fit, or of how alike its ends are."""
        return [self.alike] if self.features is None else [self.gram, self.cross, Moments(self.behind)]


def merge_weights(model: Model, plan: Plan, group: Sequence[ir.Value]) -> None:
    """theta* of METHODS 4 for one weight: of the layer that stays first."""
    arrays = []
    for value in group:
        known = folded(value)
        if known is None:
            raise ModelError(f"weight '{value.name}' is no constant any more; search the graph again")
        arrays.append(known.wide())
    first = arrays[0]
    if plan.merge == "rdsc":
        merged = first + sum(array - first for array in arrays[1:])
    else:
        merged = arrays[-1] if plan.merge == "last" else sum(arrays) / len(arrays)
    dtype = group[0].dtype or folded(group[0]).dtype  # type: ignore[union-attr]
    new = edit.add_initializer(model.graph, f"{group[0].name}_merged", np.asarray(merged), dtype)
    for node, index in group[0].uses():
        if any(value.name in plan.removed for value in node.outputs):
            node.replace_input_with(index, new)


def fold_into(model: Model, plan: Plan) -> None:
    """W_down <- W_down (I + A'), and its bias likewise (arXiv 2505.02819)."""
    down = operator_of(model.graph, plan.like or "")
    if not isinstance(down, Linear) or plan.fit is None:
        raise ModelError(
            f"the Linear '{plan.like}' that a map is folded into is gone; an earlier rewrite took it"
        )
    step = np.eye(down.out_features) + functools.reduce(np.matmul, map(weights.array, plan.fit[0]))
    offset = None if down.bias is None else down.offset() @ step
    value = build_linear(model.graph, down.nodes[-1], down, down.input, down.matrix() @ step, offset)
    edit.substitute(model, down.output, value)


def mapped(model: Model, plan: Plan, end: ir.Value, values: Mapping[str, ir.Value]) -> ir.Value:
    """The map of what the features are, x W + b, right before what makes `end`."""
    like, value, maker = (
        operator_of(model.graph, plan.like or ""),
        values.get(plan.features or ""),
        end.producer(),
    )
    if not isinstance(like, Linear) or value is None or plan.fit is None or maker is None:
        raise ModelError(f"'{plan.features}', which a map reads, is gone; an earlier rewrite took it")
    matrices, offset = plan.fit
    for index, matrix in enumerate(matrices):
        last = index == len(matrices) - 1
        value = build_linear(model.graph, maker, like, value, weights.array(matrix), offset if last else None)
    return value


def pass_by(model: Model, start: ir.Value, end: ir.Value, gain: ir.Value | None) -> None:
    """Lets the stream at `end` be that at `start`, plus a gain where there is one; `end` keeps its name.

    Without a gain that is an Identity, which the exact stage takes away in the end. A skip norm that makes `end` goes
    on doing so from other summands.
    """
    maker = end.producer()
    if maker is None:
        raise ModelError(f"'{end.name}' is no longer computed; an earlier rewrite took it")
    fused = skip_norm(end)
    if fused is not None:
        _sum_in(fused, start, gain)
        return
    kind, operands = ("Identity", [start]) if gain is None else ("Add", [start, gain])
    value = edit.like(end)
    node = ir.Node("", kind, operands, outputs=[value], name=f"{end.name}_{kind}")
    edit.insert_before(model.graph, maker, node)
    edit.substitute(model, end, value)


def _sum_in(fused: ir.Node, start: ir.Value, gain: ir.Value | None) -> None:
    """Gives a skip norm other summands: the stream and a gain, or what the stream was summed of."""
    bias = skip_bias(fused)  # the place behind data, skip and the norm's own operands
    before = skip_norm(start)
    if gain is not None:
        summands: list[ir.Value | None] = [start, gain, None]
    elif before is not None:
        at = skip_bias(before)
        summands = [*before.inputs[:2], before.inputs[at] if len(before.inputs) > at else None]
    else:
        raise ModelError(f"'{start.name}' is no sum that {fused.op_type} could form again; leave that layer")
    fused.replace_input_with(0, summands[0])
    fused.replace_input_with(1, summands[1])
    if len(fused.inputs) > bias:
        fused.replace_input_with(bias, summands[2])
    elif summands[2] is not None:
        fused.resize_inputs(bias + 1)
        fused.replace_input_with(bias, summands[2])
