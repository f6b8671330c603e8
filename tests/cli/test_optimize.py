# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from onnxcollapse import Model
from tests.cli.workspace import PRECIOUS, one_line
from tests.support import mlp, outputs, relative, rows

NUMBER = (int, float)
TYPES = {
    "params_before": int,
    "params_after": int,
    "bytes_before": int,
    "bytes_after": int,
    "flops_before": int,
    "flops_after": int,
    "metric": str,
    "error": NUMBER,
    "budget": NUMBER,
    "provider": str,
    "seconds": NUMBER,
    "peak_rss_bytes": int,
    "rewrites": list,
    "declined": list,
    "met": bool,
    "notes": list,
    "output": str,
}
REWRITE = {"pass": str, "site": str, "params_saved": int, "predicted_error": NUMBER}
DECLINED = {"pass": str, "site": str, "reason": str}


def check_types(document: dict, types: dict) -> None:
    for key, kind in types.items():
        assert isinstance(document[key], kind), key
        assert kind is bool or not isinstance(document[key], bool), key


def test_json_has_every_promised_key_with_the_right_figures(workspace):
    found = workspace.summary("--budget", 0.1)
    check_types(found, TYPES)
    [rewrite] = found["rewrites"]
    check_types(rewrite, REWRITE)
    before, after = 8 * 64 + 64 + 1 + 64 * 8 + 8, 8 * 8 + 8
    assert (found["params_before"], found["params_after"]) == (before, after)
    assert (found["bytes_before"], found["bytes_after"]) == (4 * before, 4 * after)
    batch = found["flops_before"] // (2 * 2 * 8 * 64)
    assert (found["flops_before"], found["flops_after"]) == (batch * 2 * 2 * 8 * 64, batch * 2 * 8 * 8)
    assert (found["metric"], found["budget"], found["provider"]) == ("rel-l2", 0.1, "CPUExecutionProvider")
    assert (rewrite["pass"], rewrite["site"], rewrite["params_saved"]) == (
        "collapse-ffn",
        "y",
        before - after,
    )
    assert 0 < found["error"] <= 0.1
    assert found["met"] is True
    assert found["peak_rss_bytes"] > 20 << 20
    small, x = Model.load(workspace.folder / "out.onnx"), rows(100, 8, seed=9)
    want = outputs(Model.load(workspace.folder / "model.onnx"), x=x)["y"]
    assert relative(outputs(small, x=x)["y"], want) == pytest.approx(found["error"], rel=0.3)


def test_what_was_left_alone_is_listed_with_the_reason(workspace):
    workspace.write_model(mlp([8, 64, 8]))
    found = workspace.summary()
    assert found["rewrites"] == []
    for entry in found["declined"]:
        check_types(entry, DECLINED)
    assert any("over the budget of 0.01" in entry["reason"] for entry in found["declined"])
    assert found["params_after"] == found["params_before"]


def test_without_data_nothing_is_measured_and_the_output_says_what_data_would_add(workspace):
    found = workspace.summary(calib=None)
    assert found["error"] is None
    assert any("--calib" in note and "collapse-ffn" in note for note in found["notes"])
    assert any("--calib" in entry["reason"] for entry in found["declined"])


def test_random_data_is_flagged_as_no_evidence(workspace):
    assert any("random" in note for note in workspace.summary(calib="random:16")["notes"])


def test_the_console_names_sizes_error_provider_and_what_was_written(workspace):
    result = workspace.optimize("--budget", 0.1)
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in ("params", "1,097", "72", "collapse-ffn", "rel-l2", "CPUExecutionProvider", "Wrote out.onnx"):
        assert text in result.stdout


def test_the_report_folder(workspace):
    summary = workspace.summary("--budget", 0.1, "--pass", "collapse-ffn", "--report", "made/report")
    folder = workspace.folder / "made" / "report"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "journal.json"}
    assert json.loads((folder / "report.json").read_text()) == summary
    journal = json.loads((folder / "journal.json").read_text())
    assert [entry["outcome"] for entry in journal["entries"]].count("kept") == 1
    assert journal["facts"]["data"] == {"samples": 200, "evidence": True}
    facts = {"requested": "auto", "obtained": "CPUExecutionProvider", "options": {}}
    assert journal["facts"]["provider"] == facts
    shown = "requested: auto; obtained: CPUExecutionProvider; options: none"
    assert shown in (folder / "report.html").read_text()
    text = (folder / "journal.json").read_text()
    assert not any(word in text for word in ("seconds", "time", "date", str(workspace.folder)))
    assert "collapse-ffn" in (folder / "report.html").read_text()


