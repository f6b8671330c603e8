# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np
import pytest

from onnxcollapse.structure import feedforwards, hidden_layers
from tests.structure.hidden_nets import NETS, Builder, conv_flatten, conv_pool, conv_reshape, erf_gelu, swiglu
from tests.support import mlp

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("case", NETS)
def test_sites_say_what_they_are(case):
    build, activation, group, is_block = NETS[case]
    model = build()
    (site,), refusals = hidden_layers(model.graph)
    assert refusals == []
    assert (site.name, site.width, site.d_out, site.group) == ("y", 6, 5, group)
    assert (site.activation, site.block is not None) == (activation, is_block)
    assert site.matrix().shape == (6 * group, 5)
    assert site.offset().shape == (5,)
    assert site.source_weights().shape[1] == 6
    assert (site.input.name, site.output.name) == ("x", "y")
    order = {node: index for index, node in enumerate(model.graph)}
    assert [order[node] for node in site.nodes] == sorted(order[node] for node in site.nodes)
    assert len(site.nodes) == len(order)
    stored = [value.const_value.size for value in model.graph.initializers.values()]
    scalars = sum(size == 1 for size in stored)
    settings = sum(
        value.const_value.size
        for name, value in model.graph.initializers.items()
        if value.const_value.size > 1 and not is_weight(model, name)
    )
    assert site.params == sum(stored) - scalars - settings


def is_weight(model, name):
    """Whether it is no pads, scales, axes or target."""
    value = model.graph.initializers[name]
    return not any(node.op_type in ("Pad", "Resize", "Reshape", "Squeeze") for node in value.consumers())


def test_feedforwards_keep_their_names_and_share_linears():
    model = mlp([4, 8, 7, 6, 5])
    sites, _ = hidden_layers(model.graph)
    blocks, _ = feedforwards(model.graph)
    assert [site.name for site in sites] == [block.name for block in blocks]
    assert [(site.width, site.d_out) for site in sites] == [(8, 7), (7, 6), (6, 5)]
    assert sites[0].consumer.node is sites[1].sources[0].node
    assert (sites[1].features, sites[1].pre) == (blocks[1].hidden, [blocks[1].up.output])


def test_gated_sources_are_stacked():
    model = swiglu()
    (site,), _ = hidden_layers(model.graph)
    gate, up = site.block.gate, site.block.up
    np.testing.assert_array_equal(site.source_weights(), np.concatenate([gate.matrix(), up.matrix()]))
    assert site.pre == [gate.output, up.output]
    assert (site.pre_axis, site.hidden_axis, site.feature_axis) == (-1, -1, -1)


def test_per_channel_constants_count_unless_others_read_them():
    (site,), _ = hidden_layers(erf_gelu().graph)
    assert site.params == (4 * 6 + 6) + (6 + 6) + (6 * 5 + 5)


def test_a_window_is_what_the_consumer_reads():
    (site,), _ = hidden_layers(conv_pool().graph)
    window = site.window
    assert (window.kernel_shape, window.strides) == ((3, 3), (2, 1))
    assert (window.pads, window.dilations) == ((0, 1, 2, 1), (1, 2))
    stored = site.consumer.weight.const_value.numpy()
    row = 4 * 9 + 5  # channel 4, tap (1, 2)
    np.testing.assert_array_equal(site.matrix()[row], stored[:, 4, 1, 2])
    assert (site.features.name, site.feature_axis) == (site.hidden.name, 1)


def test_a_flattened_channel_owns_consecutive_features(run):
    model = conv_flatten()
    (site,), _ = hidden_layers(model.graph)
    assert (site.hidden_axis, site.feature_axis, site.window) == (1, -1, None)
    x = normal(2, 3, 8, 8)
    hidden, features = run(model.ir, {"x": x}, [site.hidden.name, site.features.name])
    np.testing.assert_array_equal(features.reshape(2, 6, site.group), hidden.reshape(2, 6, -1))


def test_the_hidden_tensor_is_the_one_before_the_flattening():
    (site,), _ = hidden_layers(conv_reshape().graph)
    assert [value.producer().op_type for value in (site.hidden, site.features)] == ["Relu", "Add"]


@pytest.mark.parametrize(
    ("mode", "pads"), [("SAME_UPPER", (0, 1, 1, 1)), ("SAME_LOWER", (1, 1, 0, 1)), ("VALID", (0,) * 4)]
)
def test_automatic_pads_are_made_explicit(parse, mode, pads):
    model = image(
        parse, f'c = Conv(x, W) h = Relu(c) y = Conv <auto_pad = "{mode}"> (h, E)', E=normal(5, 6, 2, 3)
    )
    (site,), _ = hidden_layers(model.graph)
    assert site.window.pads == pads


