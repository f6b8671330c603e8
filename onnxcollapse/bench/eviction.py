# SPDX-License-Identifier: Apache-2.0
"""Takes a stretch's weights out of the caches, as the rest of its model does between two runs.

Repeated by itself, a layer finds its weights in the cache, where a model of many layers has to fetch them from memory:
on a machine with 2 MB of cache a layer of 2.4 MB in a model of 19 MB seemed to take half of what it did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.providers import CPU, chain
from onnxcollapse.calibration.sessions import adopt
from onnxcollapse.model import Model

LEAST = 1 << 20
"""Bytes that leave what was in the caches before as good as whole."""

MOST = 128 << 20
"""More than the caches of any device hold that matters here."""


def passage(rest: int) -> int:
    """How much memory to read between two runs of a stretch, in bytes, rounded to powers of two.

    Args:
        rest: Bytes of weights that the model has outside the stretch.

    Returns:
        0 where that is too little to matter.
    """
    if rest < LEAST:
        return 0
    return min(1 << (rest - 1).bit_length(), MOST)


@contextlib.contextmanager
def eviction(count: int, provider: str) -> Iterator[Callable[[], object] | None]:
    """Gives what reads so many bytes of memory where a provider runs; None for 0 bytes."""
    if not count:
        yield None
        return
    block = np.ones((count // 4096, 1024), np.float32)  # zeros would all be one page of memory
    if chain(provider)[0] == CPU:
        yield block.max  # no session: its threads would go on spinning
        return
    with adopt(_reader(block.shape), provider) as session:
        yield session.prepared({"x": block})


def _reader(shape: tuple[int, ...]) -> Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    node = ir.node("ReduceMax", [x], {"keepdims": 1})
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((1, 1))
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}, name="reader")
    return Model(ir.Model(graph, ir_version=8))
