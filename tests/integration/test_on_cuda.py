# SPDX-License-Identifier: Apache-2.0
"""On a GPU: sums, rewrites, measurements and benches are what they are on the CPU."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse import Budget, Model, Target, compare, open_data, optimize
from onnxcollapse.bench import Settings, Sizes, bench
from onnxcollapse.bench.decoding import Steps, caches
from onnxcollapse.bench.footprint import measure
from onnxcollapse.bench.inputs import make
from onnxcollapse.calibration import Cosine, Cross, Gram, Ref, collect, open_session, providers
from onnxcollapse.calibration.sessions import open_file
from onnxcollapse.errors import ProviderError
from tests.passes.crossed import crossed, samples
from tests.passes.merging import merged
from tests.support import mlp, outputs, rows
from tests.verification.decoders import decoder

pytestmark = pytest.mark.skipif(not providers.works(providers.CUDA), reason="CUDA does not work here")

QUICK = Settings("cuda", rounds=4, openings=2, warmup=1, repeats=2, tokens=3, footprint=False)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(sys.modules["onnxcollapse.bench.bench"], "LEAST_TURN", 0.001)


class Bindings:
    """A handle that remembers its bindings."""

    def __init__(self, handle):
        self.handle, self.made = handle, []

    def io_binding(self):
        self.made.append(self.handle.io_binding())
        return self.made[-1]

    def run_with_iobinding(self, *arguments):
        return self.handle.run_with_iobinding(*arguments)


def on_both(work):
    """What a piece of work gives on the CPU and on CUDA."""
    return work("cpu"), work("cuda")


def test_what_is_asked_for_is_what_runs():
    model = mlp([8, 16, 8])
    x = rows(50, 8)
    cpu, cuda = on_both(lambda name: open_session(model, provider=name).run({"x": x})["y"])
    np.testing.assert_allclose(cuda, cpu, rtol=1e-5, atol=1e-5)
    for name in ("auto", "cuda", "cuda:0", "cuda,gpu_mem_limit=1GB"):
        with open_session(model, provider=name) as session:
            assert session.provider.obtained == providers.CUDA
    with pytest.raises(ProviderError, match="refuses --provider cuda:99"):
        open_session(model, provider="cuda:99")


def test_products_are_not_rounded_to_tf32():
    model, x = mlp([512, 8]), rows(64, 512)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    want = x.astype(np.float64) @ weights["c0"].T.astype(np.float64) + weights["c1"]
    with open_session(model, provider="cuda") as session:
        got = session.run({"x": x})["y"]
    assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)


def test_sums_gather_on_the_device():
    model = mlp([20, 30, 5])
    data = open_data({"x": rows(500, 20) + 3}, model, batch_size=16)
    hidden = next(node.outputs[0].name for node in model.graph if node.op_type == "Relu")
    gram, cross, cosine = (
        Gram((Ref("x"),), (Ref(hidden),)),
        Cross(Ref("x"), Ref("x")),
        Cosine(Ref("x"), Ref("x")),
    )
    cpu, cuda = on_both(lambda name: collect(model, [gram, cross, cosine], data, provider=name))
    np.testing.assert_allclose(cuda.fit(gram).matrix, cpu.fit(gram).matrix, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(cuda.fit(cross).covariance, cpu.fit(cross).covariance, atol=1e-4)
    assert cuda.heldout(cosine).mean == pytest.approx(cpu.heldout(cosine).mean, abs=1e-5)


@pytest.mark.parametrize("target", ["params", "flops", "bytes"])
def test_a_model_is_made_as_small_at_the_same_error(target):
    model = mlp([16, 64, 64, 16])
    data = open_data({"x": rows(600, 16, rank=6)}, model)
    budget = Budget(None, "rel-l2", Target(target, 0.6))
    cpu, cuda = on_both(lambda name: optimize(model, data, budget=budget, provider=name))
    assert cpu.met
    assert cuda.met
    assert cuda.provider == providers.CUDA
    assert cuda.error == pytest.approx(cpu.error, rel=0.05, abs=1e-5)
    assert [entry.site for entry in cuda.journal.of("kept")] == [
        entry.site for entry in cpu.journal.of("kept")
    ]
    found = compare(model, cuda.model, data, ["rel-l2"], "heldout", "cpu").overall["rel-l2"]
    assert found == pytest.approx(cuda.error, rel=0.01, abs=1e-5)


def test_latency_is_that_of_the_device():
    model = mlp([512, 1024, 1024, 512])
    data = open_data({"x": rows(600, 512, rank=16)}, model)
    result = optimize(model, data, budget=Budget(None, "rel-l2", Target("latency", 0.9)), provider="cuda")
    assert result.met
    before, after = result.extent("latency")
    assert after <= 0.9 * before


def test_a_merged_decoder_keeps_its_cache():
    both = merged(crossed(caching="given"), crossed(caching="taken")).to_bytes()
    model = Model(ir.from_proto(onnx.load_from_string(both)))
    data = open_data(samples(crossed(caching="given"), 48, seed=0), model)
    result = optimize(model, data, budget=Budget(None, "rel-l2", Target("params", 0.9)), provider="cuda")
    assert result.met
    assert result.error == pytest.approx(
        compare(model, result.model, data, ["rel-l2"], "heldout", "cpu").overall["rel-l2"], rel=0.01, abs=1e-5
    )


def test_decoding_stays_on_the_device(tmp_path):
    model = decoder((0, 1), masked=True)
    model.save(tmp_path / "model.onnx")
    case = make(model, Sizes(2, 5))
    with open_file(tmp_path / "model.onnx", "cuda") as session:
        seen, run = [], session.run_there
        session.run_there = lambda values: seen.append(run(values)) or seen[-1]
        steps = Steps(session, model, case.feeds, caches(model), tokens=3)
        for _ in range(2 * steps.cycle):
            steps()
        assert {value.device_name() for value in seen[-1].values()} == {"cuda"}
        logits = [one["logits"].numpy() for one in seen]
    ids = case.feeds["input_ids"]
    ids = np.concatenate([ids, np.repeat(ids[:, -1:], 4, axis=1)], axis=1)
    whole = outputs(decoder((0, 1), cached=False), input_ids=ids, position_ids=np.tile(np.arange(9), (2, 1)))[
        "logits"
    ]
    for place, one in enumerate(logits[1:]):
        np.testing.assert_allclose(one[:, 0], whole[:, 5 + place % 4], atol=1e-4)


@pytest.mark.parametrize("graph", [False, True])
def test_a_bench_runs_where_it_says(tmp_path, graph):
    paths = [tmp_path / f"{width}.onnx" for width in (64, 16)]
    for path in paths:
        mlp([32, int(path.stem), 32]).save(path)
    settings = Settings(**{**QUICK.__dict__, "cuda_graph": graph})
    found = bench(paths, [Sizes(1), Sizes(8)], settings=settings)
    assert found.provider == providers.CUDA
    assert [(one.number, one.batch) for one in found.latencies] == [(0, 1), (1, 1), (0, 8), (1, 8)]


@pytest.mark.parametrize("size", [1, 8])
def test_a_graph_gives_what_a_run_gives(tmp_path, size):
    model, feeds = mlp([32, 64, 32]), {"x": rows(size, 32)}
    model.save(tmp_path / "model.onnx")
    with open_file(tmp_path / "model.onnx", "cuda,enable_cuda_graph=1", sizes={"n": size}) as session:
        spy = session._handle = Bindings(session._handle)
        call = session.captured(feeds)
        for _ in range(3):
            call()
        found = spy.made[0].get_outputs()[0].numpy()
    np.testing.assert_allclose(found, outputs(model, **feeds)["y"], atol=1e-5)


def test_the_footprint_counts_the_device(tmp_path):
    path = tmp_path / "model.onnx"
    mlp([512, 4096, 512]).save(path)
    found = measure(path, {"x": rows(2, 512)}, "cuda")
    assert found.device_bytes is None or found.device_bytes > 2 * 4 * 512 * 4096
