# SPDX-License-Identifier: Apache-2.0
"""What the tool has to show on real models with real data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn

from onnxcollapse import Budget, Model, compare, open_data, optimize
from onnxcollapse.calibration import Gram, Ref, collect, cut_points
from onnxcollapse.model.edit import check
from onnxcollapse.structure import feedforwards
from tests.integration.conftest import run

pytestmark = pytest.mark.slow

SILERO = {  # its sizes are not in the file: one stream at 16 kHz
    "input": np.random.default_rng(0).normal(size=(4, 1, 512)).astype(np.float32) / 10,
    "state": np.zeros((4, 2, 1, 128), np.float32),
    "sr": np.full(4, 16_000, np.int64),
}


def feeds_for(name: str) -> object:
    return SILERO if name in ("silero_vad.onnx", "silero_vad_op18_ifless.onnx") else "random:3"


def worst(a: Model, b: Model, data: object) -> float:
    return compare(a, b, open_data(data, a), metrics=["rel-l2"], provider="cpu").overall["rel-l2"]


def test_every_file_survives_a_round_trip_and_the_exact_passes(real, tmp_path):
    files = sorted(real("zoo").rglob("*.onnx"))
    assert len(files) >= 28
    for path in files:
        model, data = Model.load(path), feeds_for(path.name)
        model.save(tmp_path / "same.onnx")
        same = Model.load(tmp_path / "same.onnx")
        assert same.signature() == model.signature(), path
        assert worst(model, same, data) <= 1e-6, path
        result = optimize(model)
        result.model.save(tmp_path / "small.onnx")
        small = Model.load(tmp_path / "small.onnx")
        check(small, full=True)
        assert small.signature() == model.signature(), path
        assert result.after.params <= result.before.params, path
        assert worst(model, small, data) <= 1e-5, path


@pytest.mark.parametrize("recipe", ["minilm_l3", "minilm_l6"])
def test_real_onnx_survives_a_round_trip(real, tmp_path, recipe):
    folder = real(recipe)
    model = Model.load(folder / "model.onnx")
    model.save(tmp_path / "same.onnx")
    assert worst(model, Model.load(tmp_path / "same.onnx"), str(folder / "eval.npz")) <= 1e-6


def optimized(folder, budget, **options):
    model = Model.load(folder / "model.onnx")
    data = open_data(str(folder / "calib.npz"), model)
    return optimize(model, data, budget=Budget(budget), provider="cpu", **options)


def test_prelu_mlp_is_folded_and_keeps_its_accuracy(real, tmp_path):
    folder = real("fashion_mlp")
    out = tmp_path / "small.onnx"
    done = run("-m", "onnxcollapse", "optimize", folder / "model.onnx", "-o", out, "--calib", folder / "calib.npz",
               "--pass", "collapse-ffn:method=fold", "--json")  # fmt: skip
    summary = json.loads(done.stdout)
    hidden = 784 * 1024 + 1024 + 1 + 1024 * 1024 + 1024 + 1  # two layers stay, with their slopes
    assert summary["params_after"] == hidden + 1024 * 10 + 10
    assert summary["error"] <= 0.01
    before, after = (
        json.loads(run("-m", "models.fashion_mlp", "-o", folder, "--measure", path).stdout)["value"]
        for path in (folder / "model.onnx", out)
    )
    assert after >= before - 0.005


def test_relu_mlp_saves_more_at_larger_budgets(real):
    folder = real("fashion_mlp", "--activation", "relu")
    left = []
    for budget in (0.01, 0.05, 0.1):
        result = optimized(folder, budget)
        assert result.error <= budget
        left.append(result.after.params)
    assert left[0] > left[1] > left[2]
    assert left[0] < 2_840_586


def test_minilm_l3_gives_up_a_block_at_five_percent_and_none_at_one(real):
    folder = real("minilm_l3")
    small, large = optimized(folder, 0.01), optimized(folder, 0.05)
    assert small.error <= 0.01
    assert large.error <= 0.05
    assert large.after.params < small.after.params
    assert all(entry.reason for entry in large.journal)


def test_minilm_l6_has_no_block_to_spare_and_says_so(real):
    result = optimized(real("minilm_l6"), 0.1, passes=[CollapseFfn()])
    assert result.error <= 0.1
    sites = {e.site for e in result.journal.of("declined") if "over the budget of 0.1" in e.reason}
    assert len(sites) == 6


@pytest.mark.parametrize("options", [(), ("--untied",)], ids=["tied", "untied"])
def test_smollm2_decodes_the_same_in_less_space(real, tmp_path, options):
    folder = real("smollm2", *options)
    done = run("-m", "onnxcollapse", "optimize", folder, "-o", tmp_path / "small", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["peak_rss_bytes"] < 400 << 20
    if options:
        assert summary["bytes_before"] - summary["bytes_after"] >= 49152 * 576 * 4
    assert (tmp_path / "small" / "config.json").exists()
    texts = [
        json.loads(
            run("-m", "models.smollm2", "-o", folder, *options, "--measure", path, "--generate", 24).stdout
        )["generated"]
        for path in (folder / "model.onnx", tmp_path / "small" / "model.onnx")
    ]
    assert len(texts[0]) == 24
    assert texts[0] == texts[1]


@pytest.mark.parametrize("recipe", ["minilm_l6", "smollm2"])
def test_statistics_of_segments_equal_those_of_the_whole(real, recipe):
    folder = real(recipe)
    model = Model.load(folder / "model.onnx")
    with np.load(folder / "calib.npz") as arrays:
        data = open_data({name: arrays[name][:4] for name in arrays.files}, model)
    sites = feedforwards(model.graph)[0][::5]
    requests = [
        Gram((Ref(site.input.name), Ref(site.hidden.name)), (Ref(site.output.name),)) for site in sites
    ]
    points = cut_points(model.graph)
    assert len(points) >= 6
    whole, parts = (collect(model, requests, data, provider="cpu", cuts=cuts) for cuts in ((), points))
    for request in requests:
        a, b = parts.fit(request).matrix, whole.fit(request).matrix
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
