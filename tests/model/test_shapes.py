# SPDX-License-Identifier: Apache-2.0
"""Shapes are inferred again where an edit touched them, and only there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxcollapse.model import Model
from onnxcollapse.model.edit import add_initializer, check, refresh_shapes, replace_value

FLOAT = ir.DataType.FLOAT


def load(body, signature="float[n,4] x", out="float[n,4] y"):
    text = f'<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g ({signature}) => ({out}) {{ {body} }}'
    return Model(ir.from_proto(onnx.parser.parse_model(text)))


def value(model, name):
    return next(
        v for g in [model.graph, *model.graph.subgraphs()] for n in g for v in n.outputs if v.name == name
    )


def shape(model, name):
    found = value(model, name).shape
    return None if found is None else [dim if isinstance(dim, int) else dim.value for dim in found]


def declare(model, **shapes):
    for name, dims in shapes.items():
        value(model, name).shape = ir.Shape(dims)
        value(model, name).type = ir.TensorType(FLOAT)


@pytest.fixture
def narrowed():
    """x [n,4] -> 8 -> 4, with the width cut to 6 and the old shapes still declared."""
    model = load(
        "h = MatMul(x, w)  r = Relu(h)  s = Sigmoid(x)  y = MatMul(r, v)",
        "float[n,4] x, float[4,8] w, float[8,4] v",
    )
    declare(model, h=["n", 8], r=["n", 8], s=["n", 99])
    for name, dims in (("w", (4, 6)), ("v", (6, 4))):
        old = next(v for v in model.graph.inputs if v.name == name)
        replace_value(model.graph, old, add_initializer(model.graph, name, np.ones(dims), FLOAT))
    return model


def test_only_what_was_touched_changes(narrowed):
    refresh_shapes(narrowed, [value(narrowed, "h"), value(narrowed, "r"), value(narrowed, "y")])
    assert shape(narrowed, "h") == ["n", 6]
    assert shape(narrowed, "r") == ["n", 6]
    assert shape(narrowed, "s") == ["n", 99]  # wrong before, and none of our business
    assert shape(narrowed, "y") == ["n", 4]  # declared


def test_one_of_a_chain(narrowed):
    value(narrowed, "h").shape = ir.Shape(["n", 6])
    refresh_shapes(narrowed, [value(narrowed, "r")])
    assert shape(narrowed, "r") == ["n", 6]


def test_the_result_passes_strict_inference(narrowed):
    proto = onnx.ModelProto.FromString(narrowed.to_bytes())
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    refresh_shapes(narrowed, [value(narrowed, name) for name in ("h", "r", "s")])
    check(narrowed, full=True)
    onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(narrowed.to_bytes()), strict_mode=True)


def test_what_cannot_be_inferred_is_cleared_not_kept():
    model = load("h = my.Custom(x)  r = Relu(h)  y = my.Custom(r)")
    declare(model, h=["n", 8], r=["n", 8])
    refresh_shapes(model, [value(model, "h"), value(model, "r")])
    assert shape(model, "h") is None
    assert shape(model, "r") is None
    assert value(model, "h").dtype == FLOAT


def test_new_values_get_a_type_and_a_shape():
    model = load("h = MatMul(x, w)  y = Relu(h)", "float[n,4] x, float[4,8] w", "float[n,8] y")
    assert value(model, "h").dtype is None
    refresh_shapes(model, [value(model, "h")])
    assert value(model, "h").dtype == FLOAT
    assert shape(model, "h") == ["n", 8]


def test_shapes_that_are_computed_are_followed():
    model = load("""
        s = Shape(x)
        i = Constant<value = int64 {0}>()
        b = Gather(s, i)
        k = Constant<value_ints = [0]>()
        bb = Unsqueeze(b, k)
        tail = Constant<value = int64[2] {2, 2}>()
        to = Concat<axis=0>(bb, tail)
        h = Reshape(x, to)
        y = Reshape(h, s)
    """)
    refresh_shapes(model, [value(model, "h")])
    assert len(shape(model, "h")) == 3
    assert shape(model, "h")[1:] == [2, 2]
    assert not isinstance(shape(model, "h")[0], int)


def test_a_fixed_batch_stays_fixed_and_an_unnamed_one_unnamed():
    model = load("h = Relu(x)  y = Relu(h)", "float[1,4] x", "float[1,4] y")
    refresh_shapes(model, [value(model, "h")])
    assert shape(model, "h") == [1, 4]
    model = load("h = Relu(x)  y = Relu(h)", "float[?,4] x", "float[?,4] y")
    refresh_shapes(model, [value(model, "h")])
    assert shape(model, "h") == [None, 4]


def test_values_inside_a_branch():
    model = load("""
        h = Relu(x)
        y = If (cond) <
            then_branch = t () => (float[n,4] a) { k = Abs(h)  a = Neg(k) },
            else_branch = e () => (float[n,4] b) { b = Identity(h) }
        >
    """, "float[n,4] x, bool cond")  # fmt: skip
    declare(model, h=["n", 4], k=["n", 77])
    refresh_shapes(model, [value(model, "k")])
    assert shape(model, "k") == ["n", 4]


def test_an_if_is_inferred_from_its_branches():
    model = load("""
        h = Relu(x)
        p = If (cond) <
            then_branch = t () => (float[n,4] a) { a = Neg(h) },
            else_branch = e () => (float[n,4] b) { b = Identity(h) }
        >
        y = Relu(p)
    """, "float[n,4] x, bool cond")  # fmt: skip
    declare(model, h=["n", 4], p=["n", 77])
    refresh_shapes(model, [value(model, "p")])
    assert shape(model, "p") == ["n", 4]


def test_large_constants_are_not_needed():
    model = load("h = MatMul(x, x)  y = Relu(h)", "float[4,4] x", "float[4,4] y")
    node = value(model, "h").producer()
    weight = ir.node("Constant", [], {"value": ir.tensor(np.ones((4, 30000), np.float32))}, name="c")
    weight.outputs[0].name = "c"
    model.graph.insert_before(node, weight)
    node.replace_input_with(1, weight.outputs[0])
    refresh_shapes(model, [value(model, "h")])
    assert shape(model, "h") == [4, 30000]
