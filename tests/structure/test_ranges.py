# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcollapse.structure import ranges

RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


C3 = np.float32([0.5, -2.0, 3.0])
MATRIX = {
    "c": C3,
    "p": np.abs(C3),
    "W": normal(3, 5),
    "b": normal(5),
    "k": np.float32(1.7),
    "r": normal(4, 3),
}
IMAGE = {
    "c": C3.reshape(3, 1, 1),
    "p": np.abs(C3),
    "v": C3,
    "W": normal(4, 3, 3, 3),
    "b": normal(4),
    "D": normal(6, 1, 2, 2),
    "P": normal(3, 2),
    "k": np.float32(0.3),
    "t": np.int64([0, 48]),
}
ON_MATRIX = """
y = Add(x, c)
y = Sub(c, x)
y = Mul(x, c)
y = Div(x, c)
y = Div(c, x)
y = Add(x, r)
y = Mul(x, x)
y = Neg(x)
y = Abs(x)
y = Relu(x)
y = LeakyRelu(x)
y = LeakyRelu <alpha = -0.5> (x)
y = LeakyRelu <alpha = 1.5> (x)
y = PRelu(x, c)
y = Sigmoid(x)
y = Tanh(x)
y = Erf(x)
y = Exp(x)
y = Clip(x, k, k)
y = Clip(x, k)
y = Clip(x, , k)
y = Softmax(x)
y = LogSoftmax(x)
y = Softplus(x)
y = Elu(x)
y = HardSigmoid(x)
y = HardSwish(x)
y = Mish(x)
y = com.microsoft.Gelu(x)
y = com.microsoft.FastGelu(x, c)
y = com.microsoft.QuickGelu(x)
y = com.microsoft.BiasGelu(x, c)
y = Floor(x)
y = Ceil(x)
y = Max(x, k)
y = Min(x, c, k)
y = Sum(x, c, x)
a = Abs(x) y = Sqrt(a)
two = Constant <value_float = 2.0> () y = Pow(x, two)
y = MatMul(x, W)
t = Transpose(x) y = MatMul(r, t)
y = Gemm(x, W, b)
y = Gemm <alpha = -0.5, beta = 2.0> (x, W, b)
t = Transpose(W) y = Gemm <transB = 1> (x, t)
y = LayerNormalization(x, c, p)
y = LayerNormalization(x, c)
y = BatchNormalization(x, c, p, c, p)
y = Concat <axis = 1> (x, r)
y = Concat <axis = 0> (x, c2)
y = Concat <axis = -1> (x, r, x)
y = Transpose(x)
y = Identity(x)
y = Dropout(x)
s = Constant <value_ints = [2, 2, 3]> () y = Reshape(x, s)
s = Constant <value_ints = [-1]> () y = Reshape(x, s)
u = Cast <to = 10> (x) y = Neg(x)
u = Cast <to = 9> (x) y = Neg(x)
u = Cast <to = 7> (x) y = Neg(x)
m = Greater(x, k) y = Where(m, x, c)
y = ReduceMean <axes = [0]> (x)
y = ReduceMax <axes = [1]> (x)
i = Constant <value_ints = [2, 0]> () y = Gather <axis = 1> (x, i)
y, z = Split <axis = 1> (x, s2)
s = Constant <value_ints = [0]> () y = Unsqueeze(x, s)
i = Constant <value_ints = [1, 0, 0, 2]> () y = Pad(x, i)
""".strip().splitlines()
ON_IMAGE = """
y = Conv(x, W, b)
y = Conv <pads = [1, 1, 1, 1]> (x, W)
y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, W)
y = Conv <group = 3> (x, D)
y = Conv <dilations = [2, 2], pads = [2, 2, 2, 2]> (x, W, b)
y = MaxPool <kernel_shape = [2, 2]> (x)
y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)
y = AveragePool <kernel_shape = [2, 2]> (x)
y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)
y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)
y = GlobalAveragePool(x)
y = GlobalMaxPool(x)
y = BatchNormalization(x, v, p, v, p)
y = Mul(x, c)
y = PRelu(x, c)
a = Mul(x, c) y = Flatten(a)
a = Mul(x, c) y = Reshape(a, t)
a = Mul(x, c) y = Transpose <perm = [0, 2, 3, 1]> (a)
a = Mul(x, c) g = GlobalAveragePool(a) f = Flatten(g) y = MatMul(f, P)
a = Mul(x, c) y = Concat <axis = 1> (a, x)
a = Mul(x, c) f = Flatten <axis = 2> (a) y = Relu(f)
""".strip().splitlines()