def test_a_target_out_of_reach_writes_nothing_unless_asked_to(workspace):
    target = ("--target", "params=0.01", "--budget", "0.5")
    command = ("optimize", "model.onnx", "-o", "out.onnx", "--calib", "calib.npz")
    line = workspace.refused(*command, *target, status=1)
    assert "params=0.01 not met" in line
    assert "raise the budget, or write the best model with --allow-partial" in line
    before = (workspace.folder / "out.onnx").read_bytes()
    result = workspace.optimize(*target, "--json", "--report", "rep")
    one_line(result.stderr, result.exit_code, status=1)
    found = json.loads(result.stdout)
    assert (found["met"], found["output"]) == (False, None)
    assert found["rewrites"]
    assert (workspace.folder / "out.onnx").read_bytes() == before
    assert "misses what was asked for" in (workspace.folder / "rep" / "report.html").read_text()
    result = workspace.optimize("--target", "params=0.01")
    assert "raise the budget" not in one_line(result.stderr, result.exit_code, status=1)
    result = workspace.optimize(*target, "--allow-partial", "--json", "--report", "rep")
    line = one_line(result.stderr, result.exit_code, status=1)
    assert "params=0.01 not met" in line
    found = json.loads(result.stdout)
    assert (found["met"], found["target"], found["params_after"]) == (False, "params=0.01", 72)
    assert Model.load(workspace.folder / "out.onnx").signature().inputs[0].name == "x"
    assert "misses what was asked for" in (workspace.folder / "rep" / "report.html").read_text()


@pytest.mark.parametrize("measure", ["params", "flops", "bytes"])
def test_targets(workspace, measure):
    found = workspace.summary("--target", f"{measure}=0.5")
    assert found[f"{measure}_after"] <= 0.5 * found[f"{measure}_before"]
    assert (found["budget"], found["target"], found["met"]) == (None, f"{measure}=0.5", True)


def test_a_target_of_latency_is_shown_with_what_was_measured(workspace):
    workspace.write_model(mlp([8, 16384, 8], "LeakyRelu"))
    arguments = ("--target", "latency=0.5", "--provider", "cpu", "--pass", "collapse-ffn:method=fit,ranks=no")
    shown = workspace.optimize(*arguments)
    assert shown.exit_code == 0, shown.output
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("latency")]
    assert line.count(" ms") == 2
    found = workspace.summary(*arguments)
    assert 0 < found["latency_after"] <= 0.5 * found["latency_before"]
    assert found["met"]


def test_a_target_reached_by_exact_rewrites_alone_is_met(workspace):
    model = mlp([8, 64, 8], "PRelu", slopes=[[1.0]])
    workspace.write_model(model)
    for calib in (None, "calib.npz"):
        found = workspace.summary("--target", "params=0.5", "--pass", "fold-affine", calib=calib)
        assert (found["met"], found["params_after"]) == (True, 72)


def test_named_passes_alone_run_in_their_order_with_their_options(workspace):
    found = workspace.summary("--pass", "tie-weights", "--pass", "cleanup", "--report", "rep")
    assert found["rewrites"] == found["declined"] == []
    journal = json.loads((workspace.folder / "rep" / "journal.json").read_text())
    assert journal["facts"]["passes"] == ["tie-weights", "cleanup"]
    found = workspace.summary("--pass", "collapse-ffn:method=fold,tolerance=0.03", "--budget", "0.1")
    assert [entry["pass"] for entry in found["rewrites"]] == ["collapse-ffn:method=fold,tolerance=0.03"]
    found = workspace.summary("--pass", "collapse-ffn:method=fold,tolerance=0.01", "--budget", "0.1")
    assert "|1 - alpha|" in found["declined"][0]["reason"]


def test_a_described_pass_can_be_given_back_to_the_command_line(workspace):
    spec = "collapse-ffn:method=fit,ranks=False"
    [rewrite] = workspace.summary("--pass", spec, "--budget", "0.1")["rewrites"]
    assert workspace.summary("--pass", rewrite["pass"], "--budget", "0.1")["rewrites"] == [rewrite]


@pytest.mark.parametrize("metric", ["rel-l2", "cosine", "kl", "top1"])
def test_built_in_metrics(workspace, metric):
    found = workspace.summary("--metric", metric, "--budget", "0.2")
    assert found["metric"] == metric
    assert found["rewrites"]


