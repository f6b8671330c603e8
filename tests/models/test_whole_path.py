# SPDX-License-Identifier: Apache-2.0
"""The script of the whole path, its steps noted down instead of run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "models" / "whole_path.sh"


@pytest.fixture
def path(tmp_path):
    python = tmp_path / "python"

    def run(*arguments, fails: str = "nothing"):
        python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ncase "$*" in *{fails}*) exit 3;; esac\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        done = subprocess.run(["sh", SCRIPT, *arguments], env=environment, capture_output=True, check=False)
        log = tmp_path / "log"
        return done.returncode, log.read_text().splitlines() if log.exists() else []

    return run


def test_the_steps(path):
    status, steps = path("smollm2", "out")
    assert status == 0
    assert [step.split()[1:4] for step in steps] == [
        ["models.smollm2", "-o", "out"],
        ["onnxcollapse", "export", "out/source"],
        ["onnxcollapse", "optimize", "out/original"],
        ["onnxcollapse", "compare", "out/original"],
        ["onnxcollapse", "bench", "out/original"],
    ]
    assert "--metric kl --target params=0.8" in steps[2]


def test_a_step_that_fails_ends_it(path):
    status, steps = path("minilm_l6", "out", fails="export")
    assert (status, len(steps)) == (3, 2)


@pytest.mark.parametrize("arguments", [(), ("minilm_l6",), ("fashion_mlp", "out")])
def test_bad_usage(path, arguments):
    assert path(*arguments) == (2, [])
