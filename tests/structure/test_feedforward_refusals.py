# SPDX-License-Identifier: Apache-2.0
"""Places that resemble a FeedForward site but are none, each with its reason."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.structure import feedforwards

RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


BASE = {"W1": normal(4, 6), "b1": normal(6), "W2": normal(6, 3), "b2": normal(3), "G1": normal(4, 6)}
BASE |= {"c": np.abs(normal(6)) + 0.1, "half": np.float32(0.5)}


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


REFUSED = {
    "hidden is an output": (
        "h = Relu(z)",
        {"outputs": "float[] y, float[] h"},
        "hidden tensor h is a graph output",
    ),
    "pre-activation is an output": (
        "h = Relu(z)",
        {"outputs": "float[] y, float[] z"},
        "z is a graph output",
    ),
    "hidden is used elsewhere": (
        "h = Relu(z) o = Tanh(h)",
        {"outputs": "float[] y, float[] o"},
        "h is also used by o (Tanh)",
    ),
    "inner is used elsewhere": (
        "i = Relu(z) h = Neg(i) o = Exp(i)",
        {"outputs": "float[] y, float[] o"},
        "i is also used by o",
    ),
    "mask is used": ("h, o = Dropout(z) p = Not(o)", {"outputs": "float[] y, bool p"}, "mask is used"),
    "training": ("h = Dropout(z, half, yes)", {"extra": {"yes": np.array(True)}}, "training mode"),
    "rows are mixed": ("h = Mul(z, r)", {"extra": {"r": normal(5, 1)}}, "mix rows"),
    "rows are mixed by a matrix": ("h = Mul(z, r)", {"extra": {"r": normal(5, 6)}}, "mix rows"),
    "the rank is raised": ("h = Mul(z, r)", {"extra": {"r": normal(1, 1, 6)}}, "mix rows"),
    "slope is overridable": (
        "h = PRelu(z, s)",
        {"extra": {"s": normal(6)}, "inputs": ", float[6] s"},
        "s is overridable",
    ),
    "batch norm on tokens": (
        "n = BatchNormalization(z, c, b1, b1, c) h = Relu(n)",
        {"rank": 3},
        "BatchNormalization acts on axis 1",
    ),
    "batch norm of data": (
        "n = BatchNormalization(z, c, d, b1, c) h = Relu(n)",
        {"extra": {"d": normal(6)}, "inputs": ", float[6] d"},
        "overridable",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(parse, case):
    region, arguments, reason = REFUSED[case]
    sites, (refusal,) = feedforwards(plain(parse, region, **arguments).graph)
    assert sites == []
    assert refusal.name == "y"
    assert reason in refusal.reason


def test_what_moves_channels_is_named(parse):
    """GPT-2's Conv1D is exported as Reshape, Gemm, Reshape; GLU as one Linear and a Split."""
    wide = {"V": normal(4, 12), "split": np.int64([6, 6]), "flat": np.int64([-1, 6])}
    reshaped = parse(
        "g (float[n,t,4] x) => (float[] y) { z = MatMul(x, W1) r = Relu(z) h = Reshape(r, flat) y = MatMul(h, W2) }",
        BASE | wide,
    )
    halved = parse(
        """g (float[n,4] x) => (float[] y) {
            z = MatMul(x, V) u, g1 = Split <axis = -1> (z, split) s = Sigmoid(g1) h = Mul(u, s) y = MatMul(h, W2)
        }""",
        BASE | wide,
    )
    for model, op in ((reshaped, "Reshape"), (halved, "Split")):
        sites, (refusal,) = feedforwards(model.graph)
        assert sites == []
        assert refusal.name == "y"
        assert f"a {op}, lies between the Linears" in refusal.reason


def test_a_reshape_before_attention_is_no_refusal(parse):
    model = parse(
        """g (float[n,t,4] x) => (float[] y) {
            q = MatMul(x, W1) t1 = Transpose <perm = [0, 2, 1]> (q) s = MatMul(q, t1) p = Softmax(s) o = MatMul(p, q)
            r = Reshape(o, shape) y = MatMul(r, W2)
        }""",
        BASE | {"shape": np.int64([0, 0, 6])},
    )
    assert feedforwards(model.graph) == ([], [])


NO_SITE = {
    "residual": "s = Relu(z) h = Add(s, r)",
    "softmax": "h = Softmax(z)",
    "norm": "h = LayerNormalization(z, c, b1)",
    "foreign activation": "h = my.Relu(z)",
}


