# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.errors import ModelError
from onnxcollapse.structure import build_linear, linear_at, linears

A = np.random.default_rng(3).normal(size=(4, 3))
B = np.random.default_rng(4).normal(size=3)
W = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
T = W.T.copy()
CONV = T.reshape(3, 4, 1, 1)
SPELLINGS = {
    "matmul": ("float[5,4] x", "y = MatMul(x, W)", W),
    "matmul add": ("float[2,5,4] x", "m = MatMul(x, W) y = Add(m, b)", W),
    "left": ("float[2,4,5] x", "y = MatMul(W, x)", T),
    "gemm": ("float[5,4] x", "y = Gemm <alpha = 0.5, beta = 2.0> (x, W, b)", W),
    "gemm transB": ("float[5,4] x", "y = Gemm <transB = 1> (x, W)", T),
    "conv": ("float[2,4,5,5] x", "y = Conv(x, W)", CONV),
    "conv 1d": ("float[2,4,5] x", "y = Conv(x, W, b)", CONV[..., 0]),
}


def build(parse, spelling, dtype=np.float32):
    given, body, weight = SPELLINGS[spelling]
    kind = ir.DataType.from_numpy(np.dtype(dtype)).name.lower()
    text = f"g ({given.replace('float', kind)}) => ({kind} y, {kind} z) {{ {body} z = Relu(y) }}"
    return parse(text, {"W": weight.astype(dtype), "b": np.ones(3, dtype)})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_same_spelling_and_equal_to_the_runtime(parse, run, rng, spelling, biased):
    model = build(parse, spelling)
    (like,) = linears(model.graph)
    relu = list(model.graph)[-1]
    old_weights = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}
    out = build_linear(model.graph, relu, like, like.input, A, B if biased else None)
    new = linear_at(
        out.producer() if out.producer().op_type != "Add" else out.producer().inputs[0].producer()
    )
    assert (new.kind, new.axis, new.weight_left, new.rank) == (
        like.kind,
        like.axis,
        like.weight_left,
        like.rank,
    )
    assert new.node.domain == ""
    assert new.output is out
    assert (new.bias is not None) == biased
    x = rng.normal(size=[int(dim) for dim in like.input.shape]).astype(np.float32)
    y = run(model, {"x": x}, [out.name])[0]
    expected = np.moveaxis(x, like.axis, -1).astype(np.float64) @ A + (B if biased else 0)
    np.testing.assert_allclose(np.moveaxis(y, like.axis, -1), expected, rtol=1e-5, atol=2e-6)
    assert tuple(out.shape) == y.shape
    assert out.dtype == ir.DataType.FLOAT
    for name, array in old_weights.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_names_do_not_collide_and_the_order_holds(parse, run):
    model = build(parse, "matmul add")
    (like,) = linears(model.graph)
    relu = list(model.graph)[-1]
    for _ in range(3):
        build_linear(model.graph, relu, like, like.input, A, B)
    names = [v.name for node in model.graph for v in node.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    run(model, {"x": np.zeros((2, 5, 4), np.float32)}, ["z"])


def test_arithmetic_is_cast_once(parse):
    model = build(parse, "gemm", np.float16)
    (like,) = linears(model.graph)
    out = build_linear(model.graph, list(model.graph)[-1], like, like.input, A, B)
    assert out.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(linear_at(out.producer()).matrix(), A.astype(np.float16).astype(np.float64))


def test_overflow_is_refused(parse):
    model = build(parse, "gemm", np.float16)
    (like,) = linears(model.graph)
    with pytest.raises(ModelError, match="FLOAT16"):
        build_linear(model.graph, list(model.graph)[-1], like, like.input, A * 1e6, B)


@pytest.mark.parametrize(
    ("matrix", "offset", "words"),
    [
        (np.ones(4), None, "matrix"),
        (np.ones((5, 3)), None, "4 channels"),
        (np.ones((4, 3)), np.ones(4), "offset"),
    ],
)
def test_wrong_shapes_are_refused(parse, matrix, offset, words):
    model = build(parse, "matmul")
    (like,) = linears(model.graph)
    with pytest.raises(ModelError, match=words):
        build_linear(model.graph, list(model.graph)[-1], like, like.input, matrix, offset)


def test_dynamic_dimensions_stay(parse):
    model = parse("g (float[n,t,4] x) => (float[] y) { y = MatMul(x, W) }", {"W": W})
    (like,) = linears(model.graph)
    out = build_linear(model.graph, like.node, like, like.input, A, None)
    assert [str(dim) for dim in out.shape] == ["n", "t", "3"]