BASE = {
    "W": normal(6, 3, 3, 3),
    "V": normal(5, 6, 3, 3),
    "U": normal(6, 6, 3, 3),
    "D": normal(6, 5),
    "G": normal(96, 5),
}
BASE |= {"P": normal(6, 3, 1, 1), "r": normal(1, 1, 6), "Q": normal(12, 6, 1, 1)}
BASE |= {
    "channel": np.int64([1]),
    "pads": np.int64([0, 1, 0, 0, 0, 0, 0, 0]),
    "sizes": np.int64([2, 6, 8, 8]),
}
BASE |= {"rows": np.int64([-1, 96]), "mixed": np.int64([3, 64]), "positions": np.int64([2])}
BASE |= {
    "V2": normal(5, 6, 1, 1),
    "K": normal(12, 1, 3, 3),
    "F": normal(5, 12, 3, 3),
    "X": normal(5, 6, 1, 1),
}


def image(parse, text, inputs="", outputs="float[] y", opset=17, **weights):
    words = set(re.findall(r"\w+", text))
    known = {name: array for name, array in (BASE | weights).items() if name in words}
    return parse(f"g (float[n, 3, h0, w0] x{inputs}) => ({outputs}) {{ {text} }}", known, opset=opset)


REFUSED = {
    "a residual sum": (
        "c = Conv(x, W) h = Relu(c) d = Conv(h, U) s = Add(d, h) e = Relu(s) y = Conv(e, V)",
        {"y": "s (Add) joins the channels of", "d": "h is also used by s (Add)"},
    ),
    "a sum with an input": (
        "c = Conv(x, W) s = Add(c, o) y = Conv(s, V)",
        {"y": "s (Add) joins the channels of c with o, which cannot be cut"},
    ),
    "a concatenation": (
        "c = Conv(x, W) d = Conv(x, P) t = Concat <axis = 1> (c, d) y = Conv(t, F)",
        {"y": "t (Concat) joins the channels of d and c"},
    ),
    "one with itself": (
        "c = Conv(x, W) h = Relu(c) t = Concat <axis = 1> (h, c) y = Conv(t, F)",
        {"y": "t (Concat) mixes or moves channels"},
    ),
    "squeeze and excite": (
        """c = Conv(x, W) p = GlobalAveragePool(c) s = Conv(p, Q) l = Sigmoid(s) y = Conv(l, Z) t = Mul(c, p)
           o1 = Exp(t)""",
        {"s": "c is also used by t (Mul)"},
    ),
    "a second output": (
        "c = Conv(x, W) h = Relu(c) y = Conv(h, V)",
        {"y": "hidden tensor h is a graph output"},
    ),
    "indices": (
        "c = Conv(x, W) h, i = MaxPool <kernel_shape = [2, 2]> (c) j = Abs(i) y = Conv(h, V)",
        {"y": "second output is used"},
    ),
    "a transposition": (
        "c = Conv(x, W) t = Transpose <perm = [0, 1, 3, 2]> (c) y = Conv(t, V)",
        {"y": "t (Transpose) mixes or moves channels"},
    ),
    "a grouped Conv": (
        "c = Conv(x, W) g1 = Conv <group = 6> (c, K) y = Conv(g1, F)",
        {"y": "g1 (Conv) mixes"},
    ),
    "a mean over channels": (
        "c = Conv(x, W) m = ReduceMean <axes = [1]> (c) s = Sub(c, m) y = Conv(s, V)",
        {"y": "m (ReduceMean) reduces over axes [1]"},
    ),
    "constants along rows": ("c = Conv(x, W) h = Mul(c, r) y = Conv(h, V)", {"y": "would mix rows"}),
    "slope along columns": ("c = Conv(x, W) h = PRelu(c, c6) y = Conv(h, V)", {"y": "would mix rows"}),
    "padded channels": (
        "c = Conv(x, W) p = Pad(c, pads) y = Conv(p, Y)",
        {"y": "p (Pad) pads samples or channels"},
    ),
    "a size that names channels": (
        "c = Conv(x, W) p = Resize(c, , , sizes) y = Conv(p, V)",
        {"y": "p (Resize) names the number of channels"},
    ),
    "rows that may be mixed": (
        "c = Conv(x, W) f = Reshape(c, rows) y = MatMul(f, G)",
        {"y": "f (Reshape) to [-1, 96] may mix samples, of which there are n"},
    ),
    "a flattening that mixes": (
        "c = Conv(x, W) f = Flatten <axis = 2> (c) y = MatMul(f, G)",
        {"y": "f (Flatten) has axis 2, not 1"},
    ),
    "a part squeezed": (
        "c = Conv(x, W) f = Squeeze(c, positions) y = MatMul(f, D)",
        {"y": "f (Squeeze) takes out axes [2], not those of the positions"},
    ),
    "no multiple": (
        "c = Conv(x, W) f = Flatten(c) y = MatMul(f, M)",
        {"y": "y reads 7 features, no multiple of the 6 channels of c"},
    ),
    "a slope fed": (
        "c = Conv(x, W) h = PRelu(c, fed) y = Conv(h, V)",
        {"y": "joins the channels of c with fed"},
    ),
    "pads that depend on the input": (
        'c = Conv(x, W) h = Relu(c) y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (h, V)',
        {"y": "auto_pad"},
    ),
    "training": ("c = Conv(x, W) h = Dropout(c, half, yes) y = Conv(h, V)", {"y": "training mode"}),
}
EXTRA = {
    "a sum with an input": {"inputs": ", float[n, 6, h0, w0] o"},
    "squeeze and excite": {"outputs": "float[] y, float[] o1", "Z": normal(5, 12, 1, 1)},
    "a second output": {"outputs": "float[] y, float[] h"},
    "indices": {"outputs": "float[] y, int64[] j"},
    "slope along columns": {"c6": normal(6)},
    "padded channels": {"Y": normal(5, 7, 3, 3)},
    "no multiple": {"M": normal(7, 5)},
    "a slope fed": {"inputs": ", float[6, 1, 1] fed"},
    "training": {"half": np.float32(0.5), "yes": np.array(True)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_give_the_reason(parse, case):
    text, expected = REFUSED[case]
    sites, refusals = hidden_layers(image(parse, text, **EXTRA.get(case, {})).graph)
    reasons = {refusal.name: refusal.reason for refusal in refusals}
    assert len(reasons) == len(refusals)
    for name, reason in expected.items():
        assert reason in reasons[name]
        assert name not in {site.name for site in sites}


SILENT = {
    "nothing before": "h = Relu(x) y = Conv(h, W)",
    "attention over positions": "c = Conv(x, W) t = Softmax(c) m = MatMul(t, t) y = Tanh(m)",
    "channels on another axis": "c = Conv(x, W) y = MatMul(c, D)",
    "a Linear after a Linear": "f = Flatten(x) a = MatMul(f, D3) y = MatMul(a, D)",
}


@pytest.mark.parametrize("case", SILENT)
def test_what_resembles_nothing_is_not_named(parse, case):
    model = image(parse, SILENT[case], D3=normal(12, 6))
    assert hidden_layers(model.graph) == ([], [])


def test_refusals_of_feedforwards_are_kept(parse):
    model = parse(
        "g (float[n, 4] x) => (float[] y, float[] h) { z = MatMul(x, A) h = Relu(z) y = MatMul(h, B) }",
        {"A": normal(4, 6), "B": normal(6, 5)},
    )
    sites, refusals = hidden_layers(model.graph)
    assert (sites, refusals) == ([], feedforwards(model.graph)[1])
    assert "h is a graph output" in refusals[0].reason


def test_a_refusal_that_was_read_after_all_is_gone(parse):
    """A 1x1 Conv is a Linear; `feedforwards` names the Flatten behind it, which is no obstacle here."""
    model = image(parse, "c = Conv(x, P) h = Relu(c) f = Flatten(h) y = MatMul(f, G)")
    assert [refusal.name for refusal in feedforwards(model.graph)[1]] == ["y"]
    (site,), refusals = hidden_layers(model.graph)
    assert (site.name, site.group, refusals) == ("y", 16, [])


def test_samples_that_are_known_to_stay(parse):
    """[-1, f] is a flattening where the declared batch is the same before and behind."""
    text = "c = Conv(x, W) h = Relu(c) f = Reshape(h, rows) y = MatMul(f, G)"
    (site,), refusals = hidden_layers(image(parse, text, outputs="float[n, 5] y").graph)
    assert (site.group, refusals) == (16, [])


def test_sites_in_bodies_and_functions_are_refused(parse):
    inner = "c = Conv(x, W) h = Relu(c) yi = Conv(h, V)"
    branches = f"then_branch = t () => (float[] yi) {{ {inner} }}, else_branch = e () => (float[] yj) {{ yj = Abs(x) }}"
    text = f"y = If(b) <{branches}>"
    sites, refusals = hidden_layers(image(parse, text, inputs=", bool b").graph)
    assert sites == []
    assert [(r.name, "inside an If branch" in r.reason) for r in refusals] == [("yi", True)]


def test_a_long_residual_stream_is_named_at_each_end():
    net = Builder()
    value = net.conv("x", 3, 6)
    for _ in range(4):
        value = net.op("Add", value, net.conv(net.op("Relu", net.conv(value, 6, 6)), 6, 6))
    net.conv(value, 6, 5, name="y")
    sites, refusals = hidden_layers(net.image().graph)
    assert len(sites) == 4
    assert len(refusals) == 5
    assert all("(Add)" in refusal.reason for refusal in refusals)
