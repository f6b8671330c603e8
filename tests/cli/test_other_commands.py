# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import json

import numpy as np
import onnx
import pytest

from tests.cli.workspace import one_line
from tests.support import Net, mlp, outputs, relative, rows
from tests.verification.decoders import decoder, windows

doctor = importlib.import_module("onnxcollapse.cli.doctor")  # the package's name is the command


def compared(workspace, *arguments) -> dict:
    result = workspace.run("compare", "model.onnx", "other.onnx", "--data", "calib.npz", "--json", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_compare_measures_every_output_in_every_metric(workspace):
    a, b, x = mlp([8, 64, 8], seed=0), mlp([8, 64, 8], seed=1), rows(200, 8)
    workspace.write_model(a)
    workspace.write_model(b, "other.onnx")
    found = compared(workspace)
    one, other = outputs(a, x=x)["y"], outputs(b, x=x)["y"]
    measured = found["outputs"]["y"]
    assert set(measured) == {"rel-l2", "cosine", "kl", "top1", "max-abs"}
    assert measured["rel-l2"] == pytest.approx(relative(other, one), rel=1e-5)
    assert measured["max-abs"] == pytest.approx(float(np.abs(other - one).max()), rel=1e-5)
    assert (found["samples"], found["provider"]) == (200, "CPUExecutionProvider")
    result = workspace.run("compare", "model.onnx", "other.onnx", "--data", "calib.npz")
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("y", "rel-l2", "top1", f"{measured['rel-l2']:.4g}", "CPUExecutionProvider"):
        assert text in result.stdout


def test_compare_shows_the_perplexity_of_language_models(workspace):
    np.savez(workspace.folder / "calib.npz", input_ids=windows(6))
    workspace.write_model(decoder())
    workspace.write_model(decoder(broken=0.3), "other.onnx")
    found = compared(workspace)
    both = found["perplexity"]
    assert found["overall"]["perplexity"] == pytest.approx(max(both["b"] / both["a"] - 1, 0))
    result = workspace.run("compare", "model.onnx", "other.onnx", "--data", "calib.npz")
    assert f"Perplexity: A {both['a']:.5g}, B {both['b']:.5g}" in result.stdout


def test_compare_says_which_caches_it_leaves_out_where_layers_are_gone(workspace):
    np.savez(workspace.folder / "calib.npz", input_ids=windows(6))
    workspace.write_model(decoder((0, 1)))
    workspace.write_model(decoder((0,)), "other.onnx")
    found = compared(workspace)
    why = "layers are gone, and its number may mean another one now"
    assert found["notes"] == {"present.0.key": why, "present.0.value": why}
    assert sorted(found["missing"]) == ["present.1.key", "present.1.value"]
    result = workspace.run("compare", "model.onnx", "other.onnx", "--data", "calib.npz")
    assert f"({why})" in " ".join(result.stdout.split())


def test_compare_of_a_model_with_itself_is_zero_on_a_single_sample(workspace):
    np.savez(workspace.folder / "calib.npz", x=rows(1, 8))
    workspace.write_model(mlp([8, 64, 8], "PRelu", slopes=[[0.98]]), "other.onnx")
    found = compared(workspace)
    assert set(found["outputs"]["y"].values()) == {0.0}


def test_compare_prints_json_that_has_no_word_for_infinity(workspace):
    net = Net()
    net.linear("x", np.zeros((8, 8)), name="y")
    workspace.write_model(net.model({"x": ["n", 8]}, {"y": ["n", 8]}))
    workspace.write_model(mlp([8, 64, 8]), "other.onnx")
    assert compared(workspace)["outputs"]["y"]["rel-l2"] == "inf"


def test_compare_names_outputs_that_only_one_model_has(workspace):
    for name, output in (("model.onnx", "y"), ("other.onnx", "z")):
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> net (float[n,8] x) => (float[n,8] {output}, float[n,8] both) '
            f"{{ {output} = Relu(x) both = Neg(x) }}"
        )
        onnx.save(proto, workspace.folder / name)
    found = compared(workspace)
    assert (found["missing"], found["extra"], list(found["outputs"])) == (["y"], ["z"], ["both"])
    text = workspace.run("compare", "model.onnx", "other.onnx", "--data", "calib.npz").stdout
    assert "Outputs only in A: y" in text
    assert "Outputs only in B: z" in text


