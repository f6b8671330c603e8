# SPDX-License-Identifier: Apache-2.0
"""Joins a model and its reference into one graph over shared inputs, so that one run feeds probes on both."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from onnxcollapse.calibration.sessions import main_values
from onnxcollapse.errors import ModelError
from onnxcollapse.model.model import Model
from onnxcollapse.model.weights import identity


def join(scratch: Model, reference: Model) -> dict[str, str]:
    """Moves everything of `reference` into `scratch`; both are clones that nobody else uses.

    Inputs of equal name become one, weights that are the same tensor object become one (so that ONNX Runtime
    merges a prefix both have in common), everything else of the reference is renamed.

    Args:
        scratch: Takes the nodes; its own outputs stay.
        reference: Gives the nodes and is empty afterwards.

    Returns:
        The reference's value names -> their names in `scratch`.

    Raises:
        ModelError: The two need different versions of an operator set.
    """
    _merge_opsets(scratch, reference)
    prefix = _free_prefix(scratch.graph)
    moved = main_values(reference.graph)
    names = dict.fromkeys(moved, "")
    reference.graph.outputs.clear()
    merged = _share_inputs(scratch.graph, reference.graph) | _share_weights(scratch.graph, reference.graph)
    _rename(reference, moved, prefix, set(merged))
    _move_functions(scratch, reference, prefix)
    _move(scratch.graph, reference.graph)
    for name, value in moved.items():
        names[name] = merged.get(name) or value.name or ""
    return names


def _merge_opsets(scratch: Model, reference: Model) -> None:
    for domain, version in reference.graph.opset_imports.items():
        if scratch.graph.opset_imports.setdefault(domain, version) != version:
            raise ModelError(
                f"model and reference need different versions of operator set {domain or 'ai.onnx'!r}; "
                "convert one of them to the other's"
            )
    scratch.ir.ir_version = max(scratch.ir.ir_version, reference.ir.ir_version)


def _free_prefix(graph: ir.Graph) -> str:
    prefix = "reference/"
    taken = set(main_values(graph)).union(*(main_values(body) for body in graph.subgraphs()))
    while any(name.startswith(prefix) for name in taken):
        prefix = f"_{prefix}"
    return prefix


def _share_inputs(graph: ir.Graph, reference: ir.Graph) -> dict[str, str]:
    own = {value.name: value for value in graph.inputs}
    merged = {}
    for value in list(reference.inputs):
        name = value.name or ""
        if name in own:
            value.replace_all_uses_with(own[name])
            merged[name] = name
            reference.initializers.pop(name, None)
    reference.inputs[:] = [value for value in reference.inputs if value.name not in own]
    return merged


def _share_weights(graph: ir.Graph, reference: ir.Graph) -> dict[str, str]:
    own = {_content(value): value for value in graph.initializers.values() if not value.is_graph_input()}
    merged = {}
    for name, value in list(reference.initializers.items()):
        twin = own.get(_content(value))
        if twin is not None and not value.is_graph_input():
            value.replace_all_uses_with(twin)
            merged[name] = twin.name or ""
            reference.initializers.pop(name)
    return merged


def _content(value: ir.Value) -> Hashable:
    """Equal for values that hold the same stored tensor."""
    tensor = value.const_value
    return None if tensor is None else (identity(tensor), tensor.dtype, tuple(tensor.shape))


def _rename(reference: Model, moved: dict[str, ir.Value], prefix: str, merged: set[str]) -> None:
    """Prefixes nodes and values; inputs that only the reference has are still fed by their own names."""
    for name, value in moved.items():
        if name not in merged and not value.is_graph_input():
            value.name = prefix + name
    for body in reference.graph.subgraphs():
        for value in main_values(body).values():
            value.name = f"{prefix}{value.name}"
    for node in reference.graph.all_nodes():
        if node.name:
            node.name = prefix + node.name


def _move_functions(scratch: Model, reference: Model, prefix: str) -> None:
    """Gives the reference's functions a domain of their own: a pass may have changed the model's."""
    functions = list(reference.ir.functions.values())
    if not functions:
        return
    domain = prefix.rstrip("/")
    own = {function.identifier(): function for function in functions}
    bodies: list[ir.Graph | ir.Function] = [reference.graph, *functions]
    for node in [node for body in bodies for node in body.all_nodes()]:
        if node.op_identifier() in own:
            node.domain = f"{domain}.{node.domain}"
    for function in functions:
        for used in {function.domain for function in functions}:
            function.opset_imports[f"{domain}.{used}"] = 1
            scratch.graph.opset_imports[f"{domain}.{used}"] = 1
    reference.ir.functions.clear()
    for function in functions:
        function.domain = f"{domain}.{function.domain}"
        scratch.ir.functions[function.identifier()] = function


def _move(graph: ir.Graph, reference: ir.Graph) -> None:
    inputs = list(reference.inputs)
    reference.inputs.clear()
    graph.inputs.extend(inputs)
    for value in list(reference.initializers.values()):
        reference.initializers.pop(value.name or "")
        graph.initializers[value.name or ""] = value
    nodes = list(reference)
    reference.remove(nodes)
    graph.extend(nodes)
