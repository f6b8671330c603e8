# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse.calibration import open_data
from onnxcollapse.errors import DataError, MetricError, ModelError
from onnxcollapse.model.model import Model
from onnxcollapse.verification import Verifier

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


def test_verifier_measures_the_held_out_part():
    changed = W * 1.01 + 0.1
    data = open_data({"x": X}, linear())
    with Verifier(linear(), data, provider="cpu") as verifier:
        assert verifier.error(linear()) == 0
        for part in ("heldout", "fit", "all"):
            expected = expected_rel_l2(data, part, changed)
            assert verifier.error(linear(changed), part) == pytest.approx(expected, rel=1e-5)
        few = verifier.error(linear(changed), "fit", limit=5)
        assert few != verifier.error(linear(changed), "fit")
        assert verifier.provider.obtained == "CPUExecutionProvider"


@pytest.fixture
def runs(monkeypatch):
    """Grows by one with every batch that any session runs."""
    from onnxcollapse.calibration.sessions import Session

    seen, run = [], Session.run

    def counted(self, feeds):
        seen.append(self)
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", counted)
    return seen


@pytest.mark.parametrize("limit", [0, 256 << 20])
def test_the_reference_runs_once_if_its_outputs_are_small(monkeypatch, runs, limit):
    monkeypatch.setattr("onnxcollapse.verification.verifier.CACHE_BYTES", limit)
    data = open_data({"x": X}, linear(), batch_size=6)
    verifier = Verifier(linear(), data, provider="cpu")
    errors = [verifier.error(linear(factor * W)) for factor in (2, 3, 4)]
    assert errors == pytest.approx([1, 2, 3], rel=1e-6)
    assert len(runs) == (3 * 2 * 2 if limit == 0 else 2 + 3 * 2)


def test_of_a_reference_too_large_to_be_kept_only_what_lies_behind_the_last_cut_runs_again(monkeypatch, runs):
    monkeypatch.setattr("onnxcollapse.verification.verifier.CACHE_BYTES", 0)
    body = "h = MatMul(x, w)  y = Relu(h)"
    data = open_data({"x": X}, linear(body=body), batch_size=6)
    whole = Verifier(linear(body=body), data, provider="cpu")
    errors = [whole.error(linear(factor * W, body=body)) for factor in (1.5, 2)]
    cut = Verifier(linear(body=body), data, provider="cpu", cuts=["h"])
    runs.clear()
    assert [cut.error(linear(factor * W, body=body)) for factor in (1.5, 2)] == pytest.approx(
        errors, abs=1e-6
    )
    assert len(runs) == 2 * (2 * 2 + 1 + 2)  # two batches: both candidates twice, the reference's two parts


def test_a_model_is_measured_once(runs):
    """Also where it is another copy; not where a weight of it is another."""
    wide = rng.standard_normal((6, 400)).astype(np.float32)  # not written into the graph
    reference, changed = (linear(w, outputs="float[N,400] y") for w in (wide, 2 * wide))
    data = open_data({"x": X}, reference)
    verifier = Verifier(reference, data, provider="cpu")
    error = verifier.error(changed)
    done = len(runs)
    assert verifier.error(changed.clone()) == error
    assert len(runs) == done
    changed.graph.initializers["w"].const_value = ir.tensor(3 * wide)
    assert verifier.error(changed) == pytest.approx(2 * error, rel=1e-6)
    assert verifier.error(changed, "fit") > 0
    assert verifier.error(changed, limit=3) > 0
    assert len(runs) == done + 1 + 2 + 2


def test_the_reference_does_not_run_beside_itself(runs):
    data = open_data({"x": X}, linear())
    assert Verifier(linear(), data, provider="cpu").error(linear()) == 0
    assert len(runs) == 1


