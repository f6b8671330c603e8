# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import importlib
import json
import sys

import numpy as np
import pytest

from onnxcollapse import Model
from onnxcollapse.rewriting.budget import MEASURES
from tests.cli.workspace import mentions, one_line
from tests.support import mlp, outputs, relative, rows

SWEEP = ("sweep", "model.onnx", "--calib", "calib.npz", "-o", "front")
NARROW = ("--pass", "narrow-ffn:skip=false", "--provider", "cpu")
command = importlib.import_module("onnxcollapse.cli.sweep")

QUALITY = ("rel-l2", "cosine", "kl", "top1")


@pytest.fixture
def network(workspace):
    workspace.write_model(mlp([8, 64, 8]))
    np.savez(workspace.folder / "eval.npz", x=rows(100, 8, seed=7))
    return workspace


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)


def test_models_and_tables_agree_with_each_other_and_with_what_is_measured(network, without_matplotlib):
    done = network.run(*SWEEP, *NARROW, "--targets", "0.5, 0.8", "--eval", "eval.npz", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    document, front = json.loads(done.stdout), network.folder / "front"
    names = {"params-0.8.onnx", "params-0.5.onnx", "sweep.csv", "sweep.json"}
    assert {path.name for path in front.iterdir()} == names
    assert json.loads((front / "sweep.json").read_text()) == document
    with (front / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["target"] for row in table] == ["params=0.8", "params=0.5"]
    original, x = Model.load(network.folder / "model.onnx"), rows(100, 8, seed=7)
    for row, cells in zip(document["targets"], table, strict=True):
        assert (row["met"], cells["met"]) == (True, "true")
        assert row["params_left"] == row["params"] / document["params"] <= row["share"]
        small = Model.load(front / row["output"])
        measured = relative(outputs(small, x=x)["y"], outputs(original, x=x)["y"])
        assert row["rel-l2"] == pytest.approx(measured, rel=1e-4)
        for name in (*QUALITY, "error", "params", "flops_left"):
            assert float(cells[name]) == pytest.approx(row[name])
    first, second = document["targets"]
    assert first["error"] < second["error"]
    assert first["rel-l2"] < second["rel-l2"]


def test_each_model_is_what_optimize_writes(network):
    assert network.run(*SWEEP, *NARROW, "--targets", "0.8,0.5").exit_code == 0
    for share in (0.8, 0.5):
        network.summary(*NARROW, "--target", f"params={share}")
        assert (network.folder / f"front/params-{share}.onnx").read_bytes() == (
            network.folder / "out.onnx"
        ).read_bytes()


def test_a_target_out_of_reach_is_a_row_with_the_best_reached_and_status_1(network):
    done = network.run(*SWEEP, *NARROW, "--targets", "0.5,0.001", "--json")
    line = one_line(done.stderr, done.exit_code, status=1)
    mentions(line, "1 of 2 targets missed", "params=0.001", "of the params are left")
    document = json.loads(done.stdout)
    assert [row["met"] for row in document["targets"]] == [True, False]
    best = document["targets"][1]
    assert 0.001 < best["params_left"] < 0.2
    assert Model.load(network.folder / "front" / best["output"]).graph is not None
    [missed] = document["missed"]
    assert missed in line


def test_the_picture_comes_with_matplotlib(network):
    pytest.importorskip("matplotlib")
    done = network.run(*SWEEP, *NARROW, "--targets", "0.8,0.001", "--eval", "eval.npz")
    assert done.exit_code == 1
    assert (network.folder / "front/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib" not in done.stdout


def test_without_matplotlib_one_line_says_how_to_get_the_picture(network, without_matplotlib):
    (network.folder / "front").mkdir()
    (network.folder / "front/sweep.png").write_bytes(b"of an earlier sweep")
    done = network.run(*SWEEP, *NARROW, "--targets", "0.8,0.5")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.count("matplotlib") == 1
    assert 'pip install "onnxcollapse[report]"' in done.stdout
    assert not (network.folder / "front/sweep.png").exists()
    mentions(done.stdout, "params=0.8", "params-0.5.onnx", "rel-l2", "params left")


def test_a_folder_gives_folders(network):
    network.write_model(mlp([8, 64, 8]), "exported/model.onnx")
    (network.folder / "exported/config.json").write_text("{}")
    done = network.run(
        "sweep", "exported", "--calib", "calib.npz", "-o", "front", *NARROW, "--targets", "0.5"
    )
    assert done.exit_code == 0
    made = {path.name for path in (network.folder / "front/params-0.5").iterdir()}
    assert made == {"model.onnx", "config.json"}


def test_flops_and_a_metric_of_ones_own(network):
    (network.folder / "mine.py").write_text("def f(outputs, reference, batch):\n    return 0.25\n")
    options = ("--measure", "flops", "--metric", "mine.py:f", "--eval", "eval.npz", "--json")
    done = network.run(*SWEEP, *NARROW, "--targets", "0.5", *options)
    assert done.exit_code == 0, done.stderr
    [row] = json.loads(done.stdout)["targets"]
    assert (row["target"], row["output"]) == ("flops=0.5", "flops-0.5.onnx")
    assert row["flops_left"] <= 0.5
    assert row["error"] == row["mine.py:f"] == 0.25


def test_what_ends_a_sweep_leaves_what_was_done_with_its_table(network, monkeypatch):
    real, taken = command._take, []

    def interrupt(*arguments):
        if taken:
            raise KeyboardInterrupt
        taken.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(command, "_take", interrupt)
    done = network.run(*SWEEP, *NARROW, "--targets", "0.8,0.5")
    assert one_line(done.stderr, done.exit_code, status=130) == "interrupted"
    [row] = json.loads((network.folder / "front/sweep.json").read_text())["targets"]
    assert row["output"] == "params-0.8.onnx"
    assert not list((network.folder / "front").glob(".*"))
    assert not (network.folder / "front/params-0.5.onnx").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--targets", "1.5"], ["params=1.5", "between 0 and 1"]),
        (["--targets", ""], ["between 0 and 1"]),
        (["--targets", "0.5,x"], ["params=x"]),
        (["--measure", "nodes"], ["nodes"]),
        (["--align", "0"], ["--align"]),
        (["--pass", "nothing"], ["unknown pass 'nothing'"]),
        (["--metric", "nothing"], ["nothing"]),
        (["--eval", "calib.npz"], ["--eval 'calib.npz' is the calibration data"]),
        (["--eval", "./calib.npz"], ["is the calibration data"]),
        (["--eval", "missing.npz"], ["missing.npz"]),
        (["--provider", "nothing"], ["nothing"]),
        (["--memory", "much"], ["--memory"]),
        (["-o", "calib.npz"], ["'calib.npz' is a file"]),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(network, options, words):
    mentions(network.refused(*SWEEP, *options), *words)


def test_what_is_in_the_way_is_found_before_the_work(network, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work began before the output was looked at")

    monkeypatch.setattr(Model, "load", work)
    front = network.folder / "front"
    (front / "params-0.5.onnx").mkdir(parents=True)
    mentions(network.refused(*SWEEP), "params-0.5.onnx", "is a folder")
    (front / "params-0.5.onnx").rmdir()
    (front / "sweep.csv").mkdir()
    mentions(network.refused(*SWEEP), "sweep.csv", "is a folder")
    (front / "sweep.csv").rmdir()
    (front / "params-0.75.onnx").write_bytes(b"")
    line = network.refused("sweep", "front/params-0.75.onnx", "--calib", "calib.npz", "-o", "front")
    mentions(line, "is the model that is read")


def test_calibration_data_is_needed(network):
    mentions(network.refused("sweep", "model.onnx", "-o", "front"), "--calib")


def test_measures_are_those_of_targets():
    assert command.MEASURES == MEASURES


def widths(network, *options) -> set[int]:
    network.optimize("--target", "params=0.6", "--provider", "cpu", *options)
    model = Model.load(network.folder / "out.onnx")
    return {dim for value in model.graph.initializers.values() for dim in value.shape.numpy()} - {8}


@pytest.mark.parametrize(
    "options, multiple",
    [
        (["--pass", "narrow-ffn:skip=false"], 8),
        (["--pass", "narrow-ffn:skip=false", "--align", "5"], 5),
        (["--pass", "narrow-ffn:skip=false,align=3", "--align", "5"], 3),
        (["--pass", "cleanup", "--pass", "narrow-ffn:skip=false", "--align", "7"], 7),
    ],
)
def test_align_is_for_passes_that_have_it_and_do_not_say_otherwise(network, options, multiple):
    [width] = widths(network, *options)
    assert width < 64
    assert width % multiple == 0


def test_align_of_a_sweep(network):
    done = network.run(*SWEEP, *NARROW, "--targets", "0.6", "--align", "7")
    assert done.exit_code == 0
    model = Model.load(network.folder / "front/params-0.6.onnx")
    [width] = {dim for value in model.graph.initializers.values() for dim in value.shape.numpy()} - {8}
    assert width % 7 == 0


def test_align_below_1_is_bad_usage(network):
    mentions(network.refused("optimize", "model.onnx", "-o", "out.onnx", "--align", "0"), "--align")
