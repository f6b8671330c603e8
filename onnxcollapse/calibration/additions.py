# SPDX-License-Identifier: Apache-2.0
"""Adding nodes to a scratch graph, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit

PREFIX = "onnxcollapse_probe"
OLDEST_OPSET = 9

Attribute = int | float | Sequence[int] | ir.TensorProtocol


class Additions:
    """Nodes of the standard domain that are appended to a graph, with names of their own."""

    def __init__(self, graph: ir.Graph) -> None:
        """Starts on a graph.

        Raises:
            ModelError: Its opset is too old.
        """
        self._graph, self._opset = graph, _opset(graph)
        self._made: dict[object, ir.Value] = {}
        self._nodes = 0

    def _to_float(self, value: ir.Value) -> ir.Value:
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self._op("Cast", [value], to=int(ir.DataType.FLOAT))

    def _constant(self, data: float | Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        def build() -> ir.Value:
            return edit.add_initializer(self._graph, f"{PREFIX}_constant", np.asarray(data), dtype)

        return self._once(("constant", str(data), str(dtype)), build)

    def _op(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._nodes += 1
        node.name = node.outputs[0].name = f"{PREFIX}_{self._nodes}_{op_type}"
        self._graph.append(node)
        return node.outputs[0]

    def _once(self, key: object, build: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]


def _opset(graph: ir.Graph) -> int:
    opset = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"the model is at opset {opset}, probes need {OLDEST_OPSET}; run onnx.version_converter on it"
        )
    return opset
