# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse.calibration import open_data
from onnxcollapse.model.model import Model
from onnxcollapse.verification import METRICS, compare

rng = np.random.default_rng(13)
X = rng.standard_normal((50, 6)).astype(np.float32)
W = rng.standard_normal((6, 4)).astype(np.float32)


def linear(w=W, body="y = MatMul(x, w)", outputs="float[N,4] y", inputs="float[N,6] x"):
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return Model(ir.from_proto(proto))


def expected_rel_l2(data, part, w):
    x = np.concatenate([batch["x"] for batch in data.batches(part)]).astype(np.float64)
    want = x @ W.astype(np.float64)
    return np.linalg.norm(x @ w.astype(np.float64) - want) / np.linalg.norm(want)


def test_a_model_equals_itself():
    model = linear()
    found = compare(model, model.clone(), open_data({"x": X}, model), provider="cpu")
    assert found.overall == dict.fromkeys(METRICS, 0.0)
    assert found.samples == 50
    assert found.outputs[0].max_abs == 0
    assert (found.missing, found.extra) == ((), ())


def test_every_metric_of_a_changed_model():
    changed = W + rng.standard_normal(W.shape).astype(np.float32)
    data = open_data({"x": X}, linear())
    found = compare(linear(), linear(changed), data, provider="cpu")
    [output] = found.outputs
    assert set(output.errors) == set(METRICS)
    assert output.errors["rel-l2"] == pytest.approx(expected_rel_l2(data, "all", changed), rel=1e-5)
    assert output.max_abs == pytest.approx(np.abs(X @ changed - X @ W).max(), rel=1e-5)
    assert found.overall == output.errors
    part = compare(linear(), linear(changed), data, ["rel-l2"], part="heldout", provider="cpu")
    assert part.samples == 12
    assert part.overall == {"rel-l2": pytest.approx(expected_rel_l2(data, "heldout", changed), rel=1e-5)}


def test_outputs_that_only_one_has_or_that_differ_in_shape():
    a = linear(
        body="y = MatMul(x, w)  z = Relu(x)  present_0_key = Neg(x)",
        outputs="float[N,4] y, float[N,6] z, float[N,6] present_0_key",
    )
    b = linear(
        body="y = MatMul(x, w)  z = Relu(y)  new = Neg(x)",
        outputs="float[N,4] y, float[N,4] z, float[N,6] new",
    )
    found = compare(a, b, open_data({"x": X}, a), provider="cpu")
    assert found.missing == ("present_0_key",)
    assert found.extra == ("new",)
    assert found.outputs[1].note == "shapes differ: [50, 6] and [50, 4]"
    assert found.outputs[1].errors == {}
    assert found.overall["rel-l2"] == 0


def test_integer_boolean_and_string_outputs_must_be_equal():
    body = "i = Cast<to = 7>(x)  b = Greater(x, {0})  s = Cast<to = 8>(i)  y = MatMul(x, w)"
    outputs = "float[N,4] y, int64[N,6] i, bool[N,6] b, string[N,6] s"
    models = []
    for edge in ("0.0", "0.5"):
        proto = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[N,6] x) => ({outputs}) <float edge = {{{edge}}}> {{ {body.replace("{0}", "edge")} }}"""
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
        models.append(Model(ir.from_proto(proto)))
    found = compare(*models, open_data({"x": X}, models[0]), provider="cpu")
    results = {output.name: output for output in found.outputs}
    assert results["i"].mismatch == 0
    assert results["s"].mismatch == 0
    assert results["b"].mismatch == pytest.approx(((X > 0) != (X > 0.5)).mean())
    assert results["b"].errors == {}


def test_caches_are_shown_but_do_not_count():
    body = "y = MatMul(x, w)  present_0_key = {}(x)"
    models = [
        linear(body=body.format(op), outputs="float[N,4] y, float[N,6] present_0_key")
        for op in ("Neg", "Abs")
    ]
    found = compare(*models, open_data({"x": X}, models[0]), provider="cpu")
    assert found.outputs[1].cache
    assert found.outputs[1].errors["rel-l2"] > 0.5
    assert found.overall["rel-l2"] == 0
    assert found.to_dict()["caches"] == ["present_0_key"]


def test_a_candidate_with_fewer_inputs():
    a = linear(body="s = Add(x, past_1)  y = MatMul(s, w)", inputs="float[N,6] x, float[N,6] past_1")
    data = open_data({"x": X, "past_1": 0 * X}, a)
    assert compare(a, linear(), data, provider="cpu").overall["rel-l2"] == 0


def test_the_summary_is_json(tmp_path):
    (tmp_path / "mine.py").write_text("def half(outputs, reference, batch): return 0.5")
    data = open_data({"x": X}, linear())
    found = compare(linear(), linear(2 * W), data, ["rel-l2", f"{tmp_path}/mine.py:half"], provider="cpu")
    summary = json.loads(json.dumps(found.to_dict()))
    assert summary["outputs"]["y"]["rel-l2"] == pytest.approx(1, rel=1e-6)
    assert summary["overall"][f"{tmp_path}/mine.py:half"] == 0.5
    assert summary["provider"] == "CPUExecutionProvider"
    assert summary["samples"] == 50
    assert all(isinstance(value, float) for value in summary["outputs"]["y"].values())


def test_nan_outputs_are_infinitely_wrong():
    data = open_data({"x": X}, linear())
    broken = linear(body="l = Log(x)  y = MatMul(l, w)")
    found = compare(linear(), broken, data, provider="cpu")
    assert set(found.overall.values()) == {np.inf}
    assert found.outputs[0].max_abs == np.inf
