# SPDX-License-Identifier: Apache-2.0
"""Cuts a model at points of its spine into segments that run one after the other, each with its own weights only.

::

    inputs --> [segment 0] -- h1, masks --> [segment 1] -- h2 --> ... --> outputs

What a node belongs to follows from the points its data has passed: a node that depends on the k-th point and on no
later one is in segment k. So masks and rotary tables, which depend on no point, are computed once in segment 0 and
carried to the segments that read them; constants are repeated where they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.calibration.sessions import UNREADABLE
from onnxcollapse.model import Model, walk
from onnxcollapse.structure.blocks import layers
from onnxcollapse.structure.channels import element_type
from onnxcollapse.structure.constants import constant
from onnxcollapse.structure.dominators import captured


@dataclass(frozen=True)
class Segment:
    """One segment by the names of its tensors.

    Attributes:
        index: Its place.
        feeds: Inputs of the model that it reads.
        reads: Tensors of earlier segments that it reads.
        gives: Its tensors that later segments read.
        outputs: Outputs of the model that it makes.
        makes: All tensors that its nodes compute.
    """

    index: int
    feeds: tuple[str, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    outputs: tuple[str, ...]
    makes: frozenset[str]


def cut_points(graph: ir.Graph) -> list[str]:
    """Names of the tensors between a model's layers, from the first layer's input to the last one's output.

    A net without repeated layers has none: it runs as one segment.
    """
    points: list[str] = []
    for run in layers(graph):
        points += [run[0].start.name or "", *(block.end.name or "" for block in run)]
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    return [point for point in dict.fromkeys(points) if point and point not in ends]


def segments(graph: ir.Graph, points: Sequence[str]) -> list[Segment]:
    """Cuts a graph at points, which need to be given in their order on the spine.

    Args:
        graph: The main graph.
        points: Names of tensors; those that the graph does not have are passed over.
    """
    level = _levels(graph, points)
    places = {node: place for node in graph if (place := _place(node, level)) is not None}
    last = max(places.values(), default=0)  # nothing may lie behind the last point
    made: list[list[ir.Value]] = [[] for _ in range(last + 1)]
    read: list[dict[ir.Value, None]] = [{} for _ in range(last + 1)]
    home: dict[ir.Value, int] = {}
    for node in graph:
        place = places.get(node)
        if place is None:
            continue
        for value in _operands(node):
            if constant(value) is None and (value in level or value.is_graph_input()):
                read[place][value] = None
        for value in node.outputs:
            made[place].append(value)
            home[value] = place
    wanted = [
        {value for value in group if home.get(value, place) != place} for place, group in enumerate(read)
    ]
    carried = set().union(*wanted)
    return [
        Segment(
            index=place,
            feeds=tuple(v.name or "" for v in read[place] if v.is_graph_input() and not v.is_initializer()),
            reads=tuple(v.name or "" for v in read[place] if v in wanted[place] and not v.is_graph_input()),
            gives=tuple(v.name or "" for v in made[place] if v in carried),
            outputs=tuple(v.name or "" for v in graph.outputs if home.get(v, 0) == place),
            makes=frozenset(v.name for v in made[place] if v.name),
        )
        for place in range(last + 1)
    ]


def joined(parts: Sequence[Segment], first: int, last: int) -> Segment:
    """What `segments` gives in the place of some that follow each other, without the points between them.

    Args:
        parts: All segments of a graph.
        first: Index of the first of these.
        last: Index of the last.
    """
    these = parts[first : last + 1]
    makes = frozenset[str]().union(*(part.makes for part in these))
    later = {name for part in parts[last + 1 :] for name in part.reads}
    return Segment(
        index=first,
        feeds=_chained(part.feeds for part in these),
        reads=tuple(name for name in _chained(part.reads for part in these) if name not in makes),
        gives=tuple(name for name in _chained(part.gives for part in these) if name in later),
        outputs=_chained(part.outputs for part in these),
        makes=makes,
    )


def _chained(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain.from_iterable(names)))


def extract(
    model: Model,
    segment: Segment,
    outputs: Sequence[str],
    types: Mapping[str, ir.DataType] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Model:
    """Builds a model of one segment, or of the part of it that some tensors need.

    Args:
        model: The whole model, which stays as it is; weights are shared.
        segment: One of its segments.
        outputs: Tensors of the segment to compute.
        types: Element types of what it reads and computes, for models that do not declare them.
        ranks: Numbers of axes of what it reads, likewise: some Linears are none where the rank is not known.

    Returns:
        A model whose inputs are the segment's feeds and reads, as far as they are needed.
    """
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    # A removed layer takes along its cache inputs, and what was computed for it alone in earlier segments.
    names = [name for name in (*segment.feeds, *segment.reads) if name in values]
    bounds = [values[name] for name in names] + [v for v in model.graph.inputs if v.is_initializer()]
    known = {name: element_type(values[name]) or (types or {}).get(name) for name in names}
    with walk.collection_paused():
        graph = ir.convenience.extract(model.graph, bounds, [values[name] for name in outputs])
    read = {value for node in graph for value in _operands(node)} | set(graph.outputs)
    graph.inputs[:] = [value for value in graph.inputs if value in read]
    for value in graph.inputs:
        if value.dtype is None:
            value.dtype = known.get(value.name or "") or ir.DataType.FLOAT
        if value.shape is None and (axes := (ranks or {}).get(value.name or "")) is not None:
            value.shape = ir.Shape([None] * axes)
    for value in graph.outputs:
        if value.type is None and (found := (types or {}).get(value.name or "")) is not None:
            value.dtype = found
    _widen_inputs(graph)
    functions = tuple(function.clone() for function in model.ir.functions.values())
    return Model(ir.Model(graph, ir_version=model.ir.ir_version, functions=functions), path=model.path)


def _widen_inputs(graph: ir.Graph) -> None:
    """Lets tensors that numpy cannot hold come in as float32, as sessions give them out, and casts them back."""
    for index, value in enumerate(graph.inputs):
        if value.dtype not in UNREADABLE:
            continue
        wide = ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        cast = ir.node("Cast", [wide], {"to": int(value.dtype)})
        cast.name = cast.outputs[0].name = f"{value.name}_narrow"
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        graph.inputs[index] = wide
        value.name = None
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        graph.insert_before(graph[0], cast)


def _levels(graph: ir.Graph, points: Sequence[str]) -> dict[ir.Value, int]:
    """For each tensor that data reaches, how many points it has passed."""
    order = {name: number + 1 for number, name in enumerate(points)}
    level: dict[ir.Value, int] = {v: 0 for v in graph.inputs if not v.is_initializer()}
    for value in graph.inputs:
        if value in level and value.name in order:
            level[value] = order[value.name]
    for node in graph:
        place = _place(node, level)
        if place is not None:
            for value in node.outputs:
                level[value] = max(place, order.get(value.name or "", 0))
    return level


def _place(node: ir.Node, level: Mapping[ir.Value, int]) -> int | None:
    """The segment of a node; None for one that only constants lead to."""
    known = [level[value] for value in _operands(node) if value in level]
    return max(known, default=None)


def _operands(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *captured(node)) if value is not None]
