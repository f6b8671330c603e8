# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.structure import Linear, feedforwards, linear_at, region_behind

RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


W1, W2, G1 = normal(4, 6), normal(6, 3), normal(4, 6)
BASE = {"W1": W1, "b1": normal(6), "W2": W2, "b2": normal(3), "G1": G1, "c": np.abs(normal(6)) + 0.1}
SCALARS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "root2": np.sqrt(2),
    "k": np.sqrt(2 / np.pi),
    "cubic": 0.044715,
}
BASE |= {name: np.float32(value) for name, value in SCALARS.items()}

ERF = "d = Div(z, root2) e = Erf(d) f = Add(e, one) m = Mul(z, f) h = Mul(m, half)"
TANH = """p = Pow(z, three) q = Mul(cubic, p) r = Add(z, q) s = Mul(k, r) t = Tanh(s) u = Add(one, t) v = Mul(half, z)
          h = Mul(v, u)"""
# region from z to h
ACTIVATIONS = {
    "Relu": "h = Relu(z)",
    "Div-Erf-Add-Mul": ERF,
    "Mul-Pow-Add-Tanh": TANH,
    "Sigmoid-Mul": "s = Sigmoid(z) h = Mul(z, s)",
    "PRelu": "h = PRelu(z, c)",
    "HardSwish": "h = HardSwish(z)",
    "Clip": "h = Clip(z, half, two)",
    "LeakyRelu": "h = LeakyRelu <alpha = 0.3> (z)",
    "BatchNormalization-Relu": "n = BatchNormalization(z, c, b1, b1, c) h = Relu(n)",
    "Relu-Mul-Add": "r = Relu(z) m = Mul(c, r) h = Add(m, c)",
    "Greater-Where": "g = Greater(z, half) h = Where(g, z, c)",
    "Softplus": "d = Dropout(z) s = Softplus(d) h = Identity(s)",
    "Mish": "h = Mish(z)",
    "Celu": "h = Celu <alpha = 0.7> (z)",
    "Max-Min": "m = Max(z, half, c) h = Min(m, two)",
    "Abs-Sqrt": "a1 = Abs(z) h = Sqrt(a1)",
    "Gelu": "h = com.microsoft.Gelu(z)",
    "FastGelu": "h = com.microsoft.FastGelu(z)",
    "FastGelu-bias": "h = com.microsoft.FastGelu(z, c)",
    "BiasGelu": "h = com.microsoft.BiasGelu(z, c)",
    "QuickGelu": "h = com.microsoft.QuickGelu <alpha = 1.702> (z)",
}


def plain(parse, region, rank=2, opset=18, extra=None, outputs="float[] y", inputs=""):
    dims = ", ".join(["n", "t", "s"][: rank - 1])
    return parse(
        f"""g (float[{dims}, 4] x{inputs}) => ({outputs}) {{
            y1 = MatMul(x, W1) z = Add(y1, b1)
            {region}
            y2 = MatMul(h, W2) y = Add(y2, b2)
        }}""",
        BASE | (extra or {}),
        opset=opset,
        domains=["com.microsoft"],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_sites_and_their_evaluation(parse, run, rng, activation):
    model = plain(parse, ACTIVATIONS[activation])
    (site,), refusals = feedforwards(model.graph)
    assert refusals == []
    assert site.gate is None
    assert (site.input.name, site.hidden.name, site.output.name, site.name) == ("x", "h", "y", "y")
    assert (site.d_in, site.d_hidden, site.d_out) == (4, 6, 3)
    assert site.activation == activation.removesuffix("-bias")
    x = rng.normal(size=(7, 4)).astype(np.float32)
    z, h = run(model, {"x": x}, ["z", "h"])
    np.testing.assert_allclose(site.evaluate(z), h, rtol=2e-5, atol=2e-6)
    wide = site.evaluate(z.astype(np.float64))
    np.testing.assert_allclose(wide, h, rtol=2e-5, atol=2e-6)


def test_nodes_are_sorted_and_complete(parse):
    model = plain(parse, ERF)
    (site,), _ = feedforwards(model.graph)
    assert set(site.nodes) == set(model.graph)
    seen = set()
    for node in site.nodes:
        assert all(v.producer() in seen for v in node.inputs if v.producer() is not None)
        seen.add(node)
    assert site.params == 4 * 6 + 6 + 6 * 3 + 3


def test_per_channel_constants_of_the_region_count(parse):
    model = plain(parse, "h = PRelu(z, c)")
    (site,), _ = feedforwards(model.graph)
    assert site.params == 4 * 6 + 6 + 6 * 3 + 3 + 6


def test_shared_weights_do_not_count(parse):
    model = parse(
        """g (float[n,4] x) => (float[] y, float[] y2) {
            a = MatMul(x, W1) h = Relu(a) y = MatMul(h, W2)
            s = Identity(W1) t = Tanh(x) a2 = MatMul(t, s) h2 = Relu(a2) y2 = MatMul(h2, V2)
        }""",
        BASE | {"V2": normal(6, 3)},
    )
    (one, two), _ = feedforwards(model.graph)
    assert one.params == two.params == 18


def test_weight_shared_inside_the_site_counts_once(parse):
    model = parse(
        "g (float[n,4] x) => (float[] y) { a = MatMul(x, S) h = Relu(a) y = MatMul(h, S) }",
        {"S": normal(4, 4)},
    )
    (site,), _ = feedforwards(model.graph)
    assert site.params == 16


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("u = MatMul(x, W1) g = MatMul(x, G1) s = Sigmoid(g) a = Mul(g, s) h = Mul(a, u)", "g"),
        ("g = MatMul(x, G1) u = MatMul(x, W1) s = Sigmoid(g) a = Mul(g, s) h = Mul(a, u)", "g"),
        ("u = MatMul(x, W1) g = MatMul(x, G1) s = Sigmoid(g) h = Mul(u, s)", "g"),
        ("u = MatMul(x, W1) g = MatMul(x, G1) b = Mul(u, c) s = Relu(g) h = Mul(b, s)", "g"),
        ("u = Gemm(x, W1, b1) g = Gemm(x, G1) h = Mul(g, u)", "u"),  # bilinear: the first is the gate
    ],
)
def test_gated_sites(parse, run, rng, text, gate):
    model = parse(f"g (float[n,4] x) => (float[] y) {{ {text} y = MatMul(h, W2) }}", BASE)
    (site,), refusals = feedforwards(model.graph)
    assert refusals == []
    assert site.gate.name == gate
    assert {site.gate.name, site.up.name} == {"u", "g"}
    x = rng.normal(size=(7, 4)).astype(np.float32)
    up, gated, h = run(model, {"x": x}, [site.up.name, site.gate.name, "h"])
    np.testing.assert_allclose(site.evaluate(up, gated), h, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match="gated"):
        site.evaluate(up)


