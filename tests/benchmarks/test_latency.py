# SPDX-License-Identifier: Apache-2.0
"""The benchmark of latency: what it makes, in which precision, and its rows."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from benchmarks import latency, machine
from benchmarks.layers import Setting
from onnxcollapse import Model
from onnxcollapse.bench import Settings
from onnxcollapse.rewriting import registry
from tests.support import mlp, rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    mlp([16, 64, 16]).save(tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=rows(300, 16, rank=4))
    monkeypatch.setitem(latency.SETTINGS, "mlp", Setting("mlp", (), "rel-l2", ()))
    monkeypatch.setattr(latency, "BATCHES", (1, 4))
    return tmp_path


def test_variants_name_passes_that_exist():
    for variant in latency.VARIANTS.values():
        assert variant is None or registry.chosen(variant.passes)


def test_a_variant_is_made_once(folder):
    path, facts = latency.made("mlp", "optimized", folder, "cpu")
    assert facts["params_left"] <= 0.8
    made = path.stat().st_mtime_ns
    assert latency.made("mlp", "optimized", folder, "cpu") == (path, facts)
    assert path.stat().st_mtime_ns == made
    assert latency.made("mlp", "original", folder, "cpu")[0] == folder / "model.onnx"


def test_fp16_models_have_fp16_inputs_and_follow_their_source(folder):
    path = latency.halved(folder / "model.onnx")
    assert {value.dtype.name for value in Model.load(path).graph.inputs} == {"FLOAT16"}
    first = path.stat().st_mtime_ns
    assert latency.halved(folder / "model.onnx").stat().st_mtime_ns == first
    later = path.stat().st_mtime + 10
    os.utime(folder / "model.onnx", (later, later))
    assert latency.halved(folder / "model.onnx").stat().st_mtime_ns != first


@pytest.mark.parametrize("precision", latency.PRECISIONS)
def test_rows_are_of_every_variant_and_batch(folder, monkeypatch, precision):
    files = {name: latency.made("mlp", name, folder, "cpu") for name in ("original", "optimized")}
    settings = Settings("cpu", 1, rounds=4, openings=2, footprint=False)
    found = list(latency.rows("mlp", precision, files, settings))
    assert [(row["variant"], row["batch"]) for row in found] == [
        (name, batch) for batch in (1, 4) for name in ("original", "optimized")
    ]
    assert [row["ratio"] is None for row in found] == [True, False] * 2
    assert found[1]["params_left"] == files["optimized"][1]["params_left"]
    assert found[1]["file_bytes"] < found[0]["file_bytes"]


def test_what_cannot_be_timed_is_a_row_with_the_reason(folder):
    (row,) = latency.rows(
        "mlp", "fp32", {"original": (folder / "model.onnx", {})}, Settings("cpu", cuda_graph=True)
    )
    assert "--cuda-graph" in row["problem"]
    assert latency._key(row)


def test_the_table_has_a_line_for_each_row():
    row = {
        "model": "vit12",
        "precision": "fp16",
        "graph": False,
        "phase": "run",
        "batch": 1,
        "variant": "half",
    }
    lines = latency.table([row | {"p50_ms": 1.5}]).splitlines()
    assert lines[0] == "vit12"
    assert "1.5" in lines[2]


def test_the_machine_names_its_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test, 1.2.3'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe()["gpu"] == "NVIDIA Test, 1.2.3"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpu" not in machine.describe()
    json.dumps(machine.describe())
