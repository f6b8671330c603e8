# SPDX-License-Identifier: Apache-2.0
"""Small models and data that many tests share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse import Model, open_data
from onnxcollapse.calibration import open_session


class Net:
    """Builds a graph node by node; every method returns the name of what it adds."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, array, name: str | None = None, dtype=np.float32) -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes) -> str:
        name = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def linear(
        self, x: str, matrix, offset=None, *, spelling: str = "matmul", name: str | None = None
    ) -> str:
        matrix = np.asarray(matrix)
        if spelling == "gemm":
            operands = [x, self.const(matrix.T)] + ([] if offset is None else [self.const(offset)])
            return self.op("Gemm", *operands, name=name, transB=1)
        product = self.op("MatMul", x, self.const(matrix), name=None if offset is not None else name)
        return product if offset is None else self.op("Add", product, self.const(offset), name=name)

    def dense(self, x: str, d_in: int, d_out: int, **options) -> str:
        matrix = self.random.normal(size=(d_in, d_out)) / d_in**0.5
        return self.linear(x, matrix, self.random.normal(size=d_out) * 0.1, **options)

    def model(self, inputs: dict[str, list], outputs: dict[str, list], opset: int = 17) -> Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
            self.initializers,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(proto, full_check=True)
        return Model(ir.from_proto(proto))


def mlp(
    widths: list[int], activation: str = "Relu", *, slopes=None, spelling: str = "gemm", seed: int = 0
) -> Model:
    """A chain of dense layers x -> y with an activation between each two."""
    net = Net(seed)
    value = "x"
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        last = index == len(widths) - 2
        value = net.dense(value, d_in, d_out, spelling=spelling, name="y" if last else None)
        if not last:
            extra = [net.const(slopes[index])] if slopes is not None else []
            value = net.op(activation, value, *extra)
    return net.model({"x": ["n", widths[0]]}, {"y": ["n", widths[-1]]})


def rows(samples: int, width: int, seed: int = 1, *, rank: int | None = None) -> np.ndarray:
    """Gaussian samples [n, width] in float32, of limited rank when asked."""
    random = np.random.default_rng(seed)
    if rank is None:
        return random.normal(size=(samples, width)).astype(np.float32)
    return (random.normal(size=(samples, rank)) @ random.normal(size=(rank, width)) / rank**0.5).astype(
        np.float32
    )


def data_for(model: Model, array: np.ndarray, seed: int = 0):
    """A dataset for the input x."""
    return open_data({"x": array}, model, seed=seed)


def outputs(model: Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Runs a model on the CPU."""
    with open_session(model, provider="cpu") as session:
        return session.run(feeds)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 distance of a from b."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def file_bytes(model: Model, folder: Path) -> bytes:
    """What a model is written as."""
    path = folder / "written.onnx"
    model.save(path)
    return path.read_bytes()


WIDTH, LAYERS = 8, 5


def residual(seed: int = 0):
    """x -> Linear -> LAYERS of h + scale(x) * Linear(Relu(Linear(h))) -> Linear -> y; scale is a side path."""
    net = Net(seed)
    scale = net.op("Sigmoid", net.op("ReduceMean", "s", axes=[-1], keepdims=1), name="scale")
    value = net.dense("x", WIDTH, WIDTH, name="h0")
    for layer in range(LAYERS):
        hidden = net.op("Relu", net.dense(value, WIDTH, 24), name=f"a{layer}")
        update = net.op("Mul", net.dense(hidden, 24, WIDTH, name=f"u{layer}"), scale)
        value = net.op("Add", value, update, name=f"h{layer + 1}")
    net.dense(value, WIDTH, 4, name="y")
    return net.model({"x": ["n", WIDTH], "s": ["n", 3]}, {"y": ["n", 4]})