def check(run, model, boxes, feeds):
    """Every tensor that the runtime computes lies within its bounds, with no tolerance at all."""
    found = ranges(model.graph, boxes)
    values = [
        v for node in model.graph for v in node.outputs if v.dtype is None or v.dtype != ir.DataType.BOOL
    ]
    for value, array in zip(values, run(model, feeds, [v.name for v in values]), strict=True):
        bound = found.of(value)
        array = array.astype(np.float64)
        assert np.broadcast_shapes(bound.low.shape, array.shape) == array.shape, value.name
        good = np.isfinite(array)  # bounds are promised for finite tensors
        assert (~good | (bound.low <= array)).all(), (value.name, bound.low, array)
        assert (~good | (array <= bound.high)).all(), (value.name, bound.high, array)


def extreme(rng, box, shape):
    """Points of the box, corners more often than by chance."""
    low, high = box
    x = rng.uniform(low, high, shape)
    corner = rng.random(shape)
    return np.clip(
        np.where(corner < 0.2, low, np.where(corner > 0.8, high, x)).astype(np.float32), *np.float32(box)
    )


boxes = st.tuples(st.floats(-8, 8, width=32), st.floats(0, 6, width=32)).map(
    lambda b: (b[0], float(np.float32(b[0] + b[1])))
)
lenient = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("body", ON_MATRIX)
@given(box=boxes, seed=st.integers(0, 1000))
@lenient
def test_values_lie_within_the_bounds(parse, run, body, box, seed):
    weights = MATRIX | {"c2": normal(2, 3), "s2": np.int64([1, 2])}
    model = parse(
        f"g (float[4,3] x) => (float[] y) {{ {body} }}",
        weights,
        opset=18 if "Mish" in body else 17,
        domains=["com.microsoft"],
    )
    check(run, model, {"x": box}, {"x": extreme(np.random.default_rng(seed), box, (4, 3))})


@pytest.mark.parametrize("body", ON_MATRIX)
def test_half_bounded_values_lie_within_the_bounds(parse, run, rng, body):
    """Behind a Relu only the lower bound is known."""
    weights = MATRIX | {"c2": normal(2, 3), "s2": np.int64([1, 2])}
    for prefix in ("x = Relu(x0)", "r0 = Relu(x0) x = Neg(r0)", "r0 = Relu(x0) x = Mul(r0, c)"):
        text = f"g (float[4,3] x0) => (float[] y) {{ {prefix} {body} }}"
        model = parse(text, weights, opset=18 if "Mish" in body else 17, domains=["com.microsoft"])
        check(run, model, {}, {"x0": (rng.normal(size=(4, 3)) * 5).astype(np.float32)})


@pytest.mark.parametrize("body", ON_IMAGE)
@given(box=boxes, seed=st.integers(0, 1000))
@lenient
def test_values_lie_within_the_bounds_of_images(parse, run, body, box, seed):
    model = parse(f"g (float[2,3,4,4] x) => (float[] y) {{ {body} }}", IMAGE)
    check(run, model, {"x": box}, {"x": extreme(np.random.default_rng(seed), box, (2, 3, 4, 4))})


DEEP = """
    a = Gemm(x, W1, b1) r = Relu(a) m = Gemm <transB = 1> (r, W2, b2)
    s = Sigmoid(m) p = Mul(m, s) n = LayerNormalization(p, g, b3)
    q = MatMul(n, W3) t = Tanh(q) d = Add(t, k) h = HardSwish(d) y = Softmax(h)
"""


