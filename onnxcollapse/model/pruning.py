# SPDX-License-Identifier: Apache-2.0
"""Removing what no output depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxcollapse.model import carry, walk

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

_ANNOTATION = "quant_parameter_tensor_names"  # where onnx_ir keeps a value's quantization annotation


def prune(model: Model) -> int:
    """Remove dead nodes, initializers, functions and opset imports from all graphs.

    Inputs stay, and so do their default values.

    Returns:
        How many nodes were removed, those in removed subgraphs included.
    """
    removed = _prune_nodes(model.ir.graph)
    for function in model.ir.functions.values():
        removed += _prune_nodes(function.graph)
    _prune_functions(model.ir)
    for graph in walk.graphs(model.ir):
        _prune_initializers(graph)
    _prune_imports(model.ir)
    return removed


def _prune_nodes(graph: ir.Graph) -> int:
    removed = 0
    for node in reversed(list(graph)):
        if not node.outputs or any(value.uses() or value.is_graph_output() for value in node.outputs):
            removed += sum(_prune_nodes(inner) for inner in walk.subgraphs(node))
        else:
            removed += _detach(node)
            graph.remove(node, safe=True)
    return removed


def _detach(node: ir.Node) -> int:
    """Let the node and everything in its subgraphs read nothing; returns how many nodes that are."""
    count = 1
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    for inner in walk.subgraphs(node):
        count += sum(map(_detach, inner))
    return count


def _prune_functions(model: ir.Model) -> None:
    used: set[ir.OperatorIdentifier] = set()
    waiting = [model.graph]
    while waiting:
        for graph in walk.nested(waiting.pop()):
            for identifier in {node.op_identifier() for node in graph} - used:
                if identifier in model.functions:
                    used.add(identifier)
                    waiting.append(model.functions[identifier].graph)
    for identifier in set(model.functions) - used:
        del model.functions[identifier]


def _prune_initializers(graph: ir.Graph) -> None:
    live = [value for value in walk.values(graph) if not value.is_initializer() or _is_used(value)]
    annotating = {name for value in live for name in value.meta.get(_ANNOTATION, {}).values()}
    for name, value in list(graph.initializers.items()):
        if not _is_used(value) and name not in annotating:
            del graph.initializers[name]


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()


def _prune_imports(model: ir.Model) -> None:
    if carry.has_training_info(model):
        return  # its graphs use the imports as well
    used = {"", "ai.onnx", *(function.domain for function in model.functions.values())}
    _drop_imports(model.opset_imports, used | _domains(model.graph))
    for function in model.functions.values():
        _drop_imports(function.opset_imports, {"", "ai.onnx"} | _domains(function.graph))


def _domains(graph: ir.Graph) -> set[str]:
    return {node.domain for inner in walk.nested(graph) for node in inner}


def _drop_imports(imports: dict[str, int], used: set[str]) -> None:
    for domain in set(imports) - used:
        del imports[domain]
