# SPDX-License-Identifier: Apache-2.0
"""Which KV caches go along with a stretch of the stream, and how they leave a model's interface."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx_ir as ir

from onnxcollapse.calibration.masks import cache_number, is_cache_name, numbered
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.structure.dominators import ValueGraph


class Caches:
    """The caches among a graph's inputs and outputs, and what each stretch of the stream has to do with them.

    A cache goes with what no output but caches needs any more once the stream passes a stretch by: where it is computed
    from such a tensor, or is one. So do keys that are transposed once more before they are given out, and those of an
    encoder's states, which lie on no path between the two ends. Constants that stand for caches which one branch of a
    merged decoder does not compute go with the others of their layer.

    Args:
        graph: The graph, which must not be edited meanwhile.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._outputs = [value for value in graph.outputs if _is_cache(value)]
        self._inputs = [value for value in graph.inputs if _is_cache(value)]

    @functools.cached_property
    def _flow(self) -> ValueGraph:
        return ValueGraph(self._graph)

    @functools.cached_property
    def _needed(self) -> list[bool]:
        return self._behind_sinks({})

    def leaving(self, start: ir.Value, end: ir.Value) -> list[ir.Value]:
        """The cache inputs and outputs that go when the stream at `end` is that at `start`, plus a map of it or not."""
        if not (self._inputs or self._outputs):
            return []  # most graphs have none: nothing of theirs is walked through
        first, last = self._flow.number(start), self._flow.number(end)
        if first is None or last is None:
            return []
        needed = self._behind_sinks({last: (first,)})
        lost = [before and not now for before, now in zip(self._needed, needed, strict=True)]
        spoilt = list(lost)
        for number, sources in enumerate(self._flow.sources):
            if number != last:
                spoilt[number] = spoilt[number] or any(spoilt[source] for source in sources)
        found = [(value, lost) for value in self._inputs] + [(value, spoilt) for value in self._outputs]
        numbers = [(value, self._flow.number(value), marks) for value, marks in found]
        gone = [value for value, number, marks in numbers if number is not None and marks[number]]
        layers = {cache_number(value.name or "") for value in gone}
        return gone + [value for value in self._constant if cache_number(value.name or "") in layers]

    @functools.cached_property
    def _constant(self) -> list[ir.Value]:
        return [value for value in self._outputs if self._flow.number(value) is None]

    def torn(self, start: ir.Value, end: ir.Value) -> ir.Value | None:
        """A cache that would stay of a layer of which others go; those left could not be numbered then."""
        gone = {value.name for value in self.leaving(start, end)}
        layers = {cache_number(name or "") for name in gone} - {None}
        both = [*self._inputs, *self._outputs]
        return next((v for v in both if v.name not in gone and cache_number(v.name or "") in layers), None)

    def _behind_sinks(self, instead: dict[int, tuple[int, ...]]) -> list[bool]:
        """For each tensor, whether an output that is no cache is computed from it, some from others than they are."""
        found = [False] * len(self._flow.values)
        for value in self._graph.outputs:
            number = None if _is_cache(value) else self._flow.number(value)
            if number is not None:
                found[number] = True
        for number in range(len(found) - 1, -1, -1):
            if found[number]:
                for source in instead.get(number, self._flow.sources[number]):
                    found[source] = True
        return found


def drop_caches(model: Model, leaving: Sequence[ir.Value]) -> None:
    """Takes away cache outputs, and cache inputs whose values nothing needs any more; another lends them its shape.

    Raises:
        ModelError: There is no other one, which would say how many tokens came before.
    """
    graph = model.graph
    graph.outputs[:] = [value for value in graph.outputs if value not in leaving]
    edit.prune(model)
    spare = [value for value in graph.inputs if _is_cache(value) and value not in leaving]
    for value in (value for value in graph.inputs if value in leaving and value.uses()):
        other = next((v for v in spare if _same_role(v, value)), None)
        if other is None:
            raise ModelError(
                f"'{value.name}' says how many tokens came before, and no other cache is left that could; keep a layer"
            )
        for node, index in value.uses():
            node.replace_input_with(index, other)
    graph.inputs[:] = [value for value in graph.inputs if value not in leaving]


def _is_cache(value: ir.Value) -> bool:
    return is_cache_name(value.name or "")


def _same_role(value: ir.Value, other: ir.Value) -> bool:
    """Whether two cache inputs have the same name but for its number, and the same shape."""
    names = {numbered(v.name or "", 0) for v in (value, other)}
    return len(names) == 1 and str(value.shape) == str(other.shape)
