# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and kill in the middle of real runs: OUT stays as it was, and nothing is left on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.cli.workspace import one_line
from tests.support import Net, rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")

WIDTH, LAYERS = 136, 2  # square float32 weights of this width are large enough for scratch files

MOMENTS = {
    "statistics": "onnxcollapse.calibration.data:Dataset.batches",
    "measuring": "onnxcollapse.verification.metrics:metric",
    "saving": "os:fsync",
}

PRELUDE = """
import importlib, os, runpy, sys, time

def stop_here():
    os.write(int(os.environ["TOLD"]), b".")
    time.sleep(60)

module, _, path = os.environ["MOMENT"].partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real = getattr(owner, name)

def batches(self, part, limit=None):
    for number, batch in enumerate(real(self, part, limit)):
        if (part, limit, number) == ("fit", None, 1):  # only statistics read all of this part
            stop_here()
        yield batch

def fsync(descriptor):
    stop_here()
    return real(descriptor)

setattr(owner, name, {"batches": batches, "fsync": fsync}[name])
sys.argv[0] = "onnxcollapse"
runpy.run_module("onnxcollapse", run_name="__main__", alter_sys=True)
"""

METRIC = """
import os, time

def slow(outputs, reference, batch):
    os.write(int(os.environ["TOLD"]), b".")
    time.sleep(60)
    return 0.0
"""


def blocks():
    """x -> LAYERS of h + Linear(PRelu(Linear(h))) -> y, nearly linear, so that there is something to save."""
    net, value = Net(), "x"
    for layer in range(LAYERS):
        hidden = net.op("PRelu", net.dense(value, WIDTH, 2 * WIDTH), net.const([0.99]))
        last = layer == LAYERS - 1
        value = net.op("Add", value, net.dense(hidden, 2 * WIDTH, WIDTH), name="y" if last else None)
    return net.model({"x": ["n", WIDTH]}, {"y": ["n", WIDTH]})


@pytest.fixture
def place(workspace, tmp_path_factory):
    """The workspace with a model that runs in segments, and a folder for temporary files."""
    workspace.write_model(blocks())
    np.savez(workspace.folder / "calib.npz", x=rows(700, WIDTH))
    (workspace.folder / "mine.py").write_text(METRIC)
    workspace.temporary = tmp_path_factory.mktemp("temporary")
    return workspace


@pytest.fixture(autouse=True)
def heard():
    """Tests that a shell runs in the background ignore Ctrl-C, and what they start would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def stopped(place, moment: str, out: str):
    """A run of the command line that has come to a moment and waits there."""
    heard, told = os.pipe()
    code = ["-m", "onnxcollapse"] if moment == "measuring" else ["-c", PRELUDE]
    metric = ["--metric", "mine.py:slow"] if moment == "measuring" else ["--budget", "0.5"]
    arguments = ["optimize", "model.onnx", "-o", out, "--calib", "calib.npz", "--memory", "1MB"]
    arguments += ["--pass", "cleanup", "--pass", "collapse-ffn", *metric]
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "CI")
    }
    own = {"TMPDIR": str(place.temporary), "TOLD": str(told), "MOMENT": MOMENTS[moment]}
    process = subprocess.Popen(
        [sys.executable, *code, *arguments],
        cwd=place.folder,
        env={**inherited, **own},
        pass_fds=[told],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(told)
    try:
        assert os.read(heard, 1) == b".", process.communicate()
        yield process
    finally:
        os.close(heard)
        process.kill()
        process.communicate()


def named_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


OUTS = [("statistics", "out.onnx"), ("measuring", "new.onnx"), ("saving", "out.onnx")]


@pytest.mark.parametrize("moment, out", OUTS)
def test_ctrl_c(place, moment, out):
    before = place.files()
    with stopped(place, moment, out) as process:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert one_line(stderr, process.returncode, status=130) == "interrupted"
    assert stdout == ""
    assert place.files() == before
    assert named_files(place.temporary) == []


@pytest.mark.parametrize("moment, out", OUTS)
def test_kill(place, moment, out):
    before = place.files()
    with stopped(place, moment, out) as process:
        process.kill()
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    after = place.files()
    left = set(after) - set(before)
    assert {name: after.get(name) for name in before} == before
    assert named_files(place.temporary) == []
    if moment == "saving":  # the file that was to take OUT's place
        assert all(name.startswith(".onnxcollapse-") for name in left)
    else:
        assert left == set()


def test_ctrl_c_before_the_command_line_is_there(process, tmp_path):
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "click.py").write_text("raise KeyboardInterrupt\n")
    done = process("--version", PYTHONPATH=str(tmp_path / "early"))
    assert one_line(done.stderr, done.returncode, status=130) == "interrupted"
