# SPDX-License-Identifier: Apache-2.0
"""cleanup: dead nodes, identities and duplicated computations go; the function stays bit for bit.

::

    x -- Identity -- a -- f          x -- f
    x -- g -- b -- h         becomes      |
    x -- g -- c -- k                 x -- g -- h, k
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.model import Model, edit, size, walk
from onnxcollapse.rewriting import Decline, GraphSite, Pass, Proposal, Saving


@dataclass(frozen=True)
class Cleanup(Pass):
    """Removes what has no effect or is computed twice."""

    name: ClassVar[str] = "cleanup"

    @property
    def exact(self) -> bool:
        """Removing what has no effect has none."""
        return True

    def sites(self, model: Model) -> Iterator[GraphSite | Decline]:
        """Offers the graph when a dry run on a copy takes something away."""
        trial = model.alone().clone()
        _clean(trial)
        before, after = size(model), size(trial)
        saving = Saving(
            params=before.params - after.params,
            bytes=before.bytes - after.bytes,
            nodes=before.nodes - after.nodes,
        )
        if saving.objection() is None:
            yield GraphSite(saving=saving)

    def propose(self, site: GraphSite, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes what the dry run took away."""
        yield Proposal(
            site.name, detail=f"{site.saving.nodes} nodes without effect removed", saving=site.saving
        )

    def rewrite(self, model: Model, site: GraphSite, proposal: Proposal) -> None:
        """Cleans the model."""
        _clean(model)


RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators whose two equal calls need not give equal results."""

UNHASHABLE = frozenset(
    {
        ir.AttributeType.TENSORS,
        ir.AttributeType.SPARSE_TENSORS,
        ir.AttributeType.TYPE_PROTO,
        ir.AttributeType.TYPE_PROTOS,
    }
)
"""Attributes that the library's elimination (onnx_ir 1.1) fails on."""


def _clean(model: Model) -> None:
    for root in (model.graph, *(function.graph for function in model.ir.functions.values())):
        for graph in list(walk.nested(root)):
            for node in list(graph):
                if node.op_type == "Identity" and node.domain == "":
                    _bypass(root, graph, node)
    if all(_is_comparable(node) for graph in walk.graphs(model.ir) for node in graph):
        _merge_duplicates(model)
    edit.prune(model)


def _is_comparable(node: ir.Node) -> bool:
    """Whether the library's elimination can tell what the node computes from its operands and attributes."""
    kinds = {attribute.type for attribute in node.attributes.values()}
    return node.op_type not in RANDOM and not kinds & UNHASHABLE


def _merge_duplicates(model: Model) -> None:
    """Runs the library's pass, which lets a graph output take type and shape of the tensor that it merges with."""
    declared = [
        (value.type, value.shape, value.doc_string, dict(value.metadata_props))
        for value in model.graph.outputs
    ]
    common.CommonSubexpressionEliminationPass()(model.ir)
    for value, (kind, shape, doc_string, metadata) in zip(model.graph.outputs, declared, strict=True):
        value.type, value.shape, value.doc_string = kind, shape, doc_string
        value.metadata_props.update(metadata)


def _bypass(root: ir.Graph, graph: ir.Graph, node: ir.Node) -> None:
    """Lets the users of an Identity read its input.

    An Identity that produces a graph output stays where its input is no tensor that this graph computes for itself
    alone: a graph input, an initializer, another output or a tensor of an outer graph. (The library's pass
    renames or copies shapes onto those, which changes the signature.)
    """
    source, copy = node.inputs[0], node.outputs[0]
    if source is None:
        return
    if copy.is_graph_output():
        producer = source.producer()
        if source.is_graph_output() or producer is None or producer.graph is not graph:
            return
    edit.replace_value(root, copy, source)
    if not copy.uses() and not copy.is_graph_output():
        graph.remove(node, safe=True)