def test_compare_refuses_what_optimize_refuses(workspace):
    assert "does not exist" in workspace.refused(
        "compare", "model.onnx", "missing.onnx", "--data", "calib.npz"
    )
    assert "does not exist" in workspace.refused(
        "compare", "model.onnx", "model.onnx", "--data", "missing.npz"
    )
    np.savez(workspace.folder / "calib.npz", x=rows(4, 7))
    assert "axis 1" in workspace.refused("compare", "model.onnx", "model.onnx", "--data", "calib.npz")
    arguments = ("compare", "model.onnx", "model.onnx", "--data", "random:4", "--provider", "abacus")
    assert "'abacus'" in workspace.refused(*arguments)


def test_passes_lists_names_kinds_options_types_and_defaults(workspace):
    result = workspace.run("passes", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = {item["pass"]: item for item in json.loads(result.stdout)["passes"]}
    assert {"cleanup", "collapse-ffn", "fold-affine", "graphsurgeon", "stable-neurons", "tie-weights"} <= set(
        found
    )
    assert found["cleanup"] == {
        "pass": "cleanup",
        "kind": "exact",
        "summary": "Removes what has no effect or is computed twice.",
        "options": [],
    }
    options = {item["option"]: (item["type"], item["default"]) for item in found["collapse-ffn"]["options"]}
    assert options["method"] == ("auto|fold|fit", "auto")
    assert options["tolerance"] == ("float", "0.05")
    assert found["collapse-ffn"]["kind"] == "lossy"
    script = {item["option"]: item["default"] for item in found["graphsurgeon"]["options"]}
    assert (script["script"], script["keeps-function"]) == ("required", "False")
    table = workspace.run("passes").stdout
    for item in found.values():
        assert item["pass"] in table
    assert table.count("auto|fold|fit") == 1


def test_a_pass_that_cannot_be_imported_is_named_and_does_not_hide_the_others(workspace, process):
    folder = workspace.folder / "site" / "broken-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[onnxcollapse.passes]\nbroken = no_such_module:Pass\n")
    path = str(workspace.folder / "site")
    done = process("passes", PYTHONPATH=path)
    assert done.returncode == 0
    assert "collapse-ffn" in done.stdout
    assert "pass 'broken' (no_such_module:Pass) cannot be imported" in done.stderr
    [entry] = json.loads(process("passes", "--json", PYTHONPATH=path).stdout)["broken"]
    assert "no_such_module" in entry["reason"]
    done = process("optimize", "model.onnx", "-o", "small.onnx", "--pass", "cleanup", PYTHONPATH=path)
    assert done.returncode == 0, "a pass that was not asked for must not be in the way"
    done = process("optimize", "model.onnx", "-o", "small.onnx", "--pass", "broken", PYTHONPATH=path)
    assert "pass 'broken'" in one_line(done.stderr, done.returncode)


def test_clashing_runtimes():
    assert doctor.clashes({"onnxruntime": "1.30", "onnxruntime-gpu": None}) == []
    assert doctor.clashes({}) == []
    [problem] = doctor.clashes({"onnxruntime": "1.30", "onnxruntime-gpu": "1.31", "numpy": "2.0"})
    assert "onnxruntime and onnxruntime-gpu are installed together" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    [problem] = doctor.clashes(dict.fromkeys(doctor.RUNTIMES, "1.30"))
    assert all(name in problem for name in doctor.RUNTIMES)


def test_doctor_shows_versions_and_which_providers_really_work(workspace):
    result = workspace.run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == (1 if found["problems"] else 0)
    assert set(found) == {"versions", "providers", "python", "platform", "problems"}
    assert found["providers"]["CPUExecutionProvider"] == "works"
    assert found["versions"]["onnx"] == onnx.__version__
    text = workspace.run("doctor").stdout
    for word in ("onnx-ir", onnx.__version__, "CPUExecutionProvider", "works", found["python"]):
        assert word in text


@pytest.fixture
def installed(monkeypatch):
    def pretend(versions):
        monkeypatch.setattr(doctor, "_version", versions.get)

    return pretend


def test_doctor_reports_problems_and_ends_with_status_1(workspace, installed, monkeypatch):
    installed({"onnxruntime": "1.30", "onnxruntime-gpu": "1.31"})
    result = workspace.run("doctor")
    assert result.exit_code == 1
    assert "Problem: onnxruntime and onnxruntime-gpu" in result.stdout
    installed({})
    result = workspace.run("doctor", "--json")
    assert result.exit_code == 1
    assert "no ONNX Runtime is installed" in json.loads(result.stdout)["problems"][0]

    def fail():
        raise ImportError("libcudart is missing")

    installed({"onnxruntime-gpu": "1.31"})
    monkeypatch.setattr(doctor, "_providers", fail)
    result = workspace.run("doctor", "--json")
    assert result.exit_code == 1
    assert "libcudart is missing" in json.loads(result.stdout)["problems"][0]
