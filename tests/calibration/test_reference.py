# SPDX-License-Identifier: Apache-2.0
"""Two models in one graph: names, weights, inputs, functions and subgraphs of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.calibration import Gram, Moments, Ref, collect, open_data
from onnxcollapse.errors import ModelError

rng = np.random.default_rng(3)
X = rng.standard_normal((24, 4)).astype(np.float32)

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[N,4] x) => (float[N,4] y) { h = own.outer(x)  y = Relu(h) }
<domain: "own", opset_import: ["" : 17, "own" : 1]>
outer (a) => (b) { c = own.inner(a)  b = Neg(c) }
<domain: "own", opset_import: ["" : 17]>
inner (a) => (b) { b = %s(a) }
"""

BRANCH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, bool flag) => (float[N,4] y) {
    s = MatMul(x, w)
    y = If (flag) <
        then_branch = a () => (float[N,4] t) { inner = Relu(s)  t = Neg(inner) },
        else_branch = b () => (float[N,4] e) { e = Identity(s) }
    >
}"""


def weights(seed, name="w"):
    return {name: np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)}


def means(model, reference, *refs, feeds=None):
    data = open_data(feeds or {"x": X}, reference)
    statistics = collect(model, [Moments(r) for r in refs], data, provider="cpu", reference=reference)
    return [(statistics.fit(Moments(r)) + statistics.heldout(Moments(r))).mean for r in refs]


def test_functions_of_the_reference_keep_their_own_bodies(build):
    model, reference = build(FUNCTIONS % "Exp"), build(FUNCTIONS % "Abs")
    ours, theirs = means(model, reference, Ref("h"), Ref("h", "reference"))
    np.testing.assert_allclose(ours, -np.exp(X).mean(0), rtol=1e-5)
    np.testing.assert_allclose(theirs, -np.abs(X).mean(0), rtol=1e-5)


def test_subgraphs_of_the_reference_read_its_own_tensors(build):
    model, reference = build(BRANCH, **weights(0)), build(BRANCH, **weights(1))
    feeds = {"x": X, "flag": np.array(True)}
    ours, theirs = means(model, reference, Ref("y"), Ref("y", "reference"), feeds=feeds)
    for got, seed in ((ours, 0), (theirs, 1)):
        np.testing.assert_allclose(got, -np.maximum(X @ weights(seed)["w"], 0).mean(0), rtol=1e-5)


def test_inputs_that_only_the_reference_has_are_fed(build):
    """As after a layer was removed together with its cache."""
    reference = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, float[N,4] past_key_values_1) => (float[N,4] y) { y = Add(x, past_key_values_1) }"""
    )
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }'
    )
    feeds = {"x": X, "past_key_values_1": X}
    ours, theirs = means(model, reference, Ref("y"), Ref("y", "reference"), feeds=feeds)
    np.testing.assert_allclose(ours, -X.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(theirs, 2 * X.mean(0), rtol=1e-4, atol=1e-7)


def test_names_that_look_like_the_references(build):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {{ y = {}(x) }}'
    model, reference = build(text.format("Neg")), build(text.format("Abs"))
    model.graph.outputs[0].name = "reference/y"
    ours, theirs = means(model, reference, Ref("reference/y"), Ref("y", "reference"))
    np.testing.assert_allclose(ours, -X.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(theirs, np.abs(X).mean(0), rtol=1e-5)


def test_a_tensor_that_the_reference_lacks_is_the_models(build):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] {0}) {{ {0} = Neg(x) }}'
    model, reference = build(text.format("fresh")), build(text.format("y"))
    (got,) = means(model, reference, Ref("fresh", "reference"))
    np.testing.assert_allclose(got, -X.mean(0), rtol=1e-4, atol=1e-7)


def test_a_tensor_that_neither_has(build):
    model = build(BRANCH, **weights(0))
    with pytest.raises(ModelError, match="'nothing' is not in"):
        means(model, model, Ref("nothing", "reference"), feeds={"x": X, "flag": np.array(True)})


def test_different_opsets(build):
    text = '<ir_version: 8, opset_import: ["" : {}]> g (float[N,4] x) => (float[N,4] y) {{ y = Neg(x) }}'
    model, reference = build(text.format(17)), build(text.format(13))
    (got,) = means(model, reference, Ref("y", "reference"))
    np.testing.assert_allclose(got, -X.mean(0), rtol=1e-4, atol=1e-7)


def test_both_sources_in_one_gram(build):
    model, reference = build(BRANCH, **weights(0)), build(BRANCH, **weights(1))
    gram = Gram((Ref("s"),), (Ref("s", "reference"),))
    data = open_data({"x": X, "flag": np.array(False)}, model)
    statistics = collect(model, [gram], data, provider="cpu", reference=reference)
    both = statistics.fit(gram) + statistics.heldout(gram)
    want = (X @ weights(0)["w"]).T.astype(np.float64) @ (X @ weights(1)["w"]) / 24
    np.testing.assert_allclose(both.block(1, 2), want, rtol=1e-5, atol=1e-6)