@given(box=boxes, seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_deep_nets_lie_within_the_bounds(parse, run, box, seed, scale):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.normal(size=shape) * scale).astype(np.float32)

    shapes = {
        "W1": (6, 40),
        "b1": (40,),
        "W2": (20, 40),
        "b2": (20,),
        "g": (20,),
        "b3": (20,),
        "W3": (20, 5),
        "k": (5,),
    }
    model = parse(
        f"g (float[9,6] x) => (float[] y) {{ {DEEP} }}",
        {name: draw(*shape) for name, shape in shapes.items()},
    )
    check(run, model, {"x": box}, {"x": extreme(rng, box, (9, 6))})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@given(seed=st.integers(0, 1000))
@lenient
def test_other_precisions(parse, run, dtype, seed):
    rng = np.random.default_rng(seed)
    kind = ir.DataType.from_numpy(np.dtype(dtype)).name.lower()
    text = f"g ({kind}[7,30] x) => ({kind} y) {{ a = MatMul(x, W) c = Add(a, b) s = Sigmoid(c) y = MatMul(s, V) }}"
    weights = {"W": rng.normal(size=(30, 20)), "b": rng.normal(size=20), "V": rng.normal(size=(20, 3))}
    model = parse(text, {name: array.astype(dtype) for name, array in weights.items()})
    check(run, model, {"x": (-2.0, 2.0)}, {"x": rng.uniform(-2, 2, (7, 30)).astype(dtype)})


def value(model, name):
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def test_bounds_of_a_linear_are_tight(parse):
    w = np.float32([[1.0, -2.0], [3.0, 0.5]])
    model = parse(
        "g (float[n,2] x) => (float[] y) { m = MatMul(x, W) y = Add(m, b) }",
        {"W": w, "b": np.float32([10, 20])},
    )
    low, high = ranges(model.graph, {"x": (-1.0, 2.0)}).channels(value(model, "y"), -1, 2)
    np.testing.assert_allclose(low, [10 - 4, 20 - 4 - 0.5], rtol=1e-5)
    np.testing.assert_allclose(high, [10 + 8, 20 + 2 + 1], rtol=1e-5)
    assert (low < [6, 15.5]).all()
    assert (high > [18, 23]).all()


def test_relu_before_a_linear_makes_neurons_provable(parse):
    w = np.float32([[1.0, -1.0, 1.0], [2.0, -3.0, -1.0]])
    model = parse(
        "g (float[n,2] x) => (float[] y) { r = Relu(x) m = MatMul(r, W) y = Add(m, b) }",
        {"W": w, "b": np.float32([0.5, -0.5, 0.5])},
    )
    low, high = ranges(model.graph, {}).channels(value(model, "y"), -1, 3)
    assert low[0] > 0
    assert high[0] == np.inf
    assert high[1] < 0
    assert low[1] == -np.inf
    assert (low[2], high[2]) == (-np.inf, np.inf)


def test_a_sign_within_rounding_is_not_proven(parse):
    """x1 - x2 + 1e-9 >= 0 for x1 >= 1 >= x2 in exact arithmetic, but not in float32."""
    model = parse(
        "g (float[n,2] x) => (float[] y) { s = Sigmoid(x) m = Add(s, k) y = MatMul(m, W) }",
        {"k": np.float32([1, 0]), "W": np.float32([[1.0], [-1.0]])},
    )
    low, _ = ranges(model.graph, {}).channels(value(model, "y"), -1, 1)
    assert low[0] < 0


def test_no_box_and_unknown_ops_are_unbounded(parse):
    model = parse(
        """g (float[n,2] x, float[2] o) => (float[] y) {
            a = Sin2(x) b = Relu(a) c = Add(x, o) d = MatMul(x, x) y = Exp(b)
        }""",
        {"o": np.float32([1, 2])},
    )
    found = ranges(model.graph, {"x": (0.0, 1.0)})
    assert found.of(value(model, "a")).is_unbounded
    assert found.of(value(model, "c")).is_unbounded  # o is overridable
    assert found.of(value(model, "d")).is_unbounded
    assert found.of(value(model, "b")).low == 0
    assert found.of(value(model, "b")).high == np.inf
    boxed = ranges(model.graph, {"x": (0.0, 1.0), "o": (1.0, 1.0)})
    np.testing.assert_allclose(boxed.of(value(model, "c")).high, 2.0, rtol=1e-5)


