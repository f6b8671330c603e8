# SPDX-License-Identifier: Apache-2.0
"""How large a model is and what one run of it costs, from the graph alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxcollapse.model import walk
from onnxcollapse.model.operations import flops
from onnxcollapse.model.weights import identity

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

__all__ = ["Size", "flops", "size"]


@dataclass(frozen=True)
class Size:
    """Size of a model.

    Attributes:
        params: Elements of float and quantised (at most 8 bits) constants; indices, masks and strings are
        none.
        bytes: Bytes of all constants.
        nodes: Nodes of all graphs and functions.
    """

    params: int
    bytes: int
    nodes: int


def size(model: Model) -> Size:
    """Count what the model stores, each stored tensor once, however many values share it."""
    stored = dict(_constants(model.ir))
    return Size(
        params=sum(count for is_param, count, _ in stored.values() if is_param),
        bytes=sum(nbytes for _, _, nbytes in stored.values()),
        nodes=sum(len(graph) for graph in walk.graphs(model.ir)),
    )


def _constants(model: ir.Model) -> Iterator[tuple[Hashable, tuple[bool, int, int]]]:
    """Constants of all graphs: identity, and whether it counts as parameters, its elements and its bytes."""
    for graph in walk.graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield _entry(value.const_value)
        for node in graph:
            yield from map(_entry, walk.attribute_tensors(node))
            if node.op_type == "Constant" and node.domain == "":
                yield from _written_out(node)


def _entry(tensor: ir.TensorProtocol) -> tuple[Hashable, tuple[bool, int, int]]:
    return identity(tensor), (_is_param(tensor.dtype), tensor.size, tensor.nbytes)


def _is_param(dtype: ir.DataType) -> bool:
    if dtype in (ir.DataType.STRING, ir.DataType.BOOL, ir.DataType.UNDEFINED):
        return False
    return dtype.is_floating_point() or dtype.bitwidth <= 8


def _written_out(node: ir.Node) -> Iterator[tuple[Hashable, tuple[bool, int, int]]]:
    """Constants given as `value_float`, `value_ints` and so on."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or not name.startswith("value_"):
            continue
        numbers = attribute.value if isinstance(attribute.value, list | tuple) else [attribute.value]
        if name in ("value_float", "value_floats"):
            yield id(attribute), (True, len(numbers), 4 * len(numbers))
        elif name in ("value_int", "value_ints"):
            yield id(attribute), (False, len(numbers), 8 * len(numbers))
