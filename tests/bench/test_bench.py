# SPDX-License-Identifier: Apache-2.0
"""Benches of whole models: sweeps, decoding through a cache, footprints, and what cannot be timed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from onnxcollapse.bench import Settings, Sizes, Timing, bench
from onnxcollapse.bench.decoding import Steps, caches
from onnxcollapse.bench.footprint import file_bytes, measure, parse_apps
from onnxcollapse.bench.inputs import make
from onnxcollapse.calibration.sessions import open_file
from onnxcollapse.errors import ModelError, OptionError, ProviderError
from onnxcollapse.model import Model
from tests.passes.crossed import crossed
from tests.passes.merging import merged
from tests.support import Net, mlp, outputs, rows
from tests.verification.decoders import decoder

MODULE = sys.modules["onnxcollapse.bench.bench"]  # the package's name of it is the function
QUICK = Settings("cpu", 1, rounds=4, openings=2, warmup=1, repeats=2, tokens=3, footprint=False)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(MODULE, "LEAST_TURN", 0.001)


@pytest.fixture
def saved(tmp_path):
    def save(model, name: str = "model.onnx", **options):
        model.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def quick(**changes) -> Settings:
    return Settings(**{**QUICK.__dict__, **changes})


def test_every_size_of_a_sweep_is_timed_for_every_model(saved):
    models = [saved(mlp([8, width, 8]), f"{width}.onnx") for width in (16, 4)]
    found = bench(models, [Sizes(batch) for batch in (1, 32)], settings=QUICK)
    assert [(one.number, one.batch, one.phase) for one in found.latencies] == [
        (0, 1, "run"), (1, 1, "run"), (0, 32, "run"), (1, 32, "run"),
    ]  # fmt: skip
    assert [one.ratio is None for one in found.latencies] == [True, False] * 2
    assert [one.model for one in found.latencies[:2]] == [str(path) for path in models]
    assert found.provider == "CPUExecutionProvider"
    for one in found.latencies:
        assert one.rounds == 4
        assert one.calls >= 8
        assert 0 < one.p50 <= one.p90 <= one.p99
        assert one.samples_per_second == pytest.approx(one.batch / one.p50)


def test_a_model_of_a_fraction_of_the_work_takes_a_fraction_of_the_time(saved, monkeypatch):
    monkeypatch.setattr(MODULE, "LEAST_TURN", 0.02)
    models = [saved(mlp([256, width, 256]), f"{width}.onnx") for width in (4096, 64)]
    [_, small] = bench(models, [Sizes(64)], settings=quick(rounds=6)).latencies
    assert small.ratio.low <= small.ratio.value <= small.ratio.high
    assert small.ratio.value < 0.3


def test_percentiles_and_throughput_are_those_of_all_calls(saved, monkeypatch):
    turns = [tuple(np.arange(1, 51) / 1000), tuple(np.arange(51, 101) / 1000)]
    timings = iter([[Timing((turns[0],))], [Timing((turns[1],))]])
    monkeypatch.setattr(MODULE, "interleaved", lambda calls, **_: next(timings))
    [found] = bench([saved(mlp([8, 4, 8]))], [Sizes(4)], settings=QUICK).latencies
    assert (found.p50, found.p90, found.p99) == pytest.approx((0.0505, 0.0901, 0.09901))
    assert found.samples_per_second == pytest.approx(4 / 0.0505)
    assert (found.calls, found.rounds, found.tokens_per_second) == (100, 2, None)


def test_sessions_are_opened_anew_and_take_turns_at_being_first(saved, monkeypatch):
    opened = []
    monkeypatch.setattr(
        MODULE, "open_file", lambda path, *rest: opened.append(path.stem) or open_file(path, *rest)
    )
    models = [saved(mlp([8, width, 8]), f"{name}.onnx") for name, width in (("a", 16), ("b", 4))]
    found = bench(models, settings=quick(rounds=6, openings=3))
    assert "".join(opened) == "abbaab"
    assert found.settings["openings"] == 3
    assert {one.rounds for one in found.latencies} == {6}
    monkeypatch.setattr(MODULE, "LONG_OPENING", 0.0)
    opened.clear()
    found = bench(models, settings=quick(rounds=6, openings=3))
    assert ("".join(opened), found.settings["openings"]) == ("ab", 1)
    assert {one.rounds for one in found.latencies} == {6}


def test_a_merged_decoder_keeps_its_encoder_caches_from_step_to_step(saved):
    """It gives them empty once it has them; as long as the mask they would not be then."""
    model = saved(merged(crossed(2, caching="given"), crossed(2, caching="taken")), "merged.onnx")
    found = bench([model], [Sizes(2, 6, {"encoder_length": 5})], settings=QUICK)
    assert [one.phase for one in found.latencies] == ["prefill", "decode"]


def test_a_decoder_is_timed_over_its_prompt_and_token_by_token(saved):
    models = [saved(decoder(layers), f"{len(layers)}.onnx") for layers in ((0, 1, 2), (1,))]
    found = bench(models, [Sizes(2, 5), Sizes(2, 9)], settings=QUICK)
    assert [(one.number, one.phase, one.sequence) for one in found.latencies] == [
        (0, "prefill", 5), (1, "prefill", 5), (0, "decode", 5), (1, "decode", 5),
        (0, "prefill", 9), (1, "prefill", 9), (0, "decode", 9), (1, "decode", 9),
    ]  # fmt: skip
    prefill, _, decode, _ = found.latencies[:4]
    assert prefill.tokens_per_second == pytest.approx(2 * 5 / prefill.p50)
    assert decode.tokens_per_second == pytest.approx(2 / decode.p50)
    assert decode.samples_per_second is None
    cycle = QUICK.tokens + 1
    assert (decode.calls + decode.rounds) % cycle == 0, "a turn is whole cycles"


def test_models_with_and_without_a_cache_are_compared_as_wholes(saved):
    models = [saved(decoder(cached=cached), f"{cached}.onnx") for cached in (False, True)]
    found = bench(models, [Sizes(2, 5)], settings=QUICK).latencies
    assert [(one.number, one.phase) for one in found] == [(0, "run"), (1, "prefill"), (1, "decode")]
    assert [one.ratio is None for one in found] == [True, False, True]


@pytest.mark.parametrize("layers", [(0, 1), (1, 4)])
def test_steps_feed_the_cache_of_the_step_before(saved, layers):
    model = decoder(layers, masked=True)
    case = make(model, Sizes(2, 5))
    with open_file(saved(model), "cpu") as session:
        seen, run = [], session.run_there
        session.run_there = lambda values: seen.append(run(values)) or seen[-1]
        steps = Steps(session, model, case.feeds, caches(model), tokens=3)
        for _ in range(2 * steps.cycle + 1):
            steps()
    made = [{name: value.numpy() for name, value in one.items()} for one in seen]
    key = f"present.{layers[0]}.key"
    assert [one[key].shape[2] for one in made] == [5, 6, 7, 8, 9, 6, 7, 8, 9, 6]
    ids = case.feeds["input_ids"]
    ids = np.concatenate([ids, np.repeat(ids[:, -1:], 4, axis=1)], axis=1)
    positions = np.tile(np.arange(9), (2, 1))
    whole = outputs(decoder(layers, cached=False), input_ids=ids, position_ids=positions)["logits"]
    for place, one in enumerate(made[1:9]):
        assert np.allclose(one["logits"][:, 0], whole[:, 5 + place % 4], atol=1e-4)


def test_a_footprint_is_that_of_the_model_alone(saved):
    weights = 2 * 4 * 512 * 4096
    found = measure(saved(mlp([512, 4096, 512])), {"x": rows(2, 512)}, "cpu")
    assert weights / 2 < found.resident_bytes < 3 * weights, "without Python and its libraries"
    again = measure(saved(mlp([512, 4096, 512])), {"x": rows(2, 512)}, "cpu")
    assert again.resident_bytes == pytest.approx(found.resident_bytes, rel=0.05)
    assert found.session_seconds > 0
    assert found.device_bytes is None


def test_the_file_of_a_model_counts_with_its_external_data(saved):
    path = saved(mlp([64, 256, 64]), external=True)
    files = list(path.parent.iterdir())
    assert len(files) == 2
    assert file_bytes(Model.load(path)) == sum(file.stat().st_size for file in files)
    found = bench([path], settings=QUICK)
    assert found.subjects[0].file_bytes == file_bytes(Model.load(path))
    assert found.subjects[0].footprint is None


def test_a_child_that_fails_says_why(saved, monkeypatch):
    path = saved(mlp([8, 4, 8]))
    with pytest.raises(ModelError, match=r"model\.onnx cannot run on x \[2, 7\]: .*; give other sizes"):
        measure(path, {"x": rows(2, 7)}, "cpu")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(
        ModelError, match=r"memory of .* cannot be measured: it ended with 1; try --no-footprint"
    ):
        measure(path, {"x": rows(2, 8)}, "cpu")


def test_device_memory_is_that_of_the_process():
    text = "12, 300\n345, 1024\n345, 16\n7, [N/A]\n"
    assert parse_apps(text, 345) == 1040 << 20
    assert parse_apps(text, 7) is None
    assert parse_apps("", 345) is None


def test_cuda_graphs_need_cuda(saved):
    path = saved(mlp([8, 4, 8]))
    with pytest.raises(ProviderError, match=r"--cuda-graph: what runs is CPUExecutionProvider"):
        bench([path], settings=quick(cuda_graph=True))


def test_a_graph_is_captured_once_a_size_and_not_of_a_growing_cache(saved, monkeypatch):
    monkeypatch.setattr(
        MODULE, "_provider", lambda settings: "cpu"
    )  # which takes the option and captures nothing
    fixed, opened = [], MODULE.open_file
    monkeypatch.setattr(MODULE, "open_file", lambda *args: fixed.append(args[-1]) or opened(*args))
    found = bench([saved(mlp([8, 4, 8]))], [Sizes(1), Sizes(4)], settings=quick(cuda_graph=True))
    assert [one.batch for one in found.latencies] == [1, 4]
    assert [one.rounds for one in found.latencies] == [4, 4]
    assert fixed == [{"n": 1}, {"n": 4}] * 2, "for each opening a session of each size"
    bench([saved(mlp([8, 4, 8]))], [Sizes(1), Sizes(4)], settings=QUICK)
    assert fixed[4:] == [{}] * 2
    with pytest.raises(OptionError, match=r"--cuda-graph: .*has a KV cache"):
        bench([saved(decoder())], [Sizes(1, 4)], settings=quick(cuda_graph=True))


def test_models_have_to_do_as_much(saved):
    net = Net()
    net.op("Relu", "x", name="y")
    four = saved(net.model({"x": [4, 8]}, {"y": [4, 8]}), "four.onnx")
    with pytest.raises(OptionError, match=r"runs 4 samples and .*model\.onnx 1 samples"):
        bench([saved(mlp([8, 4, 8])), four], settings=QUICK)
    assert bench([four], settings=QUICK).latencies[0].batch == 4
    with pytest.raises(OptionError, match="no model to time"):
        bench([])


def test_what_a_model_cannot_run_names_it(saved):
    path = saved(decoder())
    with pytest.raises(
        ModelError, match=r"model\.onnx cannot run on input_ids \[1, 90\].*; give other sizes"
    ):
        bench([path], [Sizes(1, 90)], settings=QUICK)  # it knows 80 places
    with pytest.raises(ModelError, match=r"model\.onnx cannot run on"):
        bench([path], [Sizes(1, 79)], settings=QUICK)  # and gets there while decoding
