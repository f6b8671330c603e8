# SPDX-License-Identifier: Apache-2.0
"""fold-affine: what multiplies and adds by constants moves into the Linear or Conv beside it.

::

    x -- Linear(W, b) -- * g + s -- y     becomes     x -- Linear(W diag(g), b g + s) -- y
    x -- * g + s -- Linear(W, b) -- y     becomes     x -- Linear(diag(g) W, b + s W) -- y
    x -- Linear(W1, b1) -- Linear(W2, b2) -- y   becomes   x -- Linear(W1 W2, b1 W2 + b2) -- y   where that is smaller
    x -- * 1 + 0 -- y                     becomes     x

``* g + s`` is any operator that `structure.affine_of` reads, BatchNormalization and PRelu with slope 1 among them; for
the first form the Linear may be a Conv of any kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.model import Model, edit
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import (
    Affine,
    Linear,
    affine_of,
    build_linear,
    constant_array,
    folded,
    is_elementwise,
    is_shared,
    keeps_layout,
    linears,
)


@dataclass(frozen=True, eq=False)
class Fold:
    """One place where something folds.

    Attributes:
        output: What is computed anew; its name is the site's.
        nodes: Those that go.
        detail: In words.
        saving: Parameters and nodes saved.
        write: Puts the new form in place.
    """

    output: ir.Value
    nodes: tuple[ir.Node, ...]
    detail: str
    saving: Saving
    write: Callable[[Model], None]

    @property
    def name(self) -> str:
        """The output's name."""
        return self.output.name or ""


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Folds affine operators into neighbouring Linears and Convs, and chains of Linears where that is smaller."""

    name: ClassVar[str] = "fold-affine"

    @property
    def exact(self) -> bool:
        """Equal but for the rounding of weights that are multiplied beforehand."""
        return True

    def sites(self, model: Model) -> Iterator[Fold | Decline]:
        """Looks at every affine operator and at every pair of Linears, in graph order."""
        found = linears(model.graph)
        by_output = {linear.output: linear for linear in found}
        by_node = {linear.node: linear for linear in found}
        inner = {node for linear in found if linear.bias_node is not None for node in (linear.bias_node,)}
        for node in model.graph:
            affine = None if node in inner or node.op_type == "Identity" else affine_of(node)
            if affine is not None and np.isfinite(affine.scale + affine.shift).all():
                yield from _around(affine, by_output, by_node)
        for linear in found:
            before = by_output.get(linear.input)
            if before is not None and _private(before.output):
                yield _chain(before, linear)

    def propose(self, site: Fold, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes the fold."""
        yield Proposal(site.name, detail=site.detail, saving=site.saving)

    def rewrite(self, model: Model, site: Fold, proposal: Proposal) -> None:
        """Folds."""
        site.write(model)


def _private(value: ir.Value) -> bool:
    """Whether exactly one node reads a value and the outside does not."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _around(
    affine: Affine, by_output: dict[ir.Value, Linear], by_node: dict[ir.Node, Linear]
) -> Iterator[Fold | Decline]:
    """Tries the forms for one affine operator, the cheapest to apply first."""
    if np.all(affine.scale == 1.0) and np.all(affine.shift == 0.0):
        if not affine.output.is_graph_output() and keeps_layout(affine):
            yield _bypass(affine)
        return
    before = by_output.get(affine.input)
    if before is not None and _private(before.output) and _along(affine, before):
        yield _unless_shared([before], affine, lambda: _after_linear(before, affine))
        return
    producer = affine.input.producer()
    if producer is not None and _is_conv(producer) and _private(affine.input):
        yield from _after_conv(producer, affine)
        return
    readers = [] if _in_expression(affine) or not _keeps_input(affine, before) else _readers(affine, by_node)
    if readers:
        yield _unless_shared(readers, affine, lambda: _before_linears(affine, readers))


def _in_expression(affine: Affine) -> bool:
    """Whether an operator ends a longer elementwise expression: the 0.5 of a GELU, the scale of a norm.

    Runtimes fuse such expressions as a whole when they find them whole; taking a part away costs more than it saves.
    """
    producer = affine.input.producer()
    return producer is not None and is_elementwise(producer)


def _keeps_input(affine: Affine, before: Linear | None) -> bool:
    """Whether y surely has the shape of x: what reads y tells the length of its channels, not that of x's."""
    same_axis = before is not None and affine.axis is not None and _along(affine, before)
    return same_axis or keeps_layout(affine)


