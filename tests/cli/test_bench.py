# SPDX-License-Identifier: Apache-2.0
"""The command `bench`: its table, JSON and CSV, and what it refuses."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import onnx
import pytest

from tests.cli.workspace import mentions
from tests.support import mlp
from tests.verification.decoders import decoder, windows

QUICK = ("--rounds", "4", "--openings", "2", "--warmup", "1", "--threads", "1", "--provider", "cpu")
LEAN = (*QUICK, "--no-footprint")
COLUMNS = [
    "number", "model", "phase", "batch", "sequence", "p50", "p90", "p99", "calls", "rounds", "samples_per_second",
    "tokens_per_second", "ratio", "ratio_low", "ratio_high", "trtexec",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_turns(workspace, monkeypatch):
    import onnxcollapse.bench  # noqa: F401

    monkeypatch.setattr(sys.modules["onnxcollapse.bench.bench"], "LEAST_TURN", 0.001)
    workspace.write_model(mlp([8, 16, 8]), "small.onnx")


def benched(workspace, *arguments) -> dict:
    result = workspace.run("bench", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return json.loads(result.stdout)


def test_json_has_settings_models_and_a_row_for_each_size_and_model(workspace):
    found = benched(workspace, "model.onnx", "small.onnx", "--batch", "1,8", *QUICK)
    assert set(found) == {"provider", "settings", "models", "results"}
    assert found["provider"] == "CPUExecutionProvider"
    assert (found["settings"]["rounds"], found["settings"]["threads"]) == (4, 1)
    for model, name in zip(found["models"], ("model.onnx", "small.onnx"), strict=True):
        assert (model["model"], model["file_bytes"]) == (name, (workspace.folder / name).stat().st_size)
        assert 0 < model["session_seconds"] < 60
        assert 0 < model["resident_bytes"] < 1 << 28
        assert model["device_bytes"] is None
    assert [(row["model"], row["batch"]) for row in found["results"]] == [
        ("model.onnx", 1), ("small.onnx", 1), ("model.onnx", 8), ("small.onnx", 8),
    ]  # fmt: skip
    for row in found["results"]:
        assert list(row) == COLUMNS
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["p50"])
        assert (row["phase"], row["sequence"], row["trtexec"]) == ("run", None, None)
        if row["number"] == 0:
            assert row["ratio"] is row["ratio_low"] is row["ratio_high"] is None
        else:
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_csv_has_the_rows_of_the_json(workspace):
    found = benched(workspace, "model.onnx", "small.onnx", "--csv", "rows.csv", *LEAN)
    with (workspace.folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    for row, expected in zip(rows, found["results"], strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_the_table_is_in_milliseconds_and_names_the_provider(workspace):
    result = workspace.run("bench", "model.onnx", "small.onnx", "--csv", "rows.csv", *LEAN)
    assert (result.exit_code, result.stderr) == (0, "")
    with (workspace.folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert f"{float(row['p50']) * 1000:.4g}" in result.stdout
    last = rows[1]
    assert f"{float(last['ratio_low']):.3f} to {float(last['ratio_high']):.3f}" in result.stdout
    assert "Measured on CPUExecutionProvider" in result.stdout
    alone = workspace.run("bench", "model.onnx", *LEAN).stdout
    assert "ratio" not in alone.lower()


def test_a_folder_and_data_are_taken_as_optimize_takes_them(workspace):
    workspace.write_model(decoder((0, 1)), "whole/model.onnx")
    workspace.write_model(decoder((1,)), "short/model.onnx")
    np.savez(workspace.folder / "ids.npz", input_ids=windows(6))
    found = benched(
        workspace, "whole", "short", "--calib", "ids.npz", "--batch", "2", "--sequence", "4,8", "--tokens", "3", *LEAN
    )  # fmt: skip
    assert [(row["model"], row["phase"], row["sequence"]) for row in found["results"]] == [
        (name, phase, length) for length in (4, 8) for phase in ("prefill", "decode") for name in ("whole", "short")
    ]  # fmt: skip


def test_dimensions_are_sized_by_name(workspace, text_model):
    proto = text_model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[n,height,8] x) => (float[n,height,8] y) { y = Relu(x) }'
    )
    onnx.save(proto, workspace.folder / "free.onnx")
    found = benched(workspace, "free.onnx", "--size", "height=5", "--batch", "3", *LEAN)
    assert [(row["batch"], row["sequence"]) for row in found["results"]] == [(3, 5)]


TOOL = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec # $@"
echo "$@" >> calls.txt
echo "[I] Enqueue Time: min = 0.1 ms, max = 0.2 ms, mean = 0.1 ms, median = 0.111 ms, percentile(90%) = 0.2 ms"
echo "[I] GPU Compute Time: min = 0.5 ms, max = 1.0 ms, mean = 0.7 ms, median = 0.625 ms, percentile(90%) = 0.8 ms"
"""


