# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.structure import Linear, Refusal, is_shared, linear_at, linears

W = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
B = np.random.default_rng(2).normal(size=3).astype(np.float32)
X2, X3, X4 = "float[n,4] x", "float[n,t,4] x", "float[n,4,h,w] x"

# input, body (its output is y), initializers, does it have a bias
SPELLINGS = {
    "matmul": (X3, "y = MatMul(x, W)", {"W": W}, False),
    "matmul add": (X3, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, True),
    "add first": (X3, "m = MatMul(x, W) y = Add(b, m)", {"W": W, "b": B}, True),
    "bias [1,1,out]": (X3, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B.reshape(1, 1, 3)}, True),
    "bias scalar": (X3, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": np.float32(0.5)}, True),
    "four dimensions": ("float[2,n,t,4] x", "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, True),
    "vector in": ("float[4] x", "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, True),
    "identity weight": (X2, "i = Identity(W) y = MatMul(x, i)", {"W": W}, False),
    "transposed weight": (X2, "i = Transpose(W) y = MatMul(x, i)", {"W": W.T.copy()}, False),
    "cast weight": (X2, "i = Cast <to = 1> (W) y = MatMul(x, i)", {"W": W.astype(np.float16)}, False),
    "gemm": (X2, "y = Gemm(x, W)", {"W": W}, False),
    "gemm bias": (X2, "y = Gemm(x, W, b)", {"W": W, "b": B}, True),
    "gemm row bias": (X2, "y = Gemm(x, W, b)", {"W": W, "b": B.reshape(1, 3)}, True),
    "gemm scalar bias": (X2, "y = Gemm(x, W, b)", {"W": W, "b": np.float32(2)}, True),
    "gemm all": (
        X2,
        "y = Gemm <transB = 1, alpha = 0.5, beta = 3.0> (x, W, b)",
        {"W": W.T.copy(), "b": B},
        True,
    ),
    "gemm add": (X2, "m = Gemm <alpha = 2.0, beta = 3.0> (x, W) y = Add(b, m)", {"W": W, "b": B}, True),
    "conv": (X4, "y = Conv(x, W)", {"W": W.T.reshape(3, 4, 1, 1)}, False),
    "conv bias": (X4, "y = Conv(x, W, b)", {"W": W.T.reshape(3, 4, 1, 1), "b": B}, True),
    "conv add": (
        X4,
        "m = Conv(x, W) y = Add(m, b)",
        {"W": W.T.reshape(3, 4, 1, 1), "b": B.reshape(3, 1, 1)},
        True,
    ),
    "conv same": (X4, 'y = Conv <auto_pad = "SAME_UPPER"> (x, W)', {"W": W.T.reshape(3, 4, 1, 1)}, False),
    "conv 1d": ("float[n,4,t] x", "y = Conv(x, W, b)", {"W": W.T.reshape(3, 4, 1), "b": B}, True),
    "weight left": ("float[n,4,t] x", "y = MatMul(W, x)", {"W": W.T.copy()}, False),
    "weight left bias": (
        "float[n,4,t] x",
        "m = MatMul(W, x) y = Add(m, b)",
        {"W": W.T.copy(), "b": B.reshape(3, 1)},
        True,
    ),
}


def build(parse, spelling):
    given, body, weights, biased = SPELLINGS[spelling]
    return parse(f"g ({given}) => (float[] y) {{ {body} }}", weights), biased


def feed(model: ir.Model, rng, channels=4):
    shape = [dim if isinstance(dim, int) else 5 for dim in model.graph.inputs[0].shape]
    dtype = model.graph.inputs[0].dtype.numpy()
    return rng.normal(size=shape).astype(dtype)


def rows(array, axis):
    return np.moveaxis(array, axis, -1)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_matrix_and_offset_equal_the_runtime(parse, run, rng, spelling):
    model, biased = build(parse, spelling)
    (linear,) = linears(model.graph)
    x = feed(model, rng)
    y = run(model, {"x": x}, ["y"])[0]
    assert linear.output.name == linear.name == "y"
    assert linear.input.name == "x"
    assert (linear.bias is not None) == biased
    assert linear.matrix().shape == (4, 3) == (linear.in_features, linear.out_features)
    assert linear.offset().shape == (3,)
    assert linear.matrix().dtype == linear.offset().dtype == np.float64
    ours = rows(x, linear.axis).astype(np.float64) @ linear.matrix() + linear.offset()
    np.testing.assert_allclose(ours, rows(y, linear.axis), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_description(parse, spelling):
    model, _ = build(parse, spelling)
    (linear,) = linears(model.graph)
    expected = {"Conv": ("conv", 1), "Gemm": ("gemm", -1), "MatMul": ("matmul", -1)}[linear.node.op_type]
    assert linear.kind == expected[0]
    assert linear.axis == (-2 if spelling.startswith("weight left") else expected[1])
    assert linear.weight_left == spelling.startswith("weight left")
    assert linear.nodes == tuple(node for node in (linear.node, linear.bias_node) if node is not None)
    assert linear.params == 12 + (0 if linear.bias is None else linear.bias.const_value.size)
    assert linear.dtype == ir.DataType.FLOAT


def test_matrix_does_not_alias_the_weight(parse):
    model, _ = build(parse, "matmul")
    (linear,) = linears(model.graph)
    linear.matrix()[:] = 0
    np.testing.assert_array_equal(linear.matrix(), W.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_element_types(parse, dtype):
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    model = parse(
        f"g ({kind.name.lower()}[n,4] x) => (float[] y) {{ m = MatMul(x, W) y = Add(m, b) }}",
        {"W": W.astype(dtype), "b": B.astype(dtype)},
    )
    (linear,) = linears(model.graph)
    assert linear.dtype == kind
    np.testing.assert_array_equal(linear.matrix(), W.astype(dtype).astype(np.float64))
    np.testing.assert_array_equal(linear.offset(), B.astype(dtype).astype(np.float64))


# input, body, initializers, words of the reason
REFUSED = {
    "no weight": ("float[n,4] x, float[4,3] v", "y = MatMul(x, v)", {}, "no operand is a constant"),
    "both constant": (X2, "y = MatMul(W, V)", {"W": W, "V": W.T.copy()}, "both operands"),
    "batched weight": (X3, "y = MatMul(x, W)", {"W": W.reshape(1, 4, 3)}, "weight has 3 dimensions"),
    "vector weight": (X2, "y = MatMul(x, W)", {"W": W[:, 0]}, "weight has 1 dimensions"),
    "overridable": (f"{X2}, float[4,3] W", "y = MatMul(x, W)", {"W": W}, "W is overridable"),
    "overridable identity": (
        f"{X2}, float[4,3] W",
        "i = Identity(W) y = MatMul(x, i)",
        {"W": W},
        "W is overridable",
    ),
    "overridable bias": (f"{X2}, float[3] b", "y = Gemm(x, W, b)", {"W": W, "b": B}, "bias b is overridable"),
    "computed bias": (f"{X2}, float[3] b", "y = Gemm(x, W, b)", {"W": W}, "computed at run time"),
    "bias by row": (
        "float[2,4] x",
        "y = Gemm(x, W, b)",
        {"W": W, "b": np.ones((2, 3), np.float32)},
        "differs between rows",
    ),
    "transA": ("float[4,n] x", "y = Gemm <transA = 1> (x, W)", {"W": W}, "transA"),
    "gemm left": ("float[3,n] x", "y = Gemm(W, x)", {"W": W}, "operand A"),
    "computed weight": (
        X2,
        "i = Mul(W, s) y = MatMul(x, i)",
        {"W": W, "s": np.float32(2)},
        "at run time (Mul)",
    ),
    "int8 cast": (X2, "i = Cast <to = 1> (W) y = MatMul(x, i)", {"W": W.astype(np.int8)}, "quantised (int8"),
    "int8 scaled": (
        X2,
        "i = Cast <to = 1> (W) j = Mul(i, s) y = MatMul(x, j)",
        {"W": W.astype(np.int8), "s": np.float32(0.1)},
        "quantised (int8 behind Mul)",
    ),
    "dequantised": (
        X2,
        "i = DequantizeLinear(W, s) y = MatMul(x, i)",
        {"W": W.astype(np.int8), "s": np.float32(0.1)},
        "DequantizeLinear",
    ),
    "integer": (X2, "y = MatMulInteger(x, W)", {"W": W.astype(np.int8)}, "quantised (MatMulInteger)"),
    "int32": ("int32[n,4] x", "y = MatMul(x, W)", {"W": W.astype(np.int32)}, "weight is int32"),
    "3x3": (X4, "y = Conv(x, W)", {"W": np.ones((3, 4, 3, 3), np.float32)}, "kernel is 3x3"),
    "groups": (X4, "y = Conv <group = 2> (x, W)", {"W": np.ones((2, 2, 1, 1), np.float32)}, "2 groups"),
    "stride": (X4, "y = Conv <strides = [2, 2]> (x, W)", {"W": W.T.reshape(3, 4, 1, 1)}, "strides"),
    "pads": (X4, "y = Conv <pads = [1, 1, 1, 1]> (x, W)", {"W": W.T.reshape(3, 4, 1, 1)}, "pads"),
    "left of unknown rank": (
        "float x",
        "i = Loop2(x) y = MatMul(W, i)",
        {"W": W.T.copy()},
        "rank of the data",
    ),
    "relu": (X2, "y = Relu(x)", {}, "not a Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(parse, case):
    given, body, weights, reason = REFUSED[case]
    model = parse(f"g ({given}) => (float[] y) {{ {body} }}", weights)
    assert linears(model.graph) == []
    refusal = linear_at(list(model.graph)[-1])
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert refusal.node_name == "y"


@pytest.mark.parametrize(
    ("op", "reason"), [("MatMulNBits", "quantised"), ("FusedMatMul", "fused"), ("MoE", "fused")]
)
def test_runtime_ops_are_refused_by_name(parse, op, reason):
    model = parse(
        f"g ({X2}) => (float[] y) {{ y = com.microsoft.{op}(x, W) }}", {"W": W}, domains=["com.microsoft"]
    )
    refusal = linear_at(model.graph[0])
    assert op in refusal.reason
    assert reason in refusal.reason
    assert refusal.candidate


def test_old_opsets_are_refused(parse):
    model = parse(f"g ({X2}) => (float[] y) {{ y = MatMul(x, W) }}", {"W": W}, opset=6)
    assert "opset 6" in linear_at(model.graph[0]).reason


def test_attribute_of_a_function_is_refused():
    node = ir.Node(
        "",
        "Gemm",
        [ir.Value(name="x"), ir.Value(name="w")],
        [ir.RefAttr("transB", "t", ir.AttributeType.INT)],
    )
    assert "function's caller" in linear_at(node).reason


# Adds that are no bias: the Linear ends before them
NO_BIAS = {
    "raw output used twice": (X2, "m = MatMul(x, W) y = Add(m, b) z = Relu(m)", {"W": W, "b": B}, "y"),
    "raw output twice in the Add": (X2, "m = MatMul(x, W) y = Add(m, m)", {"W": W}, "y"),
    "raw output is a graph output": (X2, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, "y, float[] m"),
    "differs between rows": (
        X3,
        "m = MatMul(x, W) y = Add(m, b)",
        {"W": W, "b": np.ones((5, 3), np.float32)},
        "y",
    ),
    "raises the rank": (X2, "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B.reshape(1, 1, 3)}, "y"),
    "widens one channel": (X2, "m = MatMul(x, W) y = Add(m, b)", {"W": W[:, :1].copy(), "b": B}, "y"),
    "overridable": (f"{X2}, float[3] b", "m = MatMul(x, W) y = Add(m, b)", {"W": W, "b": B}, "y"),
    "residual": ("float[n,4] x, float[n,3] r", "m = MatMul(x, W) y = Add(m, r)", {"W": W}, "y"),
    "along the image": (X4, "m = Conv(x, W) y = Add(m, b)", {"W": W.T.reshape(3, 4, 1, 1), "b": B}, "y"),
    "second bias": (X2, "m = Gemm(x, W, b) y = Add(m, b)", {"W": W, "b": B}, "y"),
    "unknown rank": (
        "float x",
        "i = Op(x) m = MatMul(i, W) y = Add(m, b)",
        {"W": W, "b": B.reshape(1, 3)},
        "y",
    ),
}


@pytest.mark.parametrize("case", NO_BIAS)
def test_add_that_is_no_bias(parse, case):
    given, body, weights, outputs = NO_BIAS[case]
    model = parse(f"g ({given}) => (float {outputs}) {{ {body} }}", weights)
    (linear,) = linears(model.graph)
    assert linear.bias_node is None
    assert linear.name == "m"


def test_bias_add_inside_a_branch_is_none(parse):
    model = parse(
        """g (float[n,4] x, bool p) => (float[n,3] y) {
            m = MatMul(x, W)
            y = If (p) <
                then_branch = yes () => (float[n,3] u) { u = Add(m, b) },
                else_branch = no () => (float[n,3] v) { v = Constant <value = float[1,3] {1.0, 2.0, 3.0}> () }
            >
        }""",
        {"W": W, "b": B},
    )
    (linear,) = linears(model.graph)
    assert linear.bias_node is None


def test_several_in_graph_order_with_shared_weight(parse):
    model = parse(
        f"""g ({X2}) => (float[] y) {{
            i = Identity(W) a = MatMul(x, W) t = Transpose(a) c = Transpose(t) d = MatMul(c, V) y = MatMul(d, i)
        }}""",
        {"W": W, "V": W.T.copy()},
    )
    assert [linear.name for linear in linears(model.graph)] == ["a", "d", "y"]


def test_tied_embedding_stays_a_linear(parse):
    model = parse(
        "g (int64[n] ids) => (float[] y) { e = Gather(W, ids) t = Transpose(W) y = MatMul(e, t) }", {"W": W}
    )
    (linear,) = linears(model.graph)
    np.testing.assert_array_equal(linear.matrix(), W.T.astype(np.float64))
    assert isinstance(linear_at(model.graph[0]), Refusal)
    assert is_shared(linear.weight, {linear.node})  # the embedding reads it, too


def test_old_wide_weight_is_named_after_an_edit(parse):
    from onnxcollapse.errors import ModelError

    model, _ = build(parse, "matmul")
    (linear,) = linears(model.graph)
    model.graph.initializers.pop("W")
    assert isinstance(linear, Linear)
    with pytest.raises(ModelError, match="no longer a constant"):
        linear.matrix()
