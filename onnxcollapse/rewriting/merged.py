# SPDX-License-Identifier: Apache-2.0
"""Decoders merged for runs without and with a cache: two graphs of the same layers in the branches of one If.

The branch without a cache computes everything that the other one does, so it leads: statistics, choice and measurement
are those of a model of its own. The other one follows: its tensors are given the leader's names, and every rewrite is
applied to both. In the end both are put back into the If, and what they read of weights lies beside it, once.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcollapse.calibration import Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, walk, weights
from onnxcollapse.model.weights import digest
from onnxcollapse.rewriting.exact import ExactStage
from onnxcollapse.rewriting.journal import Journal
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.proposal import Saving
from onnxcollapse.structure.alignment import align
from onnxcollapse.verification.caching import cache_gap

logger = logging.getLogger(__name__)

_INTEGERS = {ir.DataType.INT32, ir.DataType.INT64}
_SMALL = 16


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged decoder, taken apart.

    Attributes:
        whole: The model.
        lead: The branch without a cache as a model, with the other one as its follower.
        branches: The If's attributes that hold them, the leader's first.
        data: Data of the whole model, to decode by; None where nothing can be measured.
        provider: Where it decodes.
        gap: How far decoding through the cache is from one pass; None where that cannot be measured.
        tolerance: What of it rounding explains.
    """

    whole: Model
    lead: Model
    branches: tuple[str, str]
    data: Dataset | None
    provider: str
    gap: float | None
    tolerance: float

    @classmethod
    def of(
        cls, model: Model, data: Dataset | None = None, provider: str = "auto", tolerance: float = 1e-4
    ) -> Merged | None:
        """Takes a model apart; None where it is no merged decoder, or its branches do not compute the same."""
        choice = _choice(model)
        if choice is None:
            return None
        names = [name for name, attribute in choice.attributes.items() if _is_graph(attribute)]
        try:
            parts = {name: _branch(model, name) for name in names}
        except (ModelError, ValueError) as problem:
            logger.warning("the branches of '%s' are left as they are: %s", choice.name, problem)
            return None
        cached = {name: any(is_cache_name(v.name or "") for v in parts[name].graph.inputs) for name in names}
        if sorted(cached.values()) != [False, True]:
            return None
        gap = None if data is None else cache_gap(model, data, provider)
        if gap is not None and gap > tolerance:
            logger.warning("the branches of '%s' differ by %.3g: they are left as they are", choice.name, gap)
            return None
        first, second = sorted(names, key=cached.__getitem__)
        lead, follower = parts[first], parts[second]
        align(follower.graph, lead.graph)
        lead = replace(lead, followers=(follower,))
        return cls(model, lead, (first, second), data, provider, gap, tolerance)

    def check(self, lead: Model) -> None:
        """Decodes with what was made of the leader and of its follower.

        Raises:
            ModelError: They do not fit together, or do not compute the same any more.
        """
        if self.gap is None or self.data is None:
            return
        gap = cache_gap(self.join(lead), self.data, self.provider)
        if gap is None or gap > max(self.tolerance, 2 * self.gap):
            how = "it does not decode any more" if gap is None else f"it is {gap:.3g} from one pass"
            raise ModelError(f"through its cache {how}")

    def tidy(self, lead: Model, exact: Sequence[Pass], journal: Journal) -> None:
        """Runs exact passes on the follower, whose graph is its own, and gives it the leader's names again.

        Args:
            lead: The leader, on which they have run.
            exact: The passes.
            journal: Is told what was kept in the follower alone.
        """
        known = {(entry.pass_name, entry.site) for entry in journal.of("kept")}
        before, own = lead.clone(), Journal()
        for other in lead.followers:
            ExactStage(other, exact, own, None, self.tolerance).run()
            align(other.graph, lead.graph)
        try:
            self.check(lead)
        except ModelError as problem:
            logger.warning("nothing is tidied in the branch with a cache: %s", problem)
            lead.become(before)
            return
        for entry in own.of("kept"):
            if (entry.pass_name, entry.site) not in known:
                reason = "; ".join(filter(None, (entry.reason, "in the branch with a cache")))
                journal.add(replace(entry, reason=reason, saving=Saving()))

    def join(self, lead: Model) -> Model:
        """Puts a rewritten leader and its follower back into the If.

        Args:
            lead: What was made of `lead`.

        Raises:
            ModelError: The follower lacks an output that the leader has.
        """
        whole = self.whole.clone()
        parts = [part.clone() for part in (lead, *lead.followers)]
        before = {v.name for part in (self.lead, *self.lead.followers) for v in part.graph.inputs}
        after = {v.name for part in parts for v in part.graph.inputs}
        inputs, choice = whole.graph.inputs, _choice(whole)
        if choice is None:
            raise ModelError("the model is no merged decoder any more; take it apart again")
        inputs[:] = [value for value in inputs if value.name in after or value.name not in before]
        left = {value.name for value in lead.graph.outputs}
        kept = [value for value in whole.graph.outputs if value.name in left]
        outside = _Outside(whole, choice)
        for part in parts:
            outside.take_over(part)
        graphs = {
            name: outside.inner(part, kept, choice.attributes[name].value.name)
            for name, part in zip(self.branches, parts, strict=True)
        }
        made = [ir.Attr(name, ir.AttributeType.GRAPH, graphs[name]) for name in choice.attributes]
        _replace(whole, choice, made, kept)
        edit.prune(whole)
        edit.check(whole)
        return whole


def _choice(model: Model) -> ir.Node | None:
    """The If that makes all outputs."""
    makers = {value.producer() for value in model.graph.outputs}
    node = next(iter(makers), None)
    if len(makers) != 1 or node is None or (node.domain, node.op_type) != ("", "If"):
        return None
    graphs = [attribute for attribute in node.attributes.values() if _is_graph(attribute)]
    return node if len(graphs) == 2 and len(node.outputs) == len(model.graph.outputs) else None


