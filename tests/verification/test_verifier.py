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


@pytest.mark.parametrize("limit", [0, 256 << 20])
def test_the_reference_runs_once_if_its_outputs_are_small(monkeypatch, limit):
    from onnxcollapse.calibration.sessions import Session

    monkeypatch.setattr("onnxcollapse.verification.verifier.CACHE_BYTES", limit)
    runs = []
    run = Session.run

    def counted(self, feeds):
        runs.append(self)
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", counted)
    data = open_data({"x": X}, linear(), batch_size=6)
    verifier = Verifier(linear(), data, provider="cpu")
    errors = [verifier.error(linear(2 * W)) for _ in range(3)]
    assert errors == [pytest.approx(1, rel=1e-6)] * 3
    assert len(runs) == (3 * 2 * 2 if limit == 0 else 2 + 3 * 2)


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
