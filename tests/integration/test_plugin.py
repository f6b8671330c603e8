# SPDX-License-Identifier: Apache-2.0
"""A pass of somebody else's package, made by following CONTRIBUTING.md to the letter."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest

from onnxcollapse import Model
from tests.cli.workspace import one_line, start
from tests.support import Net, outputs, relative, rows

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def code_blocks(language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def residual_model() -> Model:
    """Adds a block whose output hardly varies, named steady, to x, and ends in one whose output does."""
    net = Net()
    hidden = net.op("Relu", net.dense("x", 8, 64))
    down = net.random.normal(size=(64, 8)) * 1e-3
    steady = net.linear(hidden, down, net.random.normal(size=8) + 3.0, name="steady")
    last = net.op("Relu", net.dense(net.op("Add", "x", steady), 8, 64))
    net.dense(last, 64, 8, name="y")
    return net.model({"x": ["n", 8]}, {"y": ["n", 8]})


@pytest.fixture
def plugin(tmp_path):
    """Installs the guide's package in a folder outside the repository; returns that folder."""
    [module] = code_blocks("python")
    [project] = map(tomllib.loads, code_blocks("toml"))
    site = tmp_path / "site"
    metadata = site / "my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = []
    for group, points in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (site / "my_package").mkdir()
    (site / "my_package" / "__init__.py").write_text("")
    (site / "my_package" / "constant_ffn.py").write_text(module)
    return site


@pytest.fixture
def run(plugin, tmp_path):
    residual_model().save(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=rows(300, 8))

    def command(*arguments):
        return start(*arguments, folder=tmp_path, PYTHONPATH=str(plugin))

    return command


def test_the_guides_pass_is_listed_and_runs_with_its_options(run, tmp_path):
    listed = {item["pass"]: item for item in json.loads(run("passes", "--json").stdout)["passes"]}
    assert listed["constant-ffn"] == {
        "pass": "constant-ffn",
        "kind": "lossy",
        "summary": "Replaces a feed-forward block by its mean output.",
        "options": [{"option": "largest", "type": "float", "default": "0.1"}],
    }
    [line] = [item for item in GUIDE.read_text().splitlines() if "--pass constant-ffn" in item]
    command = line.strip(" `").split("`")[1].removeprefix("onnxcollapse ")
    done = run(*command.split(), "--json", "--budget", "0.05")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    [kept] = found["rewrites"]
    assert (kept["pass"], kept["site"]) == ("constant-ffn:largest=0.2", "steady")
    assert kept["params_saved"] == (8 * 64 + 64 + 64 * 8 + 8) - (8 * 8 + 8)
    declined = {item["site"]: item["reason"] for item in found["declined"]}
    assert re.match(r"deviates from its mean by 0\.\d+, over 0\.2", declined["y"])
    x = rows(200, 8, seed=7)
    got = outputs(Model.load(tmp_path / "small.onnx"), x=x)["y"]
    want = outputs(Model.load(tmp_path / "model.onnx"), x=x)["y"]
    assert relative(got, want) == pytest.approx(found["error"], rel=0.3)


def test_it_runs_among_the_built_in_ones_when_no_pass_is_named(run):
    found = json.loads(
        run("optimize", "model.onnx", "-o", "small.onnx", "--calib", "data.npz", "--json").stdout
    )
    assert "constant-ffn" in {entry["pass"] for entry in found["declined"] + found["rewrites"]}


def test_its_options_are_checked(run):
    done = run("optimize", "model.onnx", "-o", "small.onnx", "--pass", "constant-ffn:smallest=1")
    assert "pass 'constant-ffn' has no option 'smallest'; it has: largest" in one_line(
        done.stderr, done.returncode
    )
