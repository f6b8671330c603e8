# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np

from tests.support import mlp, rows


def run(workspace, process, number: int, seed: int) -> dict[str, bytes]:
    """One process with a hash seed of its own, since the order of sets must not show."""
    done = process(
        "optimize", "model.onnx", "-o", f"small{number}.onnx", "--calib", "calib.npz", "--budget", "0.5",
        "--seed", seed, "--report", f"report{number}", "--json",
        PYTHONHASHSEED=str(number),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rewrites"]
    folder = workspace.folder
    return {
        "model": (folder / f"small{number}.onnx").read_bytes(),
        "journal": (folder / f"report{number}" / "journal.json").read_bytes(),
    }


def test_two_runs_with_one_seed_are_equal_byte_for_byte(workspace, process):
    workspace.write_model(mlp([16, 64, 24, 64, 16], "LeakyRelu"))
    np.savez(workspace.folder / "calib.npz", x=rows(300, 16))
    first, second = run(workspace, process, 1, seed=3), run(workspace, process, 2, seed=3)
    assert first == second
    other = run(workspace, process, 3, seed=4)
    assert other["model"] != first["model"], "the seed draws the rows that the maps are fitted to"
