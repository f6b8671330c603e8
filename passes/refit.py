# SPDX-License-Identifier: Apache-2.0
r"""refit: after lossy rewrites later projections bring the stream back to the original's (METHODS 5).

::

    h_out = h_in + a W + b,   W, b <- argmin |(h_ref - h_in) - (a W + b)|^2 + ridge |W - W_old|^2

h_in and a are what the rewritten model really computes, h_ref what the original had behind the same addition. A Linear
that adds to no stream, in a chain, is fitted to its own original output. Nothing is saved, nothing added: weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcollapse.calibration.leastsquares import RIDGES, LinearFit, relative_error, ridge_fit
from onnxcollapse.calibration.statistics import Gram, Ref, Request, Statistics
from onnxcollapse.model import Model, edit
from onnxcollapse.rewriting import Decline, Pass, Proposal
from onnxcollapse.structure import Linear, build_linear, hidden_layers, is_op, linears, operator_of
from onnxcollapse.structure.constants import constant, is_shared


@dataclass(frozen=True, eq=False)
class Projection:
    """A Linear whose output is added to a stream, or is the whole of what is to be restored.

    Attributes:
        linear: The Linear.
        stream: What its output is added to, or None.
        sum: The result of that addition, or None.
    """

    linear: Linear
    stream: ir.Value | None
    sum: ir.Value | None

    @property
    def name(self) -> str:
        """The Linear's name."""
        return self.linear.name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The Linear's nodes."""
        return self.linear.nodes


@dataclass(frozen=True)
class Refit(Pass):
    """Fits the projections behind lossy rewrites again, without saving anything.

    Attributes:
        least: Smallest share by which the squared held-out error at a projection has to fall.
    """

    name: ClassVar[str] = "refit"
    repairs: ClassVar[bool] = True
    least: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.least < 1.0:
            raise ValueError(f"least {self.least} must lie in [0, 1)")

    def sites(self, model: Model) -> Iterator[Projection | Decline]:
        """Finds Linears that write to a stream, and those that end a hidden layer."""
        ends = {layer.consumer.output for layer in hidden_layers(model.graph)[0]}
        for linear in linears(model.graph):
            site = _projection(linear)
            if site.sum is None and linear.output not in ends:
                continue
            shared = [
                value
                for value in (linear.weight, linear.bias)
                if value is not None and _shared(value, linear)
            ]
            if shared:
                yield Decline(site.name, f"others read {shared[0].name}, too, which would be stored twice")
            else:
                yield site

    def site(self, model: Model, name: str) -> Projection | None:
        """Finds one of them."""
        linear = operator_of(model.graph, name)
        return _projection(linear) if isinstance(linear, Linear) else None

    def requests(self, site: Projection) -> Sequence[Request]:
        """Asks for the Gram matrix of [a, target], and of the stream between them where there is one."""
        return [_gram(site)]

    def propose(self, site: Projection, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers the refit where it lowers the held-out error."""
        if statistics is None:
            yield Decline(site.name, "no statistics were collected")
            return
        fit, heldout = statistics.fit(_gram(site)), statistics.heldout(_gram(site))
        if site.stream is not None:
            fit, heldout = fit.difference(1, 2), heldout.difference(1, 2)
        if site.linear.bias is None:
            fit, heldout = fit.through_origin(), heldout.through_origin()
        matrix, offset = site.linear.matrix(), site.linear.offset()
        before = relative_error(heldout, 1, 2, matrix, offset)
        found = ridge_fit(fit, heldout, 1, 2, RIDGES, prior=matrix)
        if not found.error**2 < (1.0 - self.least) * before**2:
            yield Decline(site.name, f"a refit leaves the error at {before:.3g}")
            return
        detail = f"refitted: error {before:.3g} -> {found.error:.3g}, ridge {found.ridge:g}"
        yield Proposal(site.name, detail=detail, predicted_error=found.error, payload=found)

    def rewrite(self, model: Model, site: Projection, proposal: Proposal) -> None:
        """Puts new weights in the Linear's place; its output keeps the name."""
        found: LinearFit = proposal.payload
        linear = site.linear
        offset = found.offset if linear.bias is not None else None
        value = build_linear(model.graph, linear.nodes[-1], linear, linear.input, found.matrix, offset)
        edit.substitute(model, linear.output, value)


def _gram(site: Projection) -> Gram:
    linear = site.linear
    features = Ref(linear.input.name or "", axis=linear.axis)
    if site.stream is None or site.sum is None:
        return Gram((features,), (Ref(linear.name, "reference", linear.axis),))
    target = Ref(site.sum.name or "", "reference", linear.axis)
    return Gram((features,), (target, Ref(site.stream.name or "", axis=linear.axis)))


def _projection(linear: Linear) -> Projection:
    """Looks for the addition to a stream right behind a Linear."""
    readers = linear.output.consumers()
    node = readers[0] if len(readers) == 1 and not linear.output.is_graph_output() else None
    if node is None or not is_op(node, "Add"):
        return Projection(linear, None, None)
    others = [value for value in node.inputs if value is not linear.output]
    if len(others) != 1 or others[0] is None or constant(others[0]) is not None:
        return Projection(linear, None, None)
    known = [value.shape for value in (linear.output, others[0]) if value.shape is not None]
    if len(known) == 2 and known[0] != known[1]:
        return Projection(linear, None, None)  # repeated along an axis: it has no rows to subtract
    return Projection(linear, others[0], node.outputs[0])


def _shared(value: ir.Value, linear: Linear) -> bool:
    return is_shared(value, frozenset(linear.nodes))