@pytest.fixture
def tool(workspace, monkeypatch):
    def install(text: str) -> None:
        folder = workspace.folder / "bin"
        folder.mkdir()
        (folder / "trtexec").write_text(text)
        (folder / "trtexec").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_trtexec_is_asked_for_its_median(workspace, tool):
    tool(TOOL)
    workspace.write_model(decoder((0,)), "decoder.onnx")
    found = benched(workspace, "decoder.onnx", "--trtexec", "--sequence", "4", "--tokens", "2", *LEAN)
    assert [(row["phase"], row["trtexec"]) for row in found["results"]] == [
        ("prefill", pytest.approx(0.000625)), ("decode", None),
    ]  # fmt: skip
    [call] = (workspace.folder / "calls.txt").read_text().splitlines()
    mentions(
        call, "--onnx=decoder.onnx", "--shapes=input_ids:1x4,position_ids:1x4,past_key_values.0.key:1x2x0x8"
    )
    table = workspace.run("bench", "model.onnx", "--trtexec", *LEAN).stdout
    mentions(table, "trtexec ms", "0.625")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho '[E] Error: cannot build the engine'\necho FAILED\nexit 1\n", ["[E] Error: cannot build"]),
        ("#!/bin/sh\necho PASSED\n", ["no median GPU Compute Time"]),
        ("#!/no/such/shell\n", ["cannot be started"]),
    ],
)  # fmt: skip
def test_a_trtexec_that_fails_is_one_line(workspace, tool, text, words):
    tool(text)
    mentions(workspace.refused("bench", "model.onnx", "--trtexec", *LEAN), "trtexec", *words)


def test_a_trtexec_that_is_not_there_is_one_line(workspace, monkeypatch):
    monkeypatch.setenv("PATH", str(workspace.folder))
    mentions(workspace.refused("bench", "model.onnx", "--trtexec", *LEAN), "no trtexec on the PATH")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["Missing argument 'MODEL...'"]),
        (("missing.onnx",), ["missing.onnx does not exist"]),
        (("model.onnx", "missing.onnx"), ["missing.onnx does not exist"]),
        (("model.onnx", "--batch", "0"), ["--batch", "'0'", "1,8,32"]),
        (("model.onnx", "--batch", "1,x"), ["--batch", "'1,x'"]),
        (("model.onnx", "--sequence", "4"), ["--sequence 4", "no input has an axis of tokens"]),
        (("model.onnx", "--size", "n"), ["--size n", "DIM=N"]),
        (("model.onnx", "--size", "m=4"), ["--size m", "no input has such a free dimension", "n, x.0"]),
        (("model.onnx", "--size", "n=0"), ["--size n=0"]),
        (("model.onnx", "--calib", "missing.npz"), ["missing.npz", "does not exist"]),
        (("model.onnx", "--provider", "abacus"), ["'abacus'", "choose one of"]),
        (("model.onnx", "--cuda-graph"), ["--cuda-graph", "CPUExecutionProvider"]),
        (("model.onnx", "--rounds", "1"), ["--rounds"]),
        (("model.onnx", "--csv", "no/rows.csv"), ["--csv no/rows.csv", "folder does not exist"]),
        (("model.onnx", "--csv", "."), ["--csv .", "is a folder"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(workspace, arguments, words):
    mentions(workspace.refused("bench", *arguments), *words)


def test_a_file_that_is_no_model_is_told_in_one_line(workspace):
    (workspace.folder / "text.onnx").write_text("hello")
    mentions(workspace.refused("bench", "model.onnx", "text.onnx"), "text.onnx", "not an ONNX model")
