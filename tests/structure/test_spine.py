# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.errors import ModelError
from onnxcollapse.structure import blocks, layers, main_output, spine
from onnxcollapse.structure.dominators import ValueGraph

WEIGHTS = {
    name: np.ones(shape, np.float32)
    for name, shape in {
        "W": (8, 8),
        "U": (8, 32),
        "D": (32, 8),
        "g": (8,),
        "b": (8,),
        "E": (10, 8),
        "P": (6, 8),
    }.items()
}


def attention(i, x, mask="mask"):
    """Self attention with q = k = v = x W; `mask` enters the scores."""
    return f"""q{i} = MatMul({x}, W) k{i} = Transpose <perm = [0, 2, 1]> (q{i}) s{i} = MatMul(q{i}, k{i})
        t{i} = Add(s{i}, {mask}) p{i} = Softmax(t{i}) o{i} = MatMul(p{i}, q{i}) a{i} = MatMul(o{i}, W)"""


def feed_forward(i, x):
    return f"u{i} = MatMul({x}, U) r{i} = Relu(u{i}) d{i} = MatMul(r{i}, D)"


def pre_norm(count):
    """x + attention(norm(x)), then x + ffn(norm(x)), `count` times."""
    text, x = "", "x0"
    for i in range(count):
        text += f"n{i} = LayerNormalization({x}, g, b) {attention(i, f'n{i}')} y{i} = Add({x}, a{i}) "
        text += (
            f"m{i} = LayerNormalization(y{i}, g, b) {feed_forward(i, f'm{i}')} x{i + 1} = Add(d{i}, y{i}) "
        )
        x = f"x{i + 1}"
    return text + f"out = LayerNormalization({x}, g, b)"


def post_norm(count):
    """norm(x + attention(x)), then norm(x + ffn(x)), `count` times."""
    text, x = "v = Add(x0, b) h = LayerNormalization(v, g, b) ", "h"
    for i in range(count):
        text += f"{attention(i, x)} y{i} = Add({x}, a{i}) m{i} = LayerNormalization(y{i}, g, b) "
        text += (
            f"{feed_forward(i, f'm{i}')} z{i} = Add(m{i}, d{i}) x{i + 1} = LayerNormalization(z{i}, g, b) "
        )
        x = f"x{i + 1}"
    return text + f"out = Identity({x})"


IDS = "e = Gather(E, ids) f = Gather(P, pos) x0 = Add(e, f) c = Cast <to = 1> (am) mask = Mul(c, c) "


def build(parse, body, inputs="int64[n,t] am, int64[n,t] ids, int64[n,t] pos", outputs="float[] out"):
    return parse(f"g ({inputs}) => ({outputs}) {{ {body} }}", WEIGHTS, domains=["com.microsoft"])


def names(values):
    return [value.name for value in values]


def test_pre_norm_spine_is_the_residual_stream(parse):
    model = build(parse, IDS + pre_norm(3))
    assert names(spine(model.graph)) == ["ids", "e", "x0", "y0", "x1", "y1", "x2", "y2", "x3", "out"]


def test_post_norm_spine_is_the_norms_and_their_sums(parse):
    model = build(parse, IDS + post_norm(2))
    expected = ["ids", "e", "x0", "v", "h", "y0", "m0", "z0", "x1", "y1", "m1", "z1", "x2", "out"]
    assert names(spine(model.graph)) == expected


@pytest.mark.parametrize("order", ["am, ids, pos", "ids, pos, am", "pos, am, ids"])
def test_the_main_input_does_not_depend_on_the_order(parse, order):
    inputs = ", ".join(f"int64[n,t] {name}" for name in order.split(", "))
    chain = names(spine(build(parse, IDS + pre_norm(2), inputs).graph))
    assert chain[0] == "ids"  # both reach the stream; the tokens' table is the larger one


def test_mask_alone_would_leave_no_layer(parse):
    flow = ValueGraph(build(parse, IDS + pre_norm(2)).graph)
    numbers = {value.name: number for number, value in enumerate(flow.values)}
    chain = flow.dominators(numbers["am"], numbers["out"])
    assert [flow.values[number].name for number in chain] == ["am", "c", "mask", "y1", "x2", "out"]


