# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.structure import constant, constant_array, folded, is_shared, readers


def value(model: ir.Model, name: str) -> ir.Value:
    found = dict(model.graph.initializers) | {v.name: v for v in model.graph.inputs}
    found |= {v.name: v for node in model.graph for v in node.outputs}
    return found[name]


def test_initializer_and_identity_chain(parse):
    model = parse(
        "g (float[n,2] x) => (float[n,2] y) { a = Identity(W) b = Identity(a) y = MatMul(x, b) }",
        {"W": np.float32([[1, 2], [3, 4]])},
    )
    np.testing.assert_array_equal(constant_array(value(model, "b")), [[1, 2], [3, 4]])
    assert constant(value(model, "b")) is constant(value(model, "W"))
    assert constant(value(model, "x")) is None
    assert constant(value(model, "y")) is None
    assert constant(None) is None


def test_overridable_initializer_is_no_constant(parse):
    model = parse(
        "g (float[n,2] x, float[2] s) => (float[n,2] y) { y = Add(x, s) }", {"s": np.float32([1, 2])}
    )
    assert value(model, "s").const_value is not None
    assert constant(value(model, "s")) is None
    assert constant_array(value(model, "s")) is None


@pytest.mark.parametrize(
    ("attribute", "expected", "dtype"),
    [
        ("value_float = 1.5", 1.5, np.float32),
        ("value_floats = [1.5, 2.0]", [1.5, 2.0], np.float32),
        ("value_int = 3", 3, np.int64),
        ("value_ints = [3, 4]", [3, 4], np.int64),
        ("value = float[2] {1.0, 2.0}", [1.0, 2.0], np.float32),
    ],
)
def test_constant_node_forms(parse, attribute, expected, dtype):
    model = parse(f"g (float[2] x) => (float[2] x2) {{ c = Constant <{attribute}> () x2 = Identity(x) }}")
    array = constant_array(value(model, "c"))
    assert array.dtype == dtype
    assert array.shape == np.shape(expected)
    np.testing.assert_array_equal(array, expected)


def test_string_constant_is_read_through(parse):
    model = parse('g (float[2] x) => (float[2] y) { c = Constant <value_string = "hi"> () y = Identity(x) }')
    assert constant_array(value(model, "c")).tolist() == [b"hi"]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("c = Transpose(W)", (3, 2)),
        ("c = Transpose <perm = [1, 0]> (W)", (3, 2)),
        ("s = Constant <value_ints = [3, -1]> () c = Reshape(W, s)", (3, 2)),
        ("s = Constant <value_ints = [0, 3, 1]> () c = Reshape(W, s)", (2, 3, 1)),
        ("s = Constant <value_ints = [0]> () c = Unsqueeze(W, s)", (1, 2, 3)),
        ("s = Constant <value_ints = [-1]> () c = Unsqueeze(W, s)", (2, 3, 1)),
        ("s = Constant <value_ints = [1]> () t = Unsqueeze(W, s) c = Squeeze(t, s)", (2, 3)),
        ("s = Constant <value_ints = [1]> () t = Unsqueeze(W, s) c = Squeeze(t)", (2, 3)),
        ("s = Constant <value_ints = [4, 2, 3]> () c = Expand(W, s)", (4, 2, 3)),
        ("c = Flatten <axis = 0> (W)", (1, 6)),
        ("c = Cast <to = 11> (W)", (2, 3)),
        ("s = Constant <value_ints = [2, 5]> () c = ConstantOfShape <value = float[1] {2.5}> (s)", (2, 5)),
        ("s = Constant <value_ints = [2, 5]> () c = ConstantOfShape(s)", (2, 5)),
    ],
)
def test_expressions_match_the_runtime(parse, run, body, shape):
    model = parse(
        f"g (float[2] x) => (float[2] y) {{ {body} y = Identity(x) }}",
        {"W": np.arange(6, dtype=np.float32).reshape(2, 3)},
    )
    known = folded(value(model, "c"))
    array = constant_array(value(model, "c"))
    expected = run(model, {"x": np.zeros(2, np.float32)}, ["c"])[0]
    assert known.shape == shape == array.shape == expected.shape
    assert known.dtype.numpy() == array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_expressions_of_data_are_not_constant(parse):
    model = parse("g (float[2,3] x) => (float[3,2] y) { y = Transpose(x) }")
    assert folded(value(model, "y")) is None


def test_bfloat16_and_int4(parse):
    brain = np.array([1.0, 2.5], ml_dtypes.bfloat16)
    packed = ir.tensor(np.array([-3, 7], ml_dtypes.int4), name="q")
    model = parse(
        "g (float[2] x) => (float[2] y) { a = Cast <to = 1> (b) c = Cast <to = 1> (q) y = Identity(x) }",
        {"b": brain, "q": ir.to_proto(packed)},
    )
    assert constant_array(value(model, "a")).dtype == np.float32
    np.testing.assert_array_equal(constant_array(value(model, "a")), [1.0, 2.5])
    assert folded(value(model, "c")).storage == ir.DataType.INT4
    np.testing.assert_array_equal(constant_array(value(model, "c")), [-3, 7])


def test_casts_to_8_bit_floats_are_left_to_the_runtime(parse):
    model = parse(
        "g (float[2] x) => (float[2] y) { c = Cast <to = 17> (b) y = Identity(x) }",
        {"b": np.float32([1, 1000])},
        opset=19,
    )
    assert folded(value(model, "c")) is None


def test_readers_through_identity_and_into_subgraphs(parse):
    model = parse(
        """g (float[n,2] x, bool p) => (float[n,2] y) {
            i = Identity(W)
            a = MatMul(x, i)
            y = If (p) <
                then_branch = yes () => (float[n,2] u) { u = MatMul(a, W) },
                else_branch = no () => (float[n,2] v) { v = Identity(a) }
            >
        }""",
        {"W": np.eye(2, dtype=np.float32)},
    )
    root = value(model, "W")
    users = list(readers(root))
    assert [node.op_type for node in users] == ["MatMul", "MatMul"]
    top = next(node for node in model.graph if node.op_type == "MatMul")
    assert is_shared(value(model, "i"), {top})
    assert not is_shared(value(model, "i"), set(users))


def test_constant_that_is_a_graph_output_is_shared(parse):
    model = parse(
        "g (float[n,2] x) => (float[n,2] y, float[2,2] V) { V = Identity(W) y = MatMul(x, W) }",
        {"W": np.eye(2, dtype=np.float32)},
    )
    owner = next(node for node in model.graph if node.op_type == "MatMul")
    assert is_shared(value(model, "W"), {owner})