def _along(affine: Affine, linear: Linear) -> bool:
    """Whether the operator acts on each of the channels between it and a Linear, and on nothing else."""
    channels = linear.out_features if affine.input is linear.output else linear.in_features
    if not keeps_layout(affine, channels):
        return False
    if affine.axis is None or affine.axis == linear.axis:
        return True
    return linear.rank is not None and affine.axis % linear.rank == linear.axis % linear.rank


def _unless_shared(folded: list[Linear], affine: Affine, make: Callable[[], Fold]) -> Fold | Decline:
    for linear in folded:
        if is_shared(linear.weight, frozenset(linear.nodes)):
            return Decline(
                affine.output.name or "", f"weight '{linear.weight.name}' is shared; folding would copy it"
            )
    return make()


def _bypass(affine: Affine) -> Fold:
    def write(model: Model) -> None:
        edit.replace_value(model.graph, affine.output, affine.input)

    detail = f"{affine.node.op_type} changes nothing"
    return Fold(affine.output, (affine.node,), detail, _removed(affine.node), write)


def _removed(node: ir.Node) -> Saving:
    """What goes with a node: itself and the constants that nobody else reads."""
    known = [folded(value) for value in node.inputs if value is not None and not is_shared(value, {node})]
    sizes = [(constant.size, constant.dtype) for constant in known if constant is not None]
    return Saving(
        params=sum(size for size, _ in sizes),
        bytes=sum(size * dtype.bitwidth // 8 for size, dtype in sizes),
        nodes=1,
    )


def _longer_bias(linear: Linear, biased: bool) -> Saving:
    """What a bias of full length costs beside the one there is: none, one number for all, or one that others read."""
    old = None if linear.bias is None or is_shared(linear.bias, set(linear.nodes)) else folded(linear.bias)
    gone = 0 if old is None else old.size
    return _params((linear.out_features if biased else 0) - gone, linear.dtype)


def _params(count: int, dtype: ir.DataType) -> Saving:
    """So many parameters of a type."""
    return Saving(params=count, bytes=count * dtype.bitwidth // 8)


def _after_linear(linear: Linear, affine: Affine) -> Fold:
    scale, shift = affine.scale, affine.shift
    biased = linear.bias is not None or bool(np.any(shift != 0.0))

    def write(model: Model) -> None:
        offset = linear.offset() * scale + shift
        matrix = linear.matrix() * scale
        value = build_linear(
            model.graph, affine.node, linear, linear.input, matrix, offset if biased else None
        )
        edit.substitute(model, affine.output, value)

    saving = _removed(affine.node) - _longer_bias(linear, biased)
    detail = f"{affine.node.op_type} folded into the Linear before it"
    return Fold(affine.output, (*linear.nodes, affine.node), detail, saving, write)


def _readers(affine: Affine, by_node: dict[ir.Node, Linear]) -> list[Linear]:
    """Returns the Linears that read the operator's output along its axis, if nothing else does."""
    if affine.output.is_graph_output():
        return []
    found = []
    for node, _ in affine.output.uses():
        linear = by_node.get(node)
        if linear is None or linear.input is not affine.output or not _along(affine, linear):
            return []
        found.append(linear)
    return found


def _before_linears(affine: Affine, readers: list[Linear]) -> Fold:
    shifts = bool(np.any(affine.shift != 0.0))

    def write(model: Model) -> None:
        for linear in readers:
            plain = linear.matrix()
            wide = np.broadcast_to(affine.scale, (linear.in_features,))
            shift = np.broadcast_to(affine.shift, (linear.in_features,))
            offset = linear.offset() + shift @ plain if linear.bias is not None or shifts else None
            anchor = linear.nodes[-1]
            value = build_linear(model.graph, anchor, linear, affine.input, wide[:, None] * plain, offset)
            edit.substitute(model, linear.output, value)

    nodes = (affine.node, *(node for linear in readers for node in linear.nodes))
    detail = f"{affine.node.op_type} folded into the {len(readers)} Linear(s) after it"
    saving = _removed(affine.node)
    for linear in readers:
        saving = saving - _longer_bias(linear, linear.bias is not None or shifts)
    return Fold(readers[0].output, nodes, detail, saving, write)


def _chain(first: Linear, second: Linear) -> Fold | Decline:
    p, h, q = first.in_features, first.out_features, second.out_features
    before, after = h * (p + q), p * q
    if after >= before:
        reason = f"two Linears {p} -> {h} -> {q} hold {before:,} weights, one {p} x {q} map {after:,}: does not pay"
        return Decline(second.name, reason)
    if first.axis != second.axis:
        return Decline(second.name, f"'{first.name}' has its channels on another axis")
    shared = next((linear for linear in (first, second) if is_shared(linear.weight, set(linear.nodes))), None)
    if shared is not None:
        return Decline(
            second.name, f"weight '{shared.weight.name}' is shared; it would stay beside the new map"
        )

    def write(model: Model) -> None:
        matrix = second.matrix()
        offset = first.offset() @ matrix + second.offset()
        anchor = second.nodes[-1]
        value = build_linear(
            model.graph, anchor, second, first.input, first.matrix() @ matrix, offset if biased else None
        )
        edit.substitute(model, second.output, value)

    biased = first.bias is not None or second.bias is not None
    owners = {*first.nodes, *second.nodes}
    freed = {
        known.root: known.size
        for value in (first.weight, first.bias, second.weight, second.bias)
        if value is not None and not is_shared(value, owners) and (known := folded(value)) is not None
    }
    saved = _params(sum(freed.values()) - after - (q if biased else 0), second.dtype)
    saving = replace(saved, nodes=len(first.nodes))
    detail = f"Linears {p} -> {h} -> {q} become one {p} x {q} map"
    return Fold(second.output, (*first.nodes, *second.nodes), detail, saving, write)


# Convs of any kernel: only their output channels are scaled, so kernel, groups and padding do not matter.


def _is_conv(node: ir.Node) -> bool:
    return node.op_type == "Conv" and node.domain == ""


def _plain_array(value: ir.Value | None) -> np.ndarray | None:
    """A constant stored in the type it is read in; folding would store one that a Cast unpacks at length."""
    known = folded(value)
    return known.load() if known is not None and known.storage == known.dtype else None


def _after_conv(conv: ir.Node, affine: Affine) -> Iterator[Fold | Decline]:
    weight_value = conv.inputs[1]
    weight = _plain_array(weight_value)
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = constant_array(bias_value)
    if weight is None or weight_value is None or (bias_value is not None and bias is None):
        return
    if not keeps_layout(affine, weight.shape[0]) or (
        affine.axis not in (None, 1) and affine.axis != 1 - weight.ndim
    ):
        return
    if is_shared(weight_value, frozenset((conv,))):
        yield Decline(affine.output.name or "", "the Conv's weight is shared; folding would copy it")
        return
    channels = weight.shape[0]
    dtype = ir.DataType.from_numpy(weight.dtype)
    scale = np.broadcast_to(affine.scale, (channels,))
    biased = bias is not None or bool(np.any(affine.shift != 0.0))

    def write(model: Model) -> None:
        graph, hint = model.graph, affine.output.name or "conv"
        wide = weight.astype(np.float64) * scale.reshape(-1, *[1] * (weight.ndim - 1))
        offset = (0.0 if bias is None else bias.astype(np.float64)) * scale + affine.shift
        operands = [conv.inputs[0], edit.add_initializer(graph, f"{hint}_weight", wide, dtype)]
        if biased:
            operands.append(edit.add_initializer(graph, f"{hint}_bias", offset, dtype))
        attributes, output = list(conv.attributes.values()), edit.like(affine.output)
        made = ir.Node("", "Conv", operands, attributes, outputs=[output], name=f"{hint}_Conv")
        edit.insert_before(graph, affine.node, [made])
        edit.substitute(model, affine.output, made.outputs[0])

    added = channels if biased and bias is None else 0
    saving = _removed(affine.node) - _params(added, dtype)
    detail = f"{affine.node.op_type} folded into the Conv before it"
    yield Fold(affine.output, (conv, affine.node), detail, saving, write)