def test_dominators_by_definition(parse):
    """Against the definition: v dominates the sink if there is no path without it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lines = []
        for i in range(1, 25):
            a, b = rng.integers(max(0, i - 4), i, 2)
            lines.append(f"v{i} = Add(v{a}, v{b})")
        flow = ValueGraph(parse(f"g (float[n] v0) => (float[] v24) {{ {' '.join(lines)} }}").graph)
        end = len(flow.values) - 1
        expected = [v for v in range(end + 1) if not _path_without(flow, v, end)]
        assert flow.dominators(0, end) == expected


def _path_without(flow, missing, end):
    if missing in (0, end):
        return False
    reached = {0}
    for number, sources in enumerate(flow.sources):
        if number != missing and any(source in reached for source in sources):
            reached.add(number)
    return end in reached


def test_shape_edges_are_left_out(parse):
    model = build(
        parse,
        "s = Shape(x) w = MatMul(x, W) r = Relu(w) c = Reshape(r, s) z = Size(x) f = Cast <to = 1> (z) out = Mul(c, f)",
        "float[n,8] x",
    )
    assert names(spine(model.graph)) == ["x", "w", "r", "c", "out"]


def test_overridable_initializers_are_no_source(parse):
    model = build(parse, "w = MatMul(x, W) out = Add(w, b)", "float[8] b, float[n,8] x")
    assert names(spine(model.graph)) == ["x", "w", "out"]


def test_cache_entries_do_not_shorten_the_spine(parse):
    body = "x0 = Gather(E, ids) "
    for i, x in enumerate(["x0", "x1"]):
        body += f"""n{i} = LayerNormalization(x{i}, g, b) k{i} = MatMul(n{i}, W)
            K{i} = Concat <axis = 1> (past{i}, k{i}) T{i} = Transpose <perm = [0, 2, 1]> (K{i})
            q{i} = MatMul(n{i}, W) s{i} = MatMul(q{i}, T{i}) p{i} = Softmax(s{i})
            o{i} = MatMul(p{i}, K{i}) a{i} = MatMul(o{i}, W) x{i + 1} = Add({x}, a{i}) """
    body += "H = Transpose(E) out = MatMul(x2, H)"
    inputs = "float[n,p,8] past0, float[n,p,8] past1, int64[n,t] ids"
    for outputs in ("float[] out, float[] K0, float[] K1", "float[] K0, float[] K1, float[] out"):
        model = build(parse, body, inputs, outputs)
        assert main_output(model.graph).name == "out"
        assert names(spine(model.graph)) == ["ids", "x0", "x1", "x2", "out"]
        assert [len(run) for run in layers(model.graph)] == [2]


def test_encoder_states_read_by_every_layer_are_not_the_source(parse):
    body = "x0 = Gather(E, ids) "
    for i in range(2):
        body += f"""k{i} = MatMul(states, W) T{i} = Transpose <perm = [0, 2, 1]> (k{i})
            s{i} = MatMul(x{i}, T{i}) p{i} = Softmax(s{i})
            o{i} = MatMul(p{i}, k{i}) y{i} = Add(x{i}, o{i}) {feed_forward(i, f"y{i}")} x{i + 1} = Add(y{i}, d{i}) """
    model = build(parse, body + "out = Identity(x2)", "float[n,s,8] states, int64[n,t] ids")
    assert names(spine(model.graph)) == ["ids", "x0", "y0", "x1", "y1", "x2", "out"]


def skip_norms(count, op="SkipLayerNormalization", operands="g, b"):
    """A pre-norm net after ONNX Runtime's optimizer: the stream is the skip norms' fourth output."""
    text, stream, norm = "n = LayerNormalization(x0, g, b) ", "x0", "n"
    if op != "SkipLayerNormalization":
        text = "n = SimplifiedLayerNormalization(x0, g) "
    for i in range(count):
        text += f"{attention(i, norm, mask='b1')} n{i}, , , y{i} = com.microsoft.{op}({stream}, a{i}, {operands}) "
        text += f"{feed_forward(i, f'n{i}')} m{i}, , , x{i + 1} = com.microsoft.{op}(y{i}, d{i}, {operands}) "
        stream, norm = f"x{i + 1}", f"m{i}"
    return text + f"out = MatMul({norm}, W)"


@pytest.mark.parametrize(
    ("op", "operands"), [("SkipLayerNormalization", "g, b"), ("SkipSimplifiedLayerNormalization", "g")]
)
def test_skip_norms_are_sum_and_norm(parse, op, operands):
    text = skip_norms(3, op, operands).replace("b1", "g")
    model = build(parse, text, "float[n,t,8] x0")
    assert names(spine(model.graph)) == ["x0", "y0", "x1", "y1", "x2", "y2", "x3", "m2", "out"]
    (run,) = layers(model.graph)
    assert names(block.start for block in run) == ["x0", "x1", "x2"]
    assert all(block.is_residual for block in run)


def test_post_norm_skip_norms_without_a_sum(parse):
    text = ""
    for i in range(2):
        text += f"{attention(i, f'x{i}', mask='g')} y{i} = com.microsoft.SkipLayerNormalization(x{i}, a{i}, g, b) "
        text += (
            f"{feed_forward(i, f'y{i}')} x{i + 1} = com.microsoft.SkipLayerNormalization(y{i}, d{i}, g, b) "
        )
    model = build(parse, text + "out = Identity(x2)", "float[n,t,8] x0")
    assert names(spine(model.graph)) == ["x0", "y0", "x1", "y1", "x2", "out"]


def test_mask_index_of_an_embedding_norm_is_not_the_stream(parse):
    model = build(
        parse,
        """x0, index = com.microsoft.EmbedLayerNormalization(ids, , E, P, , g, b, am)
        a = com.microsoft.Attention(x0, W, b, index) y = Add(x0, a)
        c = com.microsoft.Attention(y, W, b, index) out = Add(y, c)""",
        "int32[n,t] ids, int32[n,t] am",
    )
    assert names(spine(model.graph)) == ["ids", "x0", "y", "out"]


def test_values_captured_by_branches_count(parse):
    model = build(
        parse,
        """w = MatMul(x, W) v = Relu(x)
        out = If (p) <
            then_branch = yes () => (float[] u) { u = Add(w, v) },
            else_branch = no () => (float[] z) { z = Neg(w) }
        >""",
        "bool p, float[n,8] x",
    )
    assert names(spine(model.graph)) == ["x", "out"]


def test_out_of_order_graphs_are_sorted(parse):
    model = build(parse, "out = Relu(w) w = MatMul(x, W)", "float[n,8] x")
    assert names(spine(model.graph)) == ["x", "w", "out"]


def test_output_without_data(parse):
    model = build(parse, "out = Identity(W)", "float[n] x")
    assert names(spine(model.graph)) == ["out"]
    assert blocks(model.graph) == []
    assert layers(model.graph) == []


def test_graph_without_outputs():
    with pytest.raises(ModelError, match="no outputs"):
        main_output(ir.Graph([], [], nodes=[], name="empty"))


def test_no_recursion_on_deep_graphs(parse):
    steps = " ".join(f"v{i + 1} = Relu(v{i})" for i in range(3000))
    model = parse(f"g (float[n] v0) => (float[] v3000) {{ {steps} }}")
    assert len(spine(model.graph)) == 3001


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "expected"),
    [
        (
            "i = Identity(ids) x = Gather(E, ids) out = Relu(x)",
            "int64[n] ids",
            "int64[] i, float[] out",
            "out",
        ),
        ("x = Relu(a) out = MatMul(x, W)", "float[n,8] a", "float[] x, float[] out", "x"),  # a hidden state
        ("out = Concat <axis = 0> (a, b2) ", "float[n,8] a, float[n,8] b2", "float[] out", "out"),
        ("i = Identity(ids)", "int64[n] ids", "int64[] i", "i"),
        ("o, k = Two(x, past)", "float[n] x, float[n] past", "float[] k, float[] o", "o"),
        (
            "q = MatMul(x, W) k = MatMul(x, W) s = Mul(q, k) out = Add(s, x)",
            "float[n,8] x",
            "float[] k, float[] out",
            "out",
        ),
    ],
)
def test_main_output(parse, body, inputs, outputs, expected):
    assert main_output(build(parse, body, inputs, outputs).graph).name == expected


def test_blocks_hold_what_lies_between_their_ends(parse):
    model = build(parse, IDS + pre_norm(2))
    found = {block.name: block for block in blocks(model.graph)}
    attn = found["x0 .. y0"]
    assert sorted(node.outputs[0].name for node in attn.nodes) == [
        "a0",
        "k0",
        "n0",
        "o0",
        "p0",
        "q0",
        "s0",
        "t0",
        "y0",
    ]
    assert sorted(names(attn.weights)) == ["W", "W", "b", "g"]
    assert attn.params == 64 + 16
    assert found["y0 .. x1"].params == 2 * 8 * 32 + 16
    chain = spine(model.graph)
    assert [(block.start, block.end) for block in blocks(model.graph)] == list(pairwise(chain))


def test_layers_of_pre_and_post_norm_nets(parse):
    (pre,) = layers(build(parse, IDS + pre_norm(3)).graph)
    assert [block.name for block in pre] == ["x0 .. x1", "x1 .. x2", "x2 .. x3"]
    (post,) = layers(build(parse, IDS + post_norm(3)).graph)
    assert [block.name for block in post] == ["h .. x1", "x1 .. x2", "x2 .. x3"]
    assert len({block.signature for block in pre}) == 1 == len({block.signature for block in post})
    assert pre[0].signature != post[0].signature
    assert all(block.is_residual for block in pre)
    assert not any(block.is_residual for block in post)


def test_isomorphic_blocks_pair_nodes_and_weights(parse):
    """The second layer has its commutative operands swapped and its nodes listed in another order."""
    weights = WEIGHTS | {"U2": np.zeros((8, 32), np.float32), "D2": np.zeros((32, 8), np.float32)}
    model = parse(
        """g (float[n,8] x) => (float[] y) {
            u = MatMul(x, U) r = Sigmoid(u) m = Mul(u, r) d = MatMul(m, D) z = Add(x, d)
            u2 = MatMul(z, U2) r2 = Sigmoid(u2) m2 = Mul(r2, u2) d2 = MatMul(m2, D2) y = Add(d2, z)
        }""",
        weights,
    )
    (run,) = layers(model.graph)
    first, second = run
    pairs = list(zip(first.nodes, second.nodes, strict=True))
    assert all(a.op_type == b.op_type for a, b in pairs)
    assert [(a.outputs[0].name, b.outputs[0].name) for a, b in pairs if a.op_type != "Add"] == [
        ("u", "u2"), ("r", "r2"), ("m", "m2"), ("d", "d2")
    ]  # fmt: skip
    assert names(first.weights) == ["U", "D"]
    assert names(second.weights) == ["U2", "D2"]


@pytest.mark.parametrize(
    "second",
    [
        "u2 = MatMul(z, V) r2 = Relu(u2) d2 = MatMul(r2, X)",  # another width
        "u2 = MatMul(z, U) r2 = Tanh(u2) d2 = MatMul(r2, D)",  # another op
        "u2 = MatMul(z, U) r2 = LeakyRelu(u2) d2 = MatMul(r2, D)",
        "u2 = MatMul(z, U) r2 = Relu(u2) s2 = Relu(r2) d2 = MatMul(s2, D)",  # another length
    ],
)
def test_other_blocks_are_not_isomorphic(parse, second):
    weights = WEIGHTS | {"V": np.ones((8, 16), np.float32), "X": np.ones((16, 8), np.float32)}
    model = parse(
        f"g (float[n,8] x) => (float[] y) {{ {feed_forward('', 'x')} z = Add(x, d) {second} y = Add(z, d2) }}",
        weights,
    )
    one, two = blocks(model.graph)
    assert one.signature != two.signature
    assert layers(model.graph) == []


def test_attributes_and_types_tell_blocks_apart(parse):
    def kind(alpha):
        model = parse(
            f"g (float[n,8] x) => (float[] y) {{ w = MatMul(x, W) y = LeakyRelu <alpha = {alpha}> (w) }}",
            WEIGHTS,
        )
        return [block.signature for block in blocks(model.graph)]

    assert kind(0.1) == kind(0.1)
    assert kind(0.1)[0] == kind(0.2)[0]
    assert kind(0.1)[1] != kind(0.2)[1]


def test_values_and_names_do_not_matter(parse):
    one = blocks(build(parse, IDS + pre_norm(1)).graph)
    other = parse(
        "g (int64[n,t] am, int64[n,t] ids, int64[n,t] pos) => (float[] out) {" + IDS + pre_norm(1) + "}",
        {name: array * 3 for name, array in WEIGHTS.items()},
    )
    for value in other.graph.initializers.copy().values():
        value.name = f"renamed_{value.name}"
    assert [block.signature for block in one] == [block.signature for block in blocks(other.graph)]


def test_several_runs(parse):
    weights = WEIGHTS | {"S": np.ones((8, 4), np.float32), "T": np.ones((4, 4), np.float32)}
    text = "".join(f"w{i} = MatMul(x{i}, W) x{i + 1} = Add(x{i}, w{i}) " for i in range(3))
    text += "z0 = MatMul(x3, S) " + "".join(
        f"v{i} = MatMul(z{i}, T) z{i + 1} = Add(z{i}, v{i}) " for i in range(2)
    )
    model = parse(f"g (float[n,8] x0) => (float[] z2) {{ {text} }}", weights)
    assert [[block.name for block in run] for run in layers(model.graph)] == [
        ["x0 .. x1", "x1 .. x2", "x2 .. x3"],
        ["z0 .. z1", "z1 .. z2"],
    ]


def test_a_sum_deep_inside_is_no_residual(parse):
    model = parse(
        """g (float[n,8] x) => (float[] y) {
            r = Relu(x) s = Add(x, r) m = MatMul(s, W) y = Add(m, b) z = Mul(x, x)
        }""",
        WEIGHTS,
    )
    assert [block.is_residual for block in blocks(model.graph)] == [True, False, True]


def test_repetitions_without_weights_are_no_layers(parse):
    model = parse("g (float[n] x) => (float[] y) { a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c) }")
    assert len(blocks(model.graph)) == 4
    assert layers(model.graph) == []
