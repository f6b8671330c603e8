# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from tests.cli.workspace import mentions
from tests.passes.layering import WIDTH, stream
from tests.support import mlp, rows

command = importlib.import_module("onnxcollapse.cli.analyze")
ANALYZE = ("analyze", "model.onnx")
DATA = ("--calib", "calib.npz", "--provider", "cpu")


@pytest.fixture
def network(workspace):

    workspace.write_model(stream(3))
    np.savez(workspace.folder / "calib.npz", x=rows(200, WIDTH))
    return workspace


def test_the_document_and_the_tables_say_the_same(network):
    before = network.files()
    done = network.run(*ANALYZE, *DATA, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    shown = network.run(*ANALYZE, *DATA)
    assert shown.exit_code == 0
    for layer in document["layers"][0]:
        assert f"{layer['similarity']:.3f}" in shown.stdout
    for block in document["feedforwards"]:
        assert block["site"] in shown.stdout
        assert f"{block['linearity']:.3f}" in shown.stdout
    assert "3 layers alike" in shown.stdout
    assert "rel-l2 at outputs" in shown.stdout
    assert {offer["pass"] for offer in document["offers"]} >= {"narrow-ffn", "collapse-layers", "merge-ffn"}
    assert network.files() == before


def test_without_data_it_says_what_is_missing(network):
    done = network.run(*ANALYZE)
    assert done.exit_code == 0
    assert "Note: structure and exact rewrites only: --calib DATA" in done.stdout
    assert "similarity" in done.stdout
    assert "measured on" not in done.stdout


def test_what_rewrites_exactly_is_a_table_of_its_own(network):
    network.write_model(mlp([8, 32, 12], "Identity"))
    done = network.run(*ANALYZE)
    assert done.exit_code == 0
    sizes, exact = done.stdout.split("Exact rewrites")
    assert [line.split()[0] for line in sizes.splitlines()[1:3]] == ["as", "after"]
    assert exact.splitlines()[1].split() == ["pass", "site", "params", "saved", "nodes", "saved", "what"]
    assert exact.splitlines()[2].split()[:4] == ["cleanup", "graph", "0", "1"]
    assert "What could be saved" not in exact


def test_passes_are_those_asked_for_and_long_lists_are_cut(network, monkeypatch):
    monkeypatch.setattr(command, "MOST", 2)
    done = network.run(*ANALYZE, *DATA, "--pass", "narrow-ffn:skip=false")
    assert "collapse-layers" not in done.stdout
    assert "... 1 more: --json has all" in done.stdout
    offered = done.stdout.split("What could be saved")[1].split("Left as it is")[0]
    assert offered.count("narrow-ffn:skip=False") == 3


def test_what_is_left_is_cut_too(network, monkeypatch):
    network.write_model(mlp([8, 2, 8, 2, 8, 2, 8], "Tanh"))
    np.savez(network.folder / "calib.npz", x=rows(100, 8))
    monkeypatch.setattr(command, "MOST", 1)
    done = network.run(*ANALYZE, *DATA, "--pass", "collapse-ffn")
    left = done.stdout.split("Left as it is")[1]
    assert left.count("does not pay") == 1
    assert "more: --json has all" in left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("analyze", "none.onnx"), ["none.onnx", "does not exist"]),
        ((*ANALYZE, "--pass", "nothing"), ["nothing"]),
        ((*ANALYZE, "--metric", "nothing"), ["nothing"]),
        ((*ANALYZE, "--window", "8"), ["--window 8", "--calib text:FILE"]),
        ((*ANALYZE, "--provider", "moon"), ["moon", "choose one of"]),
        ((*ANALYZE, *DATA, "--memory", "much"), ["much"]),
        ((*ANALYZE, "--calib", "none.npz"), ["none.npz"]),
    ],
)
def test_bad_input_is_one_line(network, arguments, words):
    mentions(network.refused(*arguments), *words)
