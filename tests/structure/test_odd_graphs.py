# SPDX-License-Identifier: Apache-2.0
"""Everything reads through graphs with unusual types and shapes without failing or changing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse.structure import (
    Linear,
    affine_of,
    blocks,
    feedforwards,
    layers,
    linear_at,
    linears,
    ranges,
    spine,
)

W = np.ones((4, 4), np.float32)
GRAPHS = {
    "strings": (
        """g (float[n,4] x, string[k] words) => (float[] y, string[] w) {
            c = Constant <value_strings = ["a", "b"]> () w = Identity(words) y = MatMul(x, W)
        }""",
        {},
    ),
    "sequences": (
        """g (float[n,4] x) => (float[] y) {
            m = MatMul(x, W) s = SequenceConstruct(m, x) i = Constant <value_int = 0> ()
            r = SequenceAt(s, i) y = Relu(r)
        }""",
        {},
    ),
    "optional": ("g (float[n,4] x) => (float[] y) { o = Optional(x) e = OptionalGetElement(o) y = MatMul(e, W) }", {}),
    "int4": (
        "g (float[n,4] x) => (float[] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }",
        {"q": (ir.DataType.INT4, np.zeros((4, 4))), "s": (ir.DataType.FLOAT, np.array(1.0))},
    ),
    "fp8": (
        "g (float[n,4] x) => (float[] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }",
        {"q": (ir.DataType.FLOAT8E4M3FN, np.ones((4, 4))), "s": (ir.DataType.FLOAT, np.array(1.0))},
    ),
    "empty inputs": (
        "g (float[n,4] x) => (float[] y) { c = Clip(x, , ) y = Resize(c, , s) }",
        {"s": (ir.DataType.FLOAT, np.ones(2))},
    ),
    "many ifs": (
        """g (float[n,4] x, bool p) => (float[] y) {
            a = If (p) <
                then_branch = t () => (float[] u) {
                    u = If (p) <
                        then_branch = t2 () => (float[] i) { i = MatMul(x, W) },
                        else_branch = e2 () => (float[] j) { j = Relu(x) }
                    >
                },
                else_branch = e () => (float[] v) { v = Identity(x) }
            >
            y = MatMul(a, W)
        }""",
        {},
    ),
    "scan": (
        """g (float[t,4] x, float[4] s0) => (float[] s1, float[] y) {
            s1, y = Scan <num_scan_inputs = 1, body = b (float[4] s, float[4] e) => (float[4] s2, float[4] o) {
                s2 = Add(s, e) o = Identity(s2)
            }> (s0, x)
        }""",
        {},
    ),
    "foreign domain": ("g (float[n,4] x) => (float[] y) { a, b = my.MatMul(x, W) y = Add(a, b) }", {}),
    "no inputs": ("g () => (float[] y) { y = Relu(W) }", {}),
    "input is output": ("g (float[n,4] x) => (float[n,4] x) { }", {}),
    "zero sized": (
        "g (float[n,0] x) => (float[] y) { y = MatMul(x, Z) }",
        {"Z": (ir.DataType.FLOAT, np.zeros((0, 4)))},
    ),
    "scalar weights": ("g (float[n,4] x) => (float[] y) { y = MatMul(x, S) }", {"S": (ir.DataType.FLOAT, np.ones(()))}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_reads_through(parse, name):
    text, extra = GRAPHS[name]
    weights = {"W": W}
    for key, (dtype, array) in extra.items():
        weights[key] = ir.to_proto(ir.tensor(array.astype(dtype.numpy()), name=key))
    model = parse(text, weights, opset=21, domains=["my"])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    feedforwards(model.graph, model.functions.values())
    linears(model.graph)
    assert len(spine(model.graph)) >= 1
    blocks(model.graph)
    layers(model.graph)
    bounds = ranges(model.graph, {"x": (-1.0, 1.0)})
    for node in model.graph:
        affine_of(node)
        linear_at(node)
        for value in node.outputs:
            bounds.of(value)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("name", "gemms"), [("bvlc_alexnet", 3), ("vgg19", 3), ("resnet50", 1), ("squeezenet", 0)]
)
def test_structure_only_nets_of_the_onnx_package(name, gemms):
    """Every weight is a graph input, too, or made by ConstantOfShape of one."""
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    model = ir.load(folder / f"light_{name}.onnx")
    chain = spine(model.graph)
    (data,) = (value for value in model.graph.inputs if not value.is_initializer())
    assert chain[0] is data
    assert chain[-1] is model.graph.outputs[0]
    read = [linear_at(node) for node in model.graph if node.op_type == "Gemm"]
    assert len(read) == gemms
    for linear in read:
        assert isinstance(linear, Linear) or "overridable" in linear.reason
    feedforwards(model.graph)
    bounds = ranges(model.graph, {data.name: (0.0, 1.0)})
    bounds.of(chain[-1])