def _is_graph(attribute: ir.Attr) -> bool:
    return not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH


def _branch(model: Model, name: str) -> Model:
    """The model as it is when the If takes one branch, without the inputs that this does not read.

    Raises:
        ModelError: An output has another type there.
    """
    part = replace(model.clone(), companions=(), folder=False)
    graph, choice = part.graph, _choice(part)
    if choice is None:
        raise ModelError("the model is no merged decoder")
    inner: ir.Graph = choice.attributes[name].value
    _free_names(graph, inner)
    outputs, nodes = list(inner.outputs), list(inner)
    inner.outputs.clear()
    inner.remove(nodes)
    for value in list(inner.initializers.values()):
        del inner.initializers[value.name or ""]
        graph.initializers.add(value)
    graph.insert_before(choice, nodes)
    for old, new in zip(list(choice.outputs), outputs, strict=True):
        edit.replace_value(graph, old, new)
    edit.prune(part)
    graph.inputs[:] = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
    edit.check(part)
    return part


def _free_names(graph: ir.Graph, inner: ir.Graph) -> None:
    """Renames what a branch calls as its surroundings do, like its outputs."""
    around = {value.name for value in walk.values(graph)}
    taken = edit.names_in(graph)
    for value in dict.fromkeys(walk.values(inner)):
        if value.name and value.name in around:
            value.name = edit.free_name(f"{value.name}_inner", taken)


def _replace(whole: Model, old: ir.Node, branches: Sequence[ir.Attr], kept: Sequence[ir.Value]) -> None:
    """Puts another If in the place of one; it gives some of the outputs, under the same names."""
    outputs = [edit.like(value) for value in kept]
    node = ir.Node("", "If", old.inputs, branches, outputs=outputs, name=old.name, doc_string=old.doc_string)
    node.metadata_props.update(old.metadata_props)
    whole.graph.insert_before(old, node)
    for new, value in zip(outputs, kept, strict=True):
        new.name, value.name = value.name, f"{value.name}_before"
        new.doc_string = value.doc_string
        new.metadata_props.update(value.metadata_props)
    whole.graph.outputs[:] = outputs


class _Outside:
    """What lies around the If: inputs and weights, which both branches read.

    Args:
        whole: The model; weights are added to it.
        choice: The If, which will be another.
    """

    def __init__(self, whole: Model, choice: ir.Node) -> None:
        self._whole, self._graph = whole, whole.graph
        self._inputs = {value.name: value for value in self._graph.inputs}
        self._names: set[str | None] = {
            value.name for value in walk.values(self._graph) if value.producer() is not choice
        }
        self._known: dict[Hashable, ir.Value] = {
            weights.key(value.const_value): value
            for value in self._graph.initializers.values()
            if value.const_value is not None
        }

    def take_over(self, part: Model) -> None:
        """Lets a branch read inputs and weights from around it."""
        _own_outputs(part)
        for value in part.graph.inputs:
            ir.convenience.replace_all_uses_with(value, self._inputs[value.name], replace_graph_outputs=False)
        for name, value in list(part.graph.initializers.items()):
            if not _stays(value):
                ir.convenience.replace_all_uses_with(value, self._shared(value))
                del part.graph.initializers[name]
        for domain, version in part.ir.opset_imports.items():
            self._whole.ir.opset_imports.setdefault(domain, version)

    def inner(self, part: Model, kept: Sequence[ir.Value], name: str | None) -> ir.Graph:
        """The graph of a branch, of that name; takes the nodes of `part`.

        Raises:
            ModelError: It lacks an output.
        """
        graph = part.graph
        made = {value.name: value for value in graph.outputs}
        lost = next((value.name for value in kept if value.name not in made), None)
        if lost is not None:
            raise ModelError(
                f"a branch has lost the output '{lost}' that the other one has; leave that layer"
            )
        outputs = [made[value.name] for value in kept]
        graph.outputs.clear()
        taken = self._names | edit.names_in(graph)
        for value in dict.fromkeys(walk.values(graph)):
            if value.name in self._names and not value.is_graph_input():
                value.name = edit.free_name(f"{value.name}_inner", taken)
        nodes, constants = list(graph), list(graph.initializers.values())
        graph.remove(nodes)
        graph.initializers.clear()
        return ir.Graph((), outputs, nodes=nodes, initializers=constants, name=name)

    def _shared(self, value: ir.Value) -> ir.Value:
        """The weight as it lies outside, once."""
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"weight '{value.name}' has no tensor")
        key = weights.key(tensor)
        if key not in self._known:
            key = digest(tensor)
        if key not in self._known:
            new = ir.Value(
                name=edit.free_name(value.name or "weight", self._names),
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            self._graph.initializers.add(new)
            self._known[key] = new
        return self._known[key]


def _own_outputs(part: Model) -> None:
    """Lets outputs that are weights be made by a node, as ONNX Runtime wants it in a branch."""
    graph = part.graph
    for place, value in enumerate(graph.outputs):
        if value.is_initializer():
            node = ir.Node("", "Identity", [value], outputs=[edit.like(value)])
            name, value.name = value.name, edit.unique_name(graph, f"{value.name}_constant")
            node.outputs[0].name = name
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _stays(value: ir.Value) -> bool:
    """Whether a constant lies in its branch: those that shapes are made of, which ONNX Runtime wants there."""
    tensor = value.const_value
    if tensor is None or len(tensor.shape) == 0:
        return True
    return len(tensor.shape) == 1 and tensor.dtype in _INTEGERS and tensor.size <= _SMALL