def test_plain_site_takes_no_gate(parse):
    (site,), _ = feedforwards(plain(parse, "h = Relu(z)").graph)
    with pytest.raises(ValueError, match="plain"):
        site.evaluate(np.zeros((1, 6)), np.zeros((1, 6)))


@pytest.mark.parametrize("slope", [(6, 1, 1), (1, 6, 1, 1), (1,), (1, 1, 1)])
def test_convolutions(parse, run, rng, slope):
    model = parse(
        """g (float[n,4,h,w] x) => (float[] y) {
            z0 = Conv(x, W1, b1) n1 = BatchNormalization(z0, c, b1, b1, c) h0 = PRelu(n1, s) y = Conv(h0, W2, b2)
        }""",
        BASE | {"W1": normal(6, 4, 1, 1), "W2": normal(3, 6, 1, 1), "s": np.abs(normal(*slope))},
    )
    (site,), _ = feedforwards(model.graph)
    x = rng.normal(size=(2, 4, 3, 3)).astype(np.float32)
    z, h = run(model, {"x": x}, ["z0", "h0"])
    flat = np.moveaxis(z, 1, -1).reshape(-1, 6)
    np.testing.assert_allclose(
        site.evaluate(flat), np.moveaxis(h, 1, -1).reshape(-1, 6), rtol=2e-5, atol=2e-6
    )


def test_weights_on_the_left(parse, run, rng):
    model = parse(
        """g (float[n,4,t] x) => (float[] y) {
            m = MatMul(W1, x) z = Add(m, b) h0 = PRelu(z, s) y = MatMul(W2, h0)
        }""",
        {"W1": normal(6, 4), "b": normal(6, 1), "W2": normal(3, 6), "s": np.abs(normal(6, 1))},
    )
    (site,), _ = feedforwards(model.graph)
    x = rng.normal(size=(2, 4, 5)).astype(np.float32)
    z, h = run(model, {"x": x}, ["z", "h0"])
    ours = site.evaluate(np.moveaxis(z, 1, -1).reshape(-1, 6))
    np.testing.assert_allclose(ours, np.moveaxis(h, 1, -1).reshape(-1, 6), rtol=2e-5, atol=2e-6)


def test_chain_gives_overlapping_sites(parse):
    model = parse(
        """g (float[n,4] x) => (float[] y) {
            a = Gemm(x, A) r = Relu(a) b = Gemm(r, B) s = Relu(b) c = Gemm(s, C) y = Gemm(c, A)
        }""",
        {"A": normal(4, 5), "B": normal(5, 6), "C": normal(6, 4)},
    )
    sites, refusals = feedforwards(model.graph)
    assert [site.name for site in sites] == ["b", "c"]
    assert sites[0].down.node is sites[1].up.node
    assert refusals == []  # c -> y has no region between: that is no site, and no refusal


def test_same_axis_by_another_number(parse):
    model = parse(
        "g (float[n,4,t] x) => (float[] y) { z0 = Conv(x, W1) h0 = Relu(z0) y = MatMul(W2, h0) }",
        {"W1": normal(6, 4, 1), "W2": normal(3, 6)},
    )
    (site,), _ = feedforwards(model.graph)
    assert (site.up.axis, site.down.axis) == (1, -2)


def test_half_precision_casts_are_skipped(parse):
    model = parse(
        """g (float16[n,4] x) => (float16[] y) {
            z = MatMul(x, W1) w = Cast <to = 1> (z) r = Softplus(w) h = Cast <to = 10> (r) y = MatMul(h, W2)
        }""",
        {"W1": W1.astype(np.float16), "W2": W2.astype(np.float16)},
    )
    (site,), _ = feedforwards(model.graph)
    z = np.array([[1e-9, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert site.activation == "Softplus"
    np.testing.assert_allclose(site.evaluate(z), np.log1p(np.exp(z)), rtol=1e-14)


def test_evaluation_leaves_its_input_alone_and_is_repeatable(parse, rng):
    (site,), _ = feedforwards(plain(parse, ERF).graph)
    z = rng.normal(size=(3, 6))
    kept = z.copy()
    first = site.evaluate(z)
    np.testing.assert_array_equal(z, kept)
    np.testing.assert_array_equal(first, site.evaluate(z))


def test_region_behind_a_linear_is_empty(parse):
    model = plain(parse, "h = Relu(z)")
    linear = linear_at(model.graph[0])
    assert isinstance(linear, Linear)
    region = region_behind(linear.output, {linear.output: linear})
    assert region.nodes == ()
    assert region.sources == (linear,)
