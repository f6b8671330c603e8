# SPDX-License-Identifier: Apache-2.0
"""How much memory the tensors between the nodes of a model take."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import onnx

from onnxcollapse.model.operations import concrete

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model


def peak_activations(model: Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> int:
    """The most bytes that tensors take at any one time of a run in graph order, weights left out.

    A tensor lives from the node that makes it to the last one that reads it. Tensors of unknown shape count
    nothing, and neither do those inside If, Loop and Scan bodies.

    Args:
        model: The model; its weights are not read.
        shapes: Shapes of inputs, by name; dynamic axes that they do not settle are 1.

    Raises:
        ModelError: `shapes` names an input that there is not, or gives it another rank.
    """
    graph = concrete(model, shapes=shapes)
    sizes = {info.name: _bytes(info) for info in (*graph.input, *graph.output, *graph.value_info)}
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= {info.name: len(graph.node) for info in graph.output}
    live = peak = sum(sizes[info.name] for info in graph.input)
    for place, node in enumerate(graph.node):
        live += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, live)
        over = {name for name in (*node.input, *node.output) if last.get(name, place) == place}
        live -= sum(sizes.get(name, 0) for name in over)
    return peak


def _bytes(info: onnx.ValueInfoProto) -> int:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape") or not tensor.elem_type:
        return 0
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return width * prod(max(dim.dim_value, 1) for dim in tensor.shape.dim)
