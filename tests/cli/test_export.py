# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse export`` as users meet it: one JSON document, one line of error, nothing half-written."""

from __future__ import annotations

import json
import sys

import pytest

from onnxcollapse import Model
from tests.cli.workspace import PRECIOUS, mentions
from tests.interop.sources import MODULES, save_bert

torch = pytest.importorskip("torch", reason="needs torch: pip install onnxcollapse[export]")
pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx: pip install onnxcollapse[export]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxcollapse[export]")

KEYS = ["source", "model", "opset", "dtype", "task", "seconds", "bytes", "params", "outputs"]


@pytest.fixture
def modules(workspace):
    sys.modules.pop("modules", None)
    (workspace.folder / "modules.py").write_text(MODULES)
    yield workspace
    sys.modules.pop("modules", None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def exported(workspace, *arguments) -> dict:
    result = workspace.run("export", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_a_folder_is_exported_and_optimized(workspace, bert):
    found = exported(workspace, bert, "-o", "out", "--opset", "17")
    assert list(found) == KEYS
    assert (found["source"], found["model"], found["task"]) == (str(bert), "out", "feature-extraction")
    assert (found["opset"], found["dtype"]) == (17, "fp32")
    (worst,) = found["outputs"].values()
    assert 0 < worst["rel_l2"] < 1e-5
    assert 0 < worst["max_abs"] < 1e-4
    result = workspace.run("optimize", "out", "-o", "small", "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert (summary["params_before"], summary["bytes_before"]) == (found["params"], found["bytes"])
    assert (workspace.folder / "small" / "tokenizer.json").exists()


def test_a_module_is_exported_and_its_differences_shown(modules):
    result = modules.run(
        "export", "modules:by_name", "-o", "out.onnx", "--dtype", "fp16", "--dynamic", "ids.0=rows",
        "--dynamic", "mask.0=rows",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("logits", "states.0", "rel-l2", "Wrote out.onnx (opset 20, fp16; 116 parameters"):
        assert text in result.stdout
    assert [spec.shape for spec in Model.load("out.onnx").signature().inputs] == [("rows", 6)] * 2


def test_a_difference_is_status_1_and_leaves_the_output(modules):
    line = modules.refused("export", "modules:noise", "-o", "out.onnx", status=1)
    mentions(line, "'output' differs from the source's by", "tolerance 0.001", "--allow-difference")
    assert (modules.folder / "out.onnx").read_bytes() == PRECIOUS
    result = modules.run("export", "modules:noise", "-o", "out.onnx", "--allow-difference", "--json")
    assert result.exit_code == 0
    assert "written all the same" in result.stderr
    assert json.loads(result.stdout)["outputs"]["output"]["rel_l2"] > 1e-3
    assert (modules.folder / "out.onnx").read_bytes() != PRECIOUS


@pytest.mark.parametrize(
    "source, target, package",
    [
        ("modules:alone", "out.onnx", "torch"),
        ("modules:alone", "out.onnx", "onnxscript"),
        ("source", "out", "transformers"),
        ("source", "out", "optimum.exporters.onnx"),
    ],
)
def test_a_missing_package(modules, monkeypatch, source, target, package):
    (modules.folder / "source").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    line = modules.refused("export", source, "-o", target)
    mentions(line, f"needs {package}", 'pip install "onnxcollapse[export]"')


@pytest.mark.parametrize(
    "source, target, words",
    [
        ("modules:absent", "out.onnx", ["has no 'absent'"]),
        ("nothere:net", "out.onnx", ["importing 'nothere' fails"]),
        ("modules:alone", "out", ["is no .onnx file"]),
        ("modules:alone", "nowhere/out.onnx", ["'nowhere' does not exist"]),
        ("model.onnx", "out", ["model.onnx is a file", "Hugging Face folder"]),
        ("./nowhere", "out", ["./nowhere does not exist", "pkg.mod:function"]),
        ("empty", "out", ["empty", "config.json", "give a folder"]),
        ("empty", "empty", ["is the source"]),
        ("empty", "out.onnx", ["is a file", "needs a folder"]),
        ("empty", "calib.npz/out", ["'calib.npz' is a file"]),
        ("nobody/nothing", "out", ["nobody/nothing", "an id that can be fetched"]),
    ],
)
def test_bad_sources_and_outputs(modules, monkeypatch, source, target, words):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (modules.folder / "empty").mkdir()
    mentions(modules.refused("export", source, "-o", target), *words)


def test_a_folder_without_weights(workspace, bert):
    (workspace.folder / "source").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (workspace.folder / "source" / name).write_bytes((bert / name).read_bytes())
    mentions(workspace.refused("export", "source", "-o", "out"), "optimum cannot export it", "source")


def test_an_interruption_leaves_nothing(modules, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcollapse.interop.export.check", interrupt)
    assert modules.refused("export", "modules:alone", "-o", "out.onnx", status=130) == "interrupted"