def test_integers_are_not_real_numbers(parse):
    model = parse(
        "g (uint8[n,2] x, int64[n,2] i) => (float[] y) { d = Div(i, k) c = Cast <to = 1> (x) y = Div(c, f) }",
        {"k": np.int64(2), "f": np.float32(255)},
    )
    found = ranges(model.graph, {"i": (7.0, 7.0)})
    assert found.of(value(model, "d")).is_unbounded
    np.testing.assert_allclose(found.of(value(model, "y")).high, 1.0, rtol=1e-5)
    assert found.of(value(model, "y")).high >= 1


def test_layer_norm_needs_the_number_of_elements(parse):
    weights = {"g": np.ones(16, np.float32), "one": np.ones(1, np.float32)}
    model = parse(
        """g (float[n,3,16] x) => (float[] y) {
            y = LayerNormalization(x, g) a = LayerNormalization(x, one) b = LayerNormalization <axis = 1> (x, g)
        }""",
        weights,
    )
    found = ranges(model.graph, {})
    np.testing.assert_allclose(found.of(value(model, "y")).high, np.full(16, 4.0), rtol=1e-3)
    assert found.of(value(model, "a")).is_unbounded
    assert found.of(value(model, "b")).is_unbounded


def test_wrong_declared_shapes_do_not_shift_channels(parse):
    model = parse(
        "g (float[n,3,2,2] x) => (float[] y) { a = Mul(x, c) y = Flatten(a) }",
        {"c": np.float32([1, 2, 3]).reshape(3, 1, 1)},
    )
    value(model, "a").shape = ir.Shape(["n", 5, 2, 2])
    bound = ranges(model.graph, {"x": (0.0, 1.0)}).of(value(model, "y"))
    assert bound.shape == ()
    low, high = ranges(model.graph, {"x": (0.0, 1.0)}).channels(value(model, "y"), -1, 12)
    np.testing.assert_allclose(high, 3.0, rtol=1e-5)
    np.testing.assert_allclose(low, 0.0, atol=1e-30)


def test_conv_padding_counts_as_zero(parse):
    model = parse(
        "g (float[n,1,4,4] x) => (float[] y, float[] z) { y = Conv <pads = [1, 1, 1, 1]> (x, W) z = Conv(x, W) }",
        {"W": np.ones((1, 1, 3, 3), np.float32)},
    )
    found = ranges(model.graph, {"x": (1.0, 2.0)})
    assert found.of(value(model, "y")).low < 1e-6
    np.testing.assert_allclose(found.of(value(model, "z")).low, [[[9.0]]], rtol=1e-4)


def test_weights_behind_unbounded_data_are_not_read(parse):
    model = parse("g (float[n,2] x) => (float[] y) { y = MatMul(x, W) }", {"W": normal(2, 2)})
    value_ = model.graph.initializers["W"]
    value_.const_value = ir.LazyTensor(lambda: pytest.fail("read"), ir.DataType.FLOAT, ir.Shape([2, 2]))
    assert ranges(model.graph, {}).of(value(model, "y")).is_unbounded


def test_channel_axis_of_images(parse):
    model = parse("g (float[n,3,4,4] x) => (float[] y) { y = Mul(x, c) }", {"c": C3.reshape(3, 1, 1)})
    found = ranges(model.graph, {"x": (0.0, 1.0)})
    low, high = found.channels(value(model, "y"), 1, 3)
    np.testing.assert_allclose(high, [0.5, 0, 3], rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(low, [0, -2, 0], rtol=1e-5, atol=1e-30)
    low, high = found.channels(value(model, "y"), -1, 4)
    np.testing.assert_allclose(high, [3] * 4, rtol=1e-5)


def test_deep_graphs_need_no_recursion(parse):
    steps = " ".join(f"v{i + 1} = Relu(v{i})" for i in range(3000))
    model = parse(f"g (float[n] v0) => (float v3000) {{ {steps} }}")
    assert ranges(model.graph, {}).of(value(model, "v3000")).low == 0
