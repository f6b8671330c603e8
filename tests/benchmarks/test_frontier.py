# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import frontier, frontier_ablation, frontier_table, machine
from onnxcollapse.model import Model, size

WIDTHS = (12, 64, 72, 10)


@pytest.fixture
def mlp(tmp_path):
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(WIDTHS)):
        shapes = {"w": (rows, columns), "b": (columns,)}
        for kind, shape in shapes.items():
            tensors.append(numpy_helper.from_array(rng.normal(size=shape).astype("f"), f"{kind}{index}"))
        nodes.append(helper.make_node("Gemm", [value, f"w{index}", f"b{index}"], [f"z{index}"]))
        value = f"a{index}"
        if index < len(WIDTHS) - 2:
            nodes.append(helper.make_node("Relu", [f"z{index}"], [value]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTHS[0]])
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", WIDTHS[-1]])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(tmp_path / "calib.npz", x=rng.normal(size=(400, WIDTHS[0])).astype("f"))
    return path


def optimized(mlp, spec, *options):
    with frontier_ablation.registered() as path:
        command = [sys.executable, "-m", "onnxcollapse", "optimize", str(mlp), "-o", str(mlp.with_name("o.onnx")),
                   "--calib", str(mlp.with_name("calib.npz")), "--pass", spec, "--json", *options]  # fmt: skip
        surroundings = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
    return json.loads(done.stdout)


def test_uniform_widths_reach_the_target_and_the_next_share_would_not(mlp):
    model = Model.load(mlp)
    share = frontier_ablation.uniform_share(model, size(model).params, 0.5)
    summary = optimized(mlp, f"narrow-ffn-ablated:share={share}", "--target", "params=0.5", "--metric", "kl")
    widths = [frontier_ablation.uniform(width, share) for width in WIDTHS[1:-1]]
    chain = [WIDTHS[0], *widths, WIDTHS[-1]]
    left = sum((rows + 1) * columns for rows, columns in itertools.pairwise(chain))
    assert summary["params_after"] == left <= 0.5 * summary["params_before"]
    wider = [width + 8 for width in widths]
    chain = [WIDTHS[0], *wider, WIDTHS[-1]]
    assert sum((r + 1) * c for r, c in itertools.pairwise(chain)) > 0.5 * summary["params_before"]


def test_kept_weights_are_rows_of_the_originals(mlp):
    spec = "narrow-ffn-ablated:fitted=false"
    summary = optimized(mlp, spec, "--target", "params=0.9", "--metric", "kl")
    assert summary["rewrites"] and all("as they were" in r["detail"] for r in summary["rewrites"])
    values = np.concatenate(
        [numpy_helper.to_array(t).ravel() for t in onnx.load(mlp.with_name("o.onnx")).graph.initializer]
    )
    originals = np.concatenate([numpy_helper.to_array(t).ravel() for t in onnx.load(mlp).graph.initializer])
    assert np.isin(values, originals).all()


def test_feed_forward_parameters_are_what_leaves_with_the_channels(mlp):
    first, second = (WIDTHS[0] + 1 + WIDTHS[2]) * WIDTHS[1], (WIDTHS[1] + 1 + WIDTHS[3]) * WIDTHS[2]
    assert frontier_ablation.ffn_params(Model.load(mlp)) == first + second


def test_jobs_are_those_of_the_model_and_narrowed_by_method_and_share():
    asked = list(frontier.jobs(["mlp"], ["ours", "activation-rate", "ours-flops"], [0.16, 0.33]))
    assert [job.key for job in asked] == [
        ("mlp", "original", None),
        ("mlp", "ours", 0.16),
        *(("mlp", f"activation-rate {t:g}", None) for t in frontier.THRESHOLDS),
    ]
    assert ("vgg", "ours-flops", 0.5) in {job.key for job in frontier.jobs(["vgg"], [], [])}


def test_every_model_names_known_methods():
    for setting in frontier.SETTINGS.values():
        assert set(setting.methods) <= set(frontier.METHODS)
        assert set(setting.samples or {}) <= {frontier.METHODS[m].rival for m in setting.methods}