@pytest.mark.parametrize("case", NO_SITE)
def test_other_things_are_no_sites_and_no_refusals(parse, case):
    model = parse(
        f"g (float[n,4] x, float[n,6] r) => (float[] y) {{ z = MatMul(x, W1) {NO_SITE[case]} y = MatMul(h, W2) }}",
        BASE,
        domains=["my"],
    )
    assert feedforwards(model.graph) == ([], [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "t = Tanh(x) u = MatMul(t, W1) g = MatMul(x, G1) s = Relu(g) h = Mul(u, s)",
            "read different tensors",
        ),
        (
            "u = MatMul(x, W1) g = MatMul(x, G1) v = MatMul(x, V) a = Mul(u, g) h = Mul(a, v)",
            "reads 3 Linears",
        ),
        ("u = MatMul(x, W1) g = MatMul(x, N) s = Sigmoid(g) h = Mul(u, s)", "6 and 1 channels"),
        ("u = MatMul(x, N) h = Expand2(u)", None),
        ("u = MatMul(x, N) h = Max(u, c)", "mix rows"),
    ],
)
def test_gated_refusals(parse, text, reason):
    weights = BASE | {"V": normal(4, 6), "N": normal(4, 1)}
    sites, refusals = feedforwards(
        parse(f"g (float[n,4] x) => (float[] y) {{ {text} y = MatMul(h, W2) }}", weights).graph
    )
    assert sites == []
    assert [reason in refusal.reason for refusal in refusals] == ([] if reason is None else [True])


def test_slope_along_the_image_is_refused(parse):
    model = parse(
        "g (float[n,4,6,6] x) => (float[] y) { z0 = Conv(x, W1) h0 = PRelu(z0, c) y = Conv(h0, W2) }",
        BASE | {"W1": normal(6, 4, 1, 1), "W2": normal(3, 6, 1, 1)},
    )
    sites, (refusal,) = feedforwards(model.graph)
    assert sites == []
    assert "constant c" in refusal.reason


def test_channels_that_change_axis_are_refused(parse):
    model = parse(
        "g (float[n,4,6] x) => (float[] y) { z0 = Conv(x, W1) h0 = Relu(z0) y = MatMul(h0, W2) }",
        BASE | {"W1": normal(6, 4, 1)},
    )
    sites, (refusal,) = feedforwards(model.graph)
    assert sites == []
    assert "axis" in refusal.reason


def test_unknown_rank_is_said(parse):
    model = parse(
        "g (float x) => (float[] y) { o = Op(x) z = MatMul(o, W1) m = Mul(z, r) h = Relu(m) y = MatMul(h, W2) }",
        BASE | {"r": normal(1, 6)},
    )
    _, (refusal,) = feedforwards(model.graph)
    assert "infer shapes" in refusal.reason


def test_hidden_tensor_used_in_a_branch_is_refused(parse):
    model = parse(
        """g (float[n,4] x, bool p) => (float[] y, float[] w) {
            z = MatMul(x, W1) h = Relu(z) y = MatMul(h, W2)
            w = If (p) <
                then_branch = yes () => (float[] u) { u = Neg(h) },
                else_branch = no () => (float[] v) { v = Neg(x) }
            >
        }""",
        BASE,
    )
    sites, (refusal,) = feedforwards(model.graph)
    assert sites == []
    assert "h is also used by" in refusal.reason


def test_sites_in_subgraphs_are_refused(parse):
    model = parse(
        """g (float[n,4] x, bool p, int64 trips) => (float[] y, float[] w) {
            y = If (p) <
                then_branch = yes () => (float[] u) { z = MatMul(x, W1) h = Relu(z) u = MatMul(h, W2) },
                else_branch = no () => (float[] v) { z2 = MatMul(x, W1) h2 = Tanh(z2) v = MatMul(h2, W2) }
            >
            w = Loop (trips, p, x) <
                body = b (int64 i, bool q, float[n,4] s) => (bool q2, float[n,4] s2) {
                    q2 = Identity(q) z3 = MatMul(s, S) h3 = Relu(z3) s2 = MatMul(h3, S)
                }
            >
        }""",
        BASE | {"S": normal(4, 4)},
    )
    sites, refusals = feedforwards(model.graph)
    assert sites == []
    assert [refusal.name for refusal in refusals] == ["u", "v", "s2"]
    assert "inside an If branch" in refusals[0].reason
    assert refusals[2].reason == "inside a Loop body"


def test_sites_in_functions_are_refused(parse):
    model = parse(
        """g (float[n,4] x, float[4,6] a, float[6,4] b) => (float[] y) { y = my.block(x) }
        <domain: "my", opset_import: ["" : 17]>
        block (u) => (v) {
            A = Constant <value = float[1,2] {1.0, 2.0}> ()
            B = Constant <value = float[2,1] {1.0, 2.0}> ()
            z = MatMul(u, A) h = Relu(z) v = MatMul(h, B)
        }""",
        domains=["my"],
    )
    sites, refusals = feedforwards(model.graph, model.functions.values())
    assert sites == []
    assert [refusal.reason for refusal in refusals] == ["inside the model-local function block"]
    assert feedforwards(model.graph) == ([], [])


def test_quantised_linears_are_listed(parse):
    model = parse(
        """g (float[n,4] x) => (float[] y) {
            w = DequantizeLinear(Q, s) z = MatMul(x, w) h = Relu(z) y = com.microsoft.MatMulNBits(h, Q)
        }""",
        {"Q": np.zeros((4, 6), np.int8), "s": np.float32(1)},
        domains=["com.microsoft"],
    )
    sites, refusals = feedforwards(model.graph)
    assert sites == []
    assert [refusal.name for refusal in refusals] == ["z", "y"]
