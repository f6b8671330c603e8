# SPDX-License-Identifier: Apache-2.0
"""Whether a graph is well formed: every name means one tensor, made before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import carry, skeleton, walk

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

Scope = dict[str, ir.Value]


class _OrderError(ModelError):
    """A tensor is used before it is made."""


def check(model: Model, *, full: bool = False) -> None:
    """Verify the invariants that every rewrite must keep.

    Every tensor has a name that means only it wherever it is used, is made before it is used (so the graph
    has no cycle), and agrees with its initializer; operators come from imported domains; inputs and outputs
    are named.

    Args:
        model: The model.
        full: Let `onnx.checker` verify operators and attributes as well, on the model without its weights.

    Raises:
        ModelError: Names the first thing that is wrong.
    """
    _check_scopes(model.ir)
    _check_domains(model.ir)
    for graph in walk.graphs(model.ir):
        _check_initializers(graph)
    _check_signature(model.ir.graph)
    if full:
        try:
            onnx.checker.check_model(skeleton.for_checker(model.ir))
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"onnx.checker refuses the model: {' '.join(str(error).split())[:300]}"
            ) from error


def settle(model: ir.Model) -> None:
    """Bring a freshly loaded model into the order that everything else relies on.

    Raises:
        ModelError: A tensor is never made, a name means two tensors, or the graph has a cycle.
    """
    try:
        _check_scopes(model)
    except _OrderError:
        try:
            model.graph.sort()
            for function in model.functions.values():
                function.graph.sort()
        except ValueError as error:
            raise ModelError("the graph has a cycle; export it again") from error
        _check_scopes(model)


def _check_scopes(model: ir.Model) -> None:
    _check_scope(model.graph, ())
    for function in model.functions.values():
        _check_scope(function.graph, ())


def _check_scope(graph: ir.Graph, outer: Sequence[Scope]) -> None:
    scope: Scope = {}
    _define([*graph.inputs, *graph.initializers.values()], scope)
    for node in graph:
        if not isinstance(node.op_type, str) or not isinstance(node.domain, str):
            raise ModelError(
                f"operator {node.op_type!r} of node {node.name!r} is no text; the file is damaged"
            )
        for value in node.inputs:
            if value is not None:
                _resolve(value, node, scope, outer)
        for inner in walk.subgraphs(node):
            _check_scope(inner, (*outer, scope))
        _define((value for value in node.outputs if value.name), scope)
    for value in graph.outputs:
        if scope.get(value.name or "") is not value:
            raise ModelError(
                f"output {value.name!r} of graph {graph.name!r} is not made in that graph; "
                "add an Identity that makes it"
            )


def _define(values: Iterable[ir.Value], scope: Scope) -> None:
    for value in values:
        if not isinstance(value.name, str):  # protobuf hands out bytes where a text is not UTF-8
            raise ModelError(f"the name {value.name!r} is no text; the file is damaged")
        if not value.name:
            raise ModelError("an input or initializer has no name; give it one")
        if scope.setdefault(value.name, value) is not value:
            raise ModelError(f"two tensors are called {value.name!r}; rename one")


def _resolve(value: ir.Value, node: ir.Node, scope: Scope, outer: Sequence[Scope]) -> None:
    """Check that the value's name, read at `node`, leads to the value."""
    name = value.name or ""
    found = scope.get(name)
    for enclosing in reversed(outer):
        found = enclosing.get(name) if found is None else found
    if found is value:
        return
    user = f"node {node.name!r} ({node.op_type})"
    if found is not None:
        raise ModelError(f"{user} reads {name!r}, but another tensor of that name hides it; rename one")
    if value.producer() is not None:
        raise _OrderError(
            f"{user} reads {name!r} before it is made: the nodes are out of order or form a cycle"
        )
    raise ModelError(f"{user} reads {name!r}, which nothing makes; add it as an input or initializer")


def _check_domains(model: ir.Model) -> None:
    roots = [(model.graph, model.opset_imports)]
    roots += [(f.graph, f.opset_imports) for f in model.functions.values()]
    for root, imports in roots:
        known = {"" if domain == "ai.onnx" else domain for domain in imports} | {carry.DOMAIN}
        for graph in walk.nested(root):
            for node in graph:
                if node.domain not in known:
                    raise ModelError(
                        f"node {node.name!r} ({node.op_type}) is of domain {node.domain!r}, "
                        "which is not imported; add its opset import"
                    )


def _check_initializers(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {name!r} has no tensor; give it one or remove it")
        if value.dtype is not None and value.dtype != tensor.dtype:
            raise ModelError(
                f"initializer {name!r} is declared {value.dtype.name} but holds {tensor.dtype.name}"
            )
        if value.shape is None:
            continue
        declared, actual = list(value.shape), list(tensor.shape.numpy())
        if not _agree(declared, actual):
            raise ModelError(
                f"initializer {name!r} is declared {declared} but holds {actual}; refresh its shape"
            )


def _agree(declared: list[int | ir.SymbolicDim], actual: list[int]) -> bool:
    """Whether a declared shape, which may leave axes open, fits the actual one."""
    if len(declared) != len(actual):
        return False
    return all(not isinstance(d, int) or d == a for d, a in zip(declared, actual, strict=True))


def _check_signature(graph: ir.Graph) -> None:
    for value in [*graph.inputs, *graph.outputs]:
        if value.type is None and carry.type_name(value) is None:
            raise ModelError(f"input or output {value.name!r} has no type; give it one")
    names = [value.name for value in graph.inputs]
    if len(set(names)) < len(names):
        raise ModelError(f"inputs share a name: {names}; rename one")