def summary(metric):
    rewrite = {"site": "s", "variant": "keep 8", "params_saved": 1}
    sizes = {
        f"{name}_{when}": value
        for name in ("params", "flops")
        for when, value in (("before", 8), ("after", 2))
    }
    return {
        **sizes, "metric": metric, "error": 0.1, "met": True, "seconds": 1.5, "peak_rss_bytes": 2**21,
        "rewrites": [
            {**rewrite, "predicted_error": 0.3, "impact": 0.03},
            {**rewrite, "predicted_error": 0.4, "impact": 0.04},
            {**rewrite, "predicted_error": 0.2, "impact": None},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(("metric", "together"), [("kl", 0.07), ("rel-l2", 0.05)])
def test_effects_add_up_in_the_power_of_the_metric_and_repairs_have_none(metric, together):
    row = frontier.of_summary(summary(metric))
    assert row["predicted"] == pytest.approx(together)
    assert row["rewrites"] == [(0.3, 0.03), (0.4, 0.04)] and len(row["variants"]) == 2
    assert (row["params_left"], row["flops_left"], row["peak_rss_mib"]) == (0.25, 0.25, 2)


def test_a_new_row_replaces_the_one_of_its_key_and_rows_are_in_order():
    def row(model, method, share, quality):
        return {"model": model, "method": method, "share": share, "quality": quality}

    old = [row("vgg", "ours", 0.5, 2), row("mlp", "ours", 0.05, 3), row("mlp", "ours", 0.5, 1)]
    new = [row("mlp", "ours", 0.5, 4), row("mlp", "original", None, 5)]
    new += [row("mlp", f"activation-rate {t:g}", None, t) for t in (0.5, 0.1)]
    assert [r["quality"] for r in frontier.merged(old, new)] == [5, 4, 3, 0.1, 0.5, 2]


def test_the_table_has_a_line_for_each_row_and_what_is_lost():
    rows = [
        {"model": "mlp", "method": "original", "share": None, "measure": "accuracy", "quality": 0.9},
        {"model": "mlp", "method": "ours", "group": "ours", "share": 0.16, "quality": 0.89, "error": 0.02,
         "predicted": 0.01, "rewrites": [[0.1, 1e-4], [0.2, 2e-4], [0.3, 4e-4]], "met": False, "note": "why"},
        {"model": "mlp", "method": "rival", "share": 0.16, "problem": "cannot"},
    ]  # fmt: skip
    lines = frontier_table.text(rows).splitlines()
    assert lines[0] == "mlp (accuracy)" and lines[1].split() == list(frontier_table.HEAD)
    assert lines[3].split()[:4] == ["ours", "0.16", "0.8900", "+0.0100"] and lines[3].endswith("why; not met")
    assert lines[4].endswith("cannot")
    assert lines[6] == "controls and published: no predictions to compare"
    assert "ours and ablations: 3 rewrites" in lines[5] and "1.00;" in lines[5] and "worst 0.50" in lines[5]


def test_predictions_need_more_than_two_points():
    row = {"rewrites": [[0.1, 1e-4], [0.2, 2e-4]], "error": 0.1, "predicted": 0.1}
    assert frontier_table.prediction([row]) == "no predictions to compare"


def test_rows_there_already_are_left_out_and_the_table_is_printed(tmp_path, monkeypatch, capsys):
    class Bench:
        def __init__(self, name, output, path):
            pass

        def row(self, job):
            return {"model": job.model, "method": job.label, "share": job.share, "quality": 0.5, "load": 0.0}

    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(frontier, "Bench", Bench)
    arguments = ["-o", str(tmp_path), "--models", "mlp", "--methods", "ours", "--shares", "0.5"]
    assert frontier.main(arguments) == 0
    assert [r["method"] for r in frontier.results()] == ["original", "ours"]
    capsys.readouterr()
    assert frontier.main([*arguments, "--missing"]) == 0
    printed = capsys.readouterr().out
    assert not printed.startswith("{") and "ours" in printed