def test_a_metric_of_the_users_own_decides_and_may_print(workspace):
    (workspace.folder / "mine.py").write_text(
        "import numpy as np\n"
        "def worst(outputs, reference, batch):\n"
        "    print('chatter')\n"
        "    assert set(batch) == {'x'}\n"
        "    return float(np.abs(outputs['y'] - reference['y']).max())\n"
    )
    result = workspace.optimize("--metric", "mine.py:worst", "--budget", "0.5", "--json")
    found = json.loads(result.stdout)
    assert "chatter" in result.stderr
    assert found["metric"] == "mine.py:worst"
    assert len(found["rewrites"]) == 1
    tight = json.loads(workspace.optimize("--metric", "mine.py:worst", "--budget", "1e-6", "--json").stdout)
    assert tight["rewrites"] == []


def test_a_users_metric_on_outputs_that_are_no_floats(workspace, text_model):
    proto = text_model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[n,8] x) => (int64[n,1] y) '
        "{ a = Identity(x) b = Relu(a) y = ArgMax<axis = 1>(b) }"
    )
    onnx.save(proto, workspace.folder / "model.onnx")
    (workspace.folder / "mine.py").write_text(
        "def moved(o, r, b):\n    return float((o['y'] != r['y']).mean())\n"
    )
    found = workspace.summary("--metric", "mine.py:moved")
    assert (found["error"], [entry["pass"] for entry in found["rewrites"]]) == (0.0, ["cleanup"])


def test_the_seed_draws_the_split(workspace):
    errors = {workspace.summary("--budget", 0.1, "--seed", seed)["error"] for seed in (0, 1)}
    assert len(errors) == 2
    assert workspace.summary("--budget", 0.1, "--seed", 0)["error"] in errors


def test_input_may_be_replaced_by_output(workspace):
    x = rows(50, 8, seed=3)
    want = outputs(mlp([8, 64, 8], "PRelu", slopes=[[0.98]]), x=x)["y"]
    workspace.summary("--budget", 0.1, out="model.onnx")
    assert relative(outputs(Model.load(workspace.folder / "model.onnx"), x=x)["y"], want) < 0.02
    assert set(workspace.files()) == {"model.onnx", "calib.npz", "out.onnx"}
    assert (workspace.folder / "out.onnx").read_bytes() == PRECIOUS


@pytest.mark.parametrize("sidecar", ["model.onnx.data", "weights.bin"])
def test_input_with_external_data_may_be_replaced_by_output(workspace, sidecar):
    model = mlp([64, 256, 64], "PRelu", slopes=[[0.98]])
    np.savez(workspace.folder / "calib.npz", x=rows(200, 64))
    x = rows(500, 64, seed=9)
    workspace.write_model(model)
    proto = onnx.load(workspace.folder / "model.onnx")
    onnx.save(proto, workspace.folder / "model.onnx", save_as_external_data=True, location=sidecar)
    want = outputs(model, x=x)["y"]
    found = workspace.summary("--budget", 0.1, out="model.onnx")
    small = Model.load(workspace.folder / "model.onnx")
    assert small.external
    assert relative(outputs(small, x=x)["y"], want) == pytest.approx(found["error"], rel=0.2)
    sizes = {name: len(data) for name, data in workspace.files().items()}
    assert set(sizes) == {"model.onnx", "model.onnx.data", "calib.npz", "out.onnx"} | {sidecar}
    assert sizes["model.onnx.data"] < 30_000


def test_a_folder_becomes_a_folder_that_holds_its_companions(workspace):
    workspace.write_model(mlp([8, 64, 8], "PRelu", slopes=[[0.98]]), "exported/model.onnx")
    (workspace.folder / "exported" / "config.json").write_text('{"model_type": "none"}')
    (workspace.folder / "exported" / "tokenizer.json").write_text("{}")
    result = workspace.run(
        "optimize", "exported", "-o", "made/small", "--calib", "calib.npz", "--budget", "0.1"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    made = {path.name for path in (workspace.folder / "made" / "small").iterdir()}
    assert made == {"model.onnx", "config.json", "tokenizer.json"}
    assert (workspace.folder / "made/small/config.json").read_text() == '{"model_type": "none"}'
    assert len(list(Model.load(workspace.folder / "made" / "small").graph)) == 1
    result = workspace.run(
        "optimize", "exported", "-o", "exported", "--calib", "calib.npz", "--budget", "0.1"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    names = {path.name for path in (workspace.folder / "exported").iterdir()}
    assert names == {"model.onnx", "config.json", "tokenizer.json"}
