# SPDX-License-Identifier: Apache-2.0
"""The edits that every rewrite is made of. Nothing else changes a graph.

Weights are immutable: an edit makes a new tensor under a new name, so that copies of a model share theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import scratch, walk
from onnxcollapse.model.checks import check
from onnxcollapse.model.pruning import prune
from onnxcollapse.model.shapes import refresh_shapes
from onnxcollapse.model.skeleton import own_type

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

__all__ = [
    "add_initializer",
    "check",
    "finish",
    "free_name",
    "insert_before",
    "like",
    "prune",
    "refresh_shapes",
    "replace_value",
    "substitute",
    "unique_name",
]


def unique_name(graph: ir.Graph, hint: str) -> str:
    """`hint`, or the first of `hint_1`, `hint_2`, ... that names no tensor and no node in or below the graph.

    Give the main graph for a name that is free in the whole model. Of a subgraph's surroundings only the
    tensors it captures are seen. Functions have a scope of their own.
    """
    return free_name(hint, names_in(graph))


def names_in(graph: ir.Graph) -> set[str | None]:
    """Names of all tensors and nodes in or below a graph, "" among them."""
    names: set[str | None] = {""}
    for inner in walk.nested(graph):
        names.update(value.name for value in inner.inputs)
        names.update(inner.initializers)
        for node in inner:
            names.add(node.name)
            names.update(value.name for value in node.inputs if value is not None)
            names.update(value.name for value in node.outputs)
    return names


def free_name(hint: str, taken: set[str | None]) -> str:
    """`hint`, or the first of `hint_1`, `hint_2`, ... that is not taken, and takes it."""
    name, number = hint, 0
    while name in taken:
        number += 1
        name = f"{hint}_{number}"
    taken.add(name)
    return name


def add_initializer(graph: ir.Graph, hint: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """Add a weight; the array is cast to `dtype` once.

    Raises:
        ModelError: A finite number does not fit into `dtype`.
    """
    array = np.asarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.array(array, dtype=dtype.numpy(), order="C")
    if dtype.is_floating_point() and cast.dtype != array.dtype:
        lost = np.isfinite(array) & ~np.isfinite(cast.astype(np.float32) if cast.dtype.itemsize < 4 else cast)
        if lost.any():
            largest = np.abs(array[lost]).max()
            raise ModelError(
                f"weight {hint!r}: {largest:.6g} does not fit into {dtype.name}; keep a wider type here"
            )
    name = unique_name(graph, hint)
    tensor = scratch.hold(cast, dtype, name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(cast.shape), const_value=tensor)
    graph.initializers.add(value)
    return value


def insert_before(graph: ir.Graph, anchor: ir.Node, nodes: ir.Node | Iterable[ir.Node]) -> None:
    """Insert nodes before `anchor`, renaming them and their outputs where a name is missing or taken."""
    nodes = [nodes] if isinstance(nodes, ir.Node) else list(nodes)
    if anchor.graph is not graph:
        raise ModelError(f"node {anchor.name!r} is not in graph {graph.name!r}; insert into its own graph")
    taken = names_in(graph)
    for node in nodes:
        node.name = free_name(node.name or node.op_type, taken)
        for index, value in enumerate(node.outputs):
            if value.name != "":  # the name of an optional output that is left out
                value.name = free_name(value.name or f"{node.name}_out{index or ''}", taken)
    graph.insert_before(anchor, nodes)


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, in all graphs.

    Nodes that `new` itself is computed from keep reading `old`, so a tensor can be replaced by a function of
    itself. A graph output keeps its name, type and position.

    Args:
        graph: The main graph, where new names must be free.
        old: The value that is read now.
        new: What is read instead.

    Raises:
        ModelError: The types differ, or `old` is an input that is an output as well.
    """
    if old is new:
        return
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        raise ModelError(
            f"{old.name!r} is {old.dtype.name} and cannot be replaced by {new.dtype.name}; add a Cast"
        )
    if old.is_graph_output() and old.is_graph_input():
        raise ModelError(
            f"{old.name!r} is an input and an output at once and cannot be replaced; leave it as it is"
        )
    maker = old.producer()
    # An operand of the node that makes `old` is not computed from it, and need not be traced back.
    upstream = set[ir.Node]() if maker is not None and new in maker.inputs else _upstream(new)
    for node, index in old.uses():
        if node not in upstream:
            node.replace_input_with(index, new)
    if new.type is None:
        new.type = own_type(old.type)
    if new.shape is None and old.shape is not None:
        new.shape = old.shape.copy()
    if old.is_graph_output():
        _replace_output(graph, old, new)


def finish(model: Model) -> None:
    """Ends a rewrite: nothing dead is left in the model and in what follows it, and both are valid graphs.

    Raises:
        ModelError: One of them is not.
    """
    for graph in (model, *model.followers):
        prune(graph)
        check(graph)


def like(value: ir.Value) -> ir.Value:
    """A nameless value with type and shape of another, for the output of a new node; both share no object."""
    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(type=own_type(value.type), shape=shape)


def substitute(model: Model, old: ir.Value, new: ir.Value) -> None:
    """Let `new`, which a rewrite has just made, stand for `old` in all graphs and take its name.

    Names so go on meaning the same tensor in every version of a model, which lets one be compared with the
    other.

    Raises:
        ModelError: As `replace_value`.
    """
    name = old.name
    replace_value(model.graph, old, new)
    if old.name == name and not new.is_graph_output():
        old.name = unique_name(model.graph, f"{name}_old")
        new.name = name


def _upstream(value: ir.Value) -> set[ir.Node]:
    """All nodes that `value` is computed from, those in their subgraphs included."""
    seen: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [source.producer() for source in node.inputs if source is not None]
        for inner in walk.subgraphs(node):
            for held in walk.nested(inner):
                waiting += list(held)
    return seen


def _replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    home = old.graph
    if home is None:
        raise ModelError(f"output {old.name!r} belongs to no graph")
    taken = names_in(graph)
    if new.graph is not home or new.is_graph_input() or new.is_initializer() or new.is_graph_output():
        node = ir.Node("", "Identity", [new], name=free_name("Identity", taken))
        [output] = node.outputs
        output.name = free_name(f"{old.name}_new", taken)
        home.append(node)
    else:
        output = new
    name, old_name = free_name(f"{old.name}_old", taken), old.name
    positions = [i for i, value in enumerate(home.outputs) if value is old]
    for position in positions:
        home.outputs[position] = output
    old.name = name
    output.name = old_name
    output.type, output.doc_string = own_type(old.type), old.doc_string
    output.shape = old.shape.copy() if old.shape is not None else None
    output.metadata_props.update(old.metadata_props)
