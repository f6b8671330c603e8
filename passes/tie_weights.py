# SPDX-License-Identifier: Apache-2.0
"""tie-weights: what is stored twice is stored once (METHODS 3, exact companions).

::

    f(x, A), g(y, B)   with B = A      becomes   f(x, A), g(y, A)
    f(x, A), g(y, B)   with B = A^T    becomes   f(x, A), g(y, Transpose(A));   Gemm(y, B) flips transB instead

Equality is of type, shape and every bit. Initializers that are also graph inputs are no constants and stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, weights
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving

HEAD = 4096
"""Bytes by which tensors of one shape are told apart before any is read whole."""


@dataclass(frozen=True)
class Copies:
    """A stored tensor and those that repeat it.

    Attributes:
        first: The value that stays.
        others: Values of equal content, or of transposed content.
        transposed: Which of the two.
    """

    first: ir.Value
    others: tuple[ir.Value, ...]
    transposed: bool = False

    @property
    def name(self) -> str:
        """Name of the first of the copies, which goes."""
        return self.others[0].name or ""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Users of the copies, and Constant nodes that hold them; a tie never competes for them."""
        return ()


@dataclass(frozen=True)
class TieWeights(Pass):
    """Stores equal weights once, also when one is the other's transpose.

    Attributes:
        transposed: Whether to tie transposed copies, at the price of a Transpose node that runtimes fold at load.
        min_bytes: Smallest tensor for which a Transpose node is worth it.
    """

    name: ClassVar[str] = "tie-weights"
    transposed: bool = True
    min_bytes: int = 4096

    @property
    def exact(self) -> bool:
        """Equal bits give equal results."""
        return True

    def sites(self, model: Model) -> Iterator[Copies | Decline]:
        """Groups stored tensors by content, then pairs what is left with its transpose."""
        stored = [value for value in _stored(model) if _tensor(value).size]
        firsts: list[ir.Value] = []
        for group in _equal_groups(stored):
            firsts.append(group[0])
            if len(group) > 1:
                yield Copies(group[0], tuple(group[1:]))
        if self.transposed:
            place = {value: index for index, value in enumerate(stored)}
            yield from _transposed_pairs(sorted(firsts, key=place.__getitem__), self.min_bytes)

    def propose(self, site: Copies, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes to keep the first."""
        tensor = _tensor(site.first)
        count = len(site.others)
        what = "transposed copy" if site.transposed else ("copy" if count == 1 else f"{count} copies")
        params = tensor.size * count if tensor.dtype.is_floating_point() else 0
        saving = Saving(params=params, bytes=tensor.nbytes * count)
        yield Proposal(
            site.name, detail=f"{what} of '{site.first.name}', {tensor.nbytes:,} bytes each", saving=saving
        )

    def rewrite(self, model: Model, site: Copies, proposal: Proposal) -> None:
        """Lets the users of the copies read the first."""
        _show_everywhere(model, site.first)
        for copy in site.others:
            if site.transposed:
                _read_transposed(model, site.first, copy)
            else:
                edit.replace_value(model.graph, copy, site.first)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    """Returns what a stored value holds."""
    producer = value.producer()
    tensor = value.const_value if producer is None else producer.attributes["value"].as_tensor()
    if tensor is None:
        raise ModelError(f"'{value.name}' holds no tensor any more")
    return tensor


def _stored(model: Model) -> Iterator[ir.Value]:
    """Yields main-graph initializers first, then Constant nodes, then initializers of subgraphs.

    A value of the main graph can be read everywhere, so it comes first and is what stays. Graph outputs stay too,
    because their name is part of the signature, and so do those of functions, which cannot read outside.
    """
    main = model.graph
    yield from filter(_replaceable, main.initializers.values())
    for node in main:
        attribute = node.attributes.get("value") if node.op_type == "Constant" and node.domain == "" else None
        if attribute is not None and not attribute.is_ref() and not node.outputs[0].is_graph_output():
            yield node.outputs[0]
    for graph in main.subgraphs():
        yield from filter(_replaceable, graph.initializers.values())


def _replaceable(value: ir.Value) -> bool:
    """Whether an initializer is a constant and its name not part of the signature."""
    return value.const_value is not None and not value.is_graph_input() and not value.is_graph_output()


def _equal_groups(values: Iterable[ir.Value]) -> Iterator[list[ir.Value]]:
    """Groups values by type, shape and content; reads only tensors whose type and shape occur twice."""
    shapes: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in values:
        tensor = _tensor(value)
        shapes[(tensor.dtype, tuple(tensor.shape))].append(value)
    for alike in shapes.values():
        heads: dict[bytes, list[ir.Value]] = defaultdict(list)
        for value in alike if len(alike) > 1 else ():
            heads[next(weights.chunks(_tensor(value), HEAD), b"")].append(value)
        for group in heads.values() if heads else [alike]:
            yield from _by_content(group)


def _by_content(values: list[ir.Value]) -> Iterable[list[ir.Value]]:
    """Groups values that begin alike; one alone is not read."""
    if len(values) == 1:
        return [values]
    contents: dict[str, list[ir.Value]] = defaultdict(list)
    for value in values:
        contents[weights.digest(_tensor(value))].append(value)
    return contents.values()


def _transposed_pairs(values: list[ir.Value], min_bytes: int) -> Iterator[Copies]:
    """Pairs matrices with their transposes; each takes part once and the first in order stays."""
    waiting: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in values:
        tensor = _tensor(value)
        if len(tensor.shape) != 2 or tensor.nbytes < min_bytes or 1 in tuple(tensor.shape):
            continue
        rows, columns = tensor.shape.numpy()
        mark = weights.diagonal(tensor)
        turned = waiting[(tensor.dtype, columns, rows, mark)]
        partner = next((other for other in turned if weights.equal_transposed(_tensor(other), tensor)), None)
        if partner is None:
            waiting[(tensor.dtype, rows, columns, mark)].append(value)
        else:
            turned.remove(partner)
            yield Copies(partner, (value,), transposed=True)


def _show_everywhere(model: Model, value: ir.Value) -> None:
    """Moves a stored value to where all graphs can read it: to the front of the main graph, or out of a branch."""
    main, producer, home = model.graph, value.producer(), value.graph
    if producer is not None:
        if producer is not main[0]:
            main.remove(producer)
            main.insert_before(main[0], producer)
    elif home is not main and isinstance(home, ir.Graph):
        del home.initializers[value.name or ""]
        value.name = edit.unique_name(main, value.name or "weight")
        main.initializers.add(value)


def _read_transposed(model: Model, first: ir.Value, copy: ir.Value) -> None:
    """Flips transB of the Gemms that read `copy` and gives all other users one Transpose of `first`."""
    for node, index in list(copy.uses()):
        if node.op_type == "Gemm" and node.domain == "" and index == 1:
            flag = node.attributes.get("transB")
            node.attributes["transB"] = ir.AttrInt64("transB", 0 if flag is not None and flag.as_int() else 1)
            node.replace_input_with(1, first)
    if not copy.uses():
        return
    turn = ir.node("Transpose", [first], {"perm": [1, 0]})
    turn.outputs[0].dtype = _tensor(copy).dtype
    turn.outputs[0].shape = ir.Shape(list(_tensor(copy).shape.numpy()))
    graph = model.graph
    edit.insert_before(graph, graph[0 if first.producer() is None else 1], [turn])
    edit.replace_value(graph, copy, turn.outputs[0])
