# SPDX-License-Identifier: Apache-2.0
"""Sums that gather on the device: what they are, and what fp32 loses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.calibration import Cosine, Cross, Gram, Patches, Ref, collect, collector, open_data
from onnxcollapse.calibration.sessions import State, adopt
from onnxcollapse.structure import Window

rng = np.random.default_rng(7)
X = rng.standard_normal((100, 20)).astype(np.float32) + 3


def rows(data, part, name="x"):
    return np.concatenate([batch[name].astype(np.float64) for batch in data.batches(part)])


def activations(model, x):
    w1, w2 = (model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("w1", "w2"))
    z = x @ w1
    a = np.maximum(z, 0)
    return {"x": x, "z": z, "a": a, "y": a @ w2}


def test_cross_and_cosine_equal_numpy(encoder):
    model = encoder()
    ids = rng.integers(1, 50, (40, 7))
    mask = (np.arange(7) < rng.integers(2, 8, (40, 1))).astype(np.int64)
    data = open_data({"input_ids": ids, "attention_mask": mask}, model, batch_size=4)
    cross, cosine = Cross(Ref("e"), Ref("h")), Cosine(Ref("e"), Ref("h"))
    same = Cosine(Ref("e"), Ref("e"))
    statistics = collect(model, [cross, cosine, same], data, provider="cpu")
    table = model.graph.initializers["table"].const_value.numpy().astype(np.float64)
    kept = [batch["input_ids"][batch["attention_mask"] != 0] for batch in data.batches("fit")]
    e = table[np.concatenate(kept)]
    got = statistics.fit(cross)
    assert got.count == len(e)
    np.testing.assert_allclose(got.covariance, np.cov(e.T, bias=True), atol=1e-6)
    np.testing.assert_allclose(got.correlation(), np.corrcoef(e.T), atol=1e-5)
    assert statistics.fit(cosine).count == len(e)
    assert statistics.fit(cosine).mean == pytest.approx(1.0, abs=1e-6)  # h is e where there is no padding
    assert statistics.heldout(same).mean == pytest.approx(1.0, abs=1e-6)


def test_cosine_of_unrelated_rows_and_of_zeros(mlp):
    model = mlp()
    data = open_data({"x": X}, model)
    request = Cosine(Ref("z"), Ref("a"))
    values = activations(model, rows(data, "fit"))
    norms = np.linalg.norm(values["z"], axis=1) * np.linalg.norm(values["a"], axis=1)
    want = np.mean(np.sum(values["z"] * values["a"], axis=1) / norms)
    assert collect(model, [request], data, provider="cpu").fit(request).mean == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("read_out", [1, 3, 1000])
def test_sums_that_gather_on_the_device_stay_near_fp64(mlp, monkeypatch, read_out):
    """Many batches, an offset of a hundred deviations: what fp32 loses is relative to the spread."""
    monkeypatch.setattr(collector, "READ_OUT", read_out)
    model = mlp()
    x = (rng.standard_normal((4000, 20)) + 100).astype(np.float32)
    data = open_data({"x": x}, model, batch_size=16)
    gram = Gram((Ref("x"),), (Ref("y"),))
    got = collect(model, [gram], data, provider="cpu").fit(gram)
    values = activations(model, rows(data, "fit"))
    centred = np.concatenate([values["x"], values["y"]], axis=1)
    want = np.cov(centred.T, bias=True)
    covariance = (
        got.matrix[1:, 1:] / got.count - np.outer(got.matrix[0, 1:], got.matrix[0, 1:]) / got.count**2
    )
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    assert (np.abs(covariance - want) / scale).max() < 2e-5


def test_states_are_added_up_without_io_binding_where_inputs_are_strings(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, string[N] words) => (float[N,4] y, string[N] same) {
            y = Relu(x)
            same = Identity(words)
        }"""
    )
    x = rng.standard_normal((64, 4)).astype(np.float32)
    with adopt_with_sum(model) as session:
        words = np.array(["a"] * 32, object)
        for part in (x[:32], x[32:]):
            assert set(session.run({"x": part, "words": words})) == {"y", "same"}
        np.testing.assert_allclose(session.read()["sum"], x.T @ x, rtol=1e-5)
        np.testing.assert_array_equal(session.read()["sum"], [[0.0]])


def adopt_with_sum(model):
    """A session with the state sum += x'x."""
    scratch = model.clone()
    state = ir.Value(name="sum", shape=ir.Shape([None, None]), type=ir.TensorType(ir.DataType.FLOAT))
    scratch.graph.inputs.append(state)
    x = scratch.graph.inputs[0]
    node = ir.node("Gemm", [x, x, state], {"transA": 1})
    node.outputs[0].name, node.outputs[0].type = "sum_next", ir.TensorType(ir.DataType.FLOAT)
    scratch.graph.append(node)
    scratch.graph.outputs.append(node.outputs[0])
    return adopt(scratch, "cpu", {"sum": State("sum_next", np.zeros((1, 1), np.float32))})


@pytest.mark.parametrize("positions", [None, 8])
def test_patches_are_what_a_convolution_reads(build, positions):
    """The Conv's own output is the patches times its weight, so their joint sums are singular by exactly that."""
    weight = rng.standard_normal((4, 3, 3, 2)).astype(np.float32)
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x) => (float[N,4,P,Q] y) {
            a = Relu(x)
            y = Conv<kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1], dilations = [1, 2]>(a, w)
        }""",
        w=weight,
    )
    window = Window((3, 2), (2, 1), (1, 0, 1, 1), (1, 2))
    patches = Ref("a", axis=1, patches=Patches(window, 3), positions=positions)
    output = Ref("y", axis=1, positions=positions)
    x = rng.standard_normal((40, 3, 9, 8)).astype(np.float32)
    gram = Gram((patches,), (output,))
    got = collect(model, [gram], open_data({"x": x}, model), provider="cpu").fit(gram)
    assert got.widths == (18, 4)
    each = 5 * 7
    step = 1 if positions is None else 2 * (each // (2 * positions)) + 1
    assert got.count == 30 * each if step == 1 else abs(got.count - 30 * each / step) < 30
    matrix = weight.reshape(4, -1).T.astype(np.float64)
    np.testing.assert_allclose(got.block(1, 2), got.block(1, 1) @ matrix, atol=2e-4)
    np.testing.assert_allclose(got.block(2, 2), matrix.T @ got.block(1, 1) @ matrix, rtol=2e-4, atol=2e-4)


def test_statistics_of_an_fp16_model_are_near_those_of_fp32(mlp):
    """Within 1e-2: what fp16 activations lose, not what the sums do."""
    request = Gram((Ref("x"), Ref("a")), (Ref("y"),))
    x = rng.standard_normal((400, 20))
    found = []
    for dtype, kind in (("float", np.float32), ("float16", np.float16)):
        model = mlp(dtype=dtype)
        found.append(
            collect(model, [request], open_data({"x": x.astype(kind)}, model), provider="cpu").fit(request)
        )
    exact, half = (gram.matrix[1:, 1:] for gram in found)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact))) + 1e-6
    assert (np.abs(half - exact) / scale).max() < 1e-2
