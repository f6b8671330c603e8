# SPDX-License-Identifier: Apache-2.0
"""unflatten-linear: a Linear on flattened tokens becomes one on tokens; the function stays but for rounding.

::

    x [B, S, d] -- Reshape [-1, d] -- Gemm W, b -- Reshape [B, S, h] -- y      becomes      x -- MatMul W -- Add b -- y

So exporters write torch's `addmm`, which the Conv1D of GPT-2 and its like is made of. Behind it blocks have their usual
form, and the nodes that compute both shapes have nothing to do. Inputs have to have tokens: to Reshape 0 is no size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import folded
from onnxcollapse.structure.sizes import ShapeReader

BROADCASTS = 7
"""The first opset whose Add broadcasts by itself."""


@dataclass(frozen=True, eq=False)
class Flattened:
    """A Gemm between two Reshapes.

    Attributes:
        first: The Reshape before it.
        gemm: The Gemm.
        last: The Reshape behind it.
    """

    first: ir.Node
    gemm: ir.Node
    last: ir.Node

    @property
    def name(self) -> str:
        """What it computes."""
        return self.last.outputs[0].name or ""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Those that go; the first Reshape may have other readers."""
        return self.gemm, self.last


@dataclass(frozen=True)
class UnflattenLinear(Pass):
    """Lets Linears read tokens as they are where both Reshapes around them only flatten these and undo it."""

    name: ClassVar[str] = "unflatten-linear"

    @property
    def exact(self) -> bool:
        """Each token is multiplied by the same weights."""
        return True

    def sites(self, model: Model) -> Iterator[Flattened | Decline]:
        """Finds Gemms between Reshapes, and reads from their shapes what they do."""
        found = [site for node in model.graph if (site := _flattened(node)) is not None]
        if not found or model.ir.opset_imports.get("", BROADCASTS) < BROADCASTS:
            return
        reader = ShapeReader(model)
        for site in found:
            reason = _objection(site, reader)
            yield site if reason is None else Decline(site.name, reason)

    def site(self, model: Model, name: str) -> Flattened | None:
        """Finds what `sites` has found before: other rewrites leave the shapes of tensors as they are."""
        found = (_flattened(node) for node in model.graph)
        return next((site for site in found if site is not None and site.name == name), None)

    def propose(self, site: Flattened, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes to do without the Reshapes."""
        yield Proposal(site.name, detail="reads tokens as they are", saving=Saving(nodes=1))

    def rewrite(self, model: Model, site: Flattened, proposal: Proposal) -> None:
        """Multiplies the tokens themselves."""
        source, output = site.first.inputs[0], site.last.outputs[0]
        weight, *rest = site.gemm.inputs[1:]
        nodes = [
            ir.Node("", "MatMul", [source, _upright(model, site.gemm, weight)], outputs=[edit.like(output)])
        ]
        bias = rest[0] if rest else None
        if bias is not None:
            nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], outputs=[edit.like(output)]))
        for node in nodes:
            node.name = f"{output.name}_{node.op_type}"
        edit.insert_before(model.graph, site.gemm, nodes)
        edit.substitute(model, output, nodes[-1].outputs[0])


def _upright(model: Model, gemm: ir.Node, weight: ir.Value | None) -> ir.Value | None:
    """The weight as [in, out]."""
    if not _number(gemm, "transB", 0):
        return weight
    known = folded(weight)
    if known is None or weight is None:
        raise ModelError("the weight of a transposed Gemm is no constant")
    return edit.add_initializer(model.graph, f"{weight.name}_transposed", known.load().T, known.dtype)


def _flattened(node: ir.Node) -> Flattened | None:
    """The Gemm that a node is, where it lies between two Reshapes of which nobody else reads the second's input."""
    if (node.domain, node.op_type) != ("", "Gemm") or node.inputs[0] is None:
        return None
    first, [output] = node.inputs[0].producer(), node.outputs
    uses = output.uses()
    if first is None or len(uses) != 1 or output.is_graph_output():
        return None
    [(last, place)] = uses
    pair = {(one.domain, one.op_type, len(one.inputs)) for one in (first, last)}
    inside = last.graph is node.graph  # and not in a branch, where names are others'
    return Flattened(first, node, last) if pair == {("", "Reshape", 2)} and place == 0 and inside else None


def _objection(site: Flattened, reader: ShapeReader) -> str | None:
    """Why a Gemm has to read flattened tokens, or None."""
    gemm, source = site.gemm, site.first.inputs[0]
    plain = _number(gemm, "alpha", 1.0) == _number(gemm, "beta", 1.0) == 1.0 and not _number(
        gemm, "transA", 0
    )
    weight, *rest = gemm.inputs[1:]
    known, bias = folded(weight), folded(rest[0]) if rest and rest[0] is not None else None
    if not plain or known is None or (rest and rest[0] is not None and bias is None):
        return "its Gemm has factors, or weights that are no constants"
    if bias is not None and any(size != 1 for size in bias.shape[:-1]):
        return "its bias is another one for each flattened token"
    transposed = bool(_number(gemm, "transB", 0))
    if transposed and weight is not None and len(weight.uses()) > 1:
        return f"others read '{weight.name}' as it is, too, which would be stored twice"
    d_in, d_out = known.shape[::-1] if transposed else known.shape
    shape = None if source is None else reader.shape(source)
    if source is None or shape is None:
        return "the rank of what is flattened cannot be inferred"
    if not shape:
        return "what is flattened is one number"
    if bias is not None and len(bias.shape) > len(shape):
        return "its bias has more axes than what is flattened"
    flat, whole = reader.read(site.first.inputs[1]), reader.read(site.last.inputs[1])
    if flat is None or len(flat) != 2 or flat[0] != -1 or flat[1] not in (d_in, shape[-1]) or 0 in flat:
        return "the Reshape before it does not flatten the leading axes alone"
    if d_in != shape[-1] != flat[1]:
        return "the last axis of what is flattened is not known to be the Linear's input: heads may be merged"
    if whole is None or len(whole) != len(shape) or 0 in whole or not _restores(whole, shape[:-1], d_out):
        return "the Reshape behind it does not restore the leading axes"
    return None


def _restores(whole: Sequence[object], before: Sequence[object], d_out: int) -> bool:
    """Whether a shape is the leading axes and the output's; one of them may be left to be counted."""
    wrong = [size for size, wanted in zip(whole, [*before, d_out], strict=True) if size != wanted]
    return not wrong or wrong == [-1]


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(np.asarray(attribute.value))