def test_what_is_asked_next_is_measured_in_the_same_run(runs):
    changed = W * 1.01 + 0.1
    data = open_data({"x": X}, linear())
    verifier = Verifier(linear(), data, "cosine", "cpu")
    distance = verifier.distance(linear(changed), beside=verifier)
    assert distance == pytest.approx(expected_rel_l2(data, "heldout", changed), rel=1e-5)
    done = len(runs)
    cosine = verifier.error(linear(changed))
    assert len(runs) == done == 2
    assert cosine == Verifier(linear(), data, "cosine", "cpu").error(linear(changed))


def test_a_run_serves_a_verifier_with_another_reference_too(runs):
    data = open_data({"x": X}, linear())
    first, second = (Verifier(linear(factor * W), data, provider="cpu") for factor in (1, 2))
    assert second.distance(linear(3 * W), beside=first) == pytest.approx(0.5, rel=1e-6)
    assert len(runs) == 3
    assert first.error(linear(3 * W)) == pytest.approx(2, rel=1e-6)
    assert len(runs) == 3


def test_a_metric_that_fails_beside_another_fails_where_it_is_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text("def f(outputs, reference, batch): raise ValueError('no')")
    data = open_data({"x": X}, linear())
    verifier = Verifier(linear(), data, f"{tmp_path}/mine.py:f", "cpu")
    assert verifier.distance(linear(2 * W), beside=verifier) == pytest.approx(1, rel=1e-6)
    with pytest.raises(MetricError, match="fails with ValueError"):
        verifier.error(linear(2 * W))


def test_the_verifier_keeps_the_model_it_was_given():
    model = linear()
    data = open_data({"x": X}, model)
    verifier = Verifier(model, data, provider="cpu")
    model.ir = linear(3 * W).ir
    assert verifier.error(linear()) == 0
    assert verifier.error(model) == pytest.approx(2, rel=1e-6)


def test_the_verifier_needs_no_caches():
    """Caches are not even computed: one that cannot be is no obstacle."""
    both = linear(
        body="y = MatMul(x, w)  present_0_key = Neg(x)", outputs="float[N,4] y, float[N,6] present_0_key"
    )
    data = open_data({"x": X}, both)
    verifier = Verifier(both, data, provider="cpu")
    assert verifier.error(linear(2 * W)) == pytest.approx(1, rel=1e-6)
    bad = linear(
        body="y = MatMul(x, w)  b = Constant<value = int64[1] {-7}>()  present_0_key = Reshape(x, b)",
        outputs="float[N,4] y, float[K] present_0_key",
    )
    assert verifier.error(bad) == 0


def test_what_a_verifier_refuses(tmp_path):
    data = open_data({"x": X}, linear())
    with pytest.raises(MetricError, match="unknown"):
        Verifier(linear(), data, "nonsense")
    other = linear(outputs="float[N,4] z", body="z = MatMul(x, w)")
    with pytest.raises(MetricError, match="output 'y' is missing"):
        Verifier(linear(), data, provider="cpu").error(other)
    narrow = linear(W[:, :3], outputs="float[N,3] y")
    with pytest.raises(MetricError, match=r"shape \[12, 3\] instead of \[12, 4\]"):
        Verifier(linear(), data, provider="cpu").error(narrow)
    strange = linear(body="y = Nonsense(x)")
    with pytest.raises(ModelError, match="cannot load"):
        Verifier(linear(), data, provider="cpu").error(strange)
    with pytest.raises(DataError, match="at least 2 samples"):
        Verifier(linear(), open_data({"x": X[:1]}, linear()), provider="cpu").error(linear())


def test_a_users_metric_sees_every_output(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(outputs, reference, batch): return float(len(outputs) * 10 + len(reference) + len(batch))"
    )
    both = linear(
        body="y = MatMul(x, w)  present_0_key = Neg(x)", outputs="float[N,4] y, float[N,6] present_0_key"
    )
    data = open_data({"x": X}, both)
    assert Verifier(both, data, f"{tmp_path}/mine.py:f", "cpu").error(both) == 23
