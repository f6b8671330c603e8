# SPDX-License-Identifier: Apache-2.0
"""Where results cannot go, disks that are full and runs that are interrupted: nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from onnxcollapse.model import Model
from onnxcollapse.rewriting import pipeline
from tests.cli.workspace import PRECIOUS, mentions, one_line
from tests.support import rows

OPTIMIZE = ("optimize", "model.onnx", "-o", "out.onnx")
WITH_DATA = (*OPTIMIZE, "--calib", "calib.npz")


def forbid_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work began before the output was looked at")

    monkeypatch.setattr(pipeline, "optimize", work)
    monkeypatch.setattr(Model, "load", work)


@pytest.mark.parametrize(
    "out, words",
    [
        ("calib.npz/small.onnx", ["'calib.npz' is a file"]),
        ("calib.npz/deeper/small.onnx", ["'calib.npz/deeper' does not exist"]),
        ("nowhere/small.onnx", ["'nowhere' does not exist", "create"]),
        (".", ["is a folder", "small.onnx"]),
        ("", ["is a folder"]),
        ("calib.npz", ["is the calibration data"]),
        ("./calib.npz", ["is the calibration data"]),
    ],
)
def test_outputs_that_cannot_be_written_are_found_before_the_work(workspace, monkeypatch, out, words):
    forbid_work(monkeypatch)
    mentions(workspace.refused("optimize", "model.onnx", "-o", out, "--calib", "calib.npz"), *words)


def test_output_of_a_folder_must_not_be_a_file(workspace, monkeypatch):
    forbid_work(monkeypatch)
    (workspace.folder / "exported").mkdir()
    mentions(workspace.refused("optimize", "exported", "-o", "calib.npz"), "is a file", "name a folder")
    mentions(workspace.refused("optimize", "exported", "-o", "calib.npz/x"), "'calib.npz' is a file")


def test_a_folder_without_the_right_to_write(workspace, monkeypatch):
    forbid_work(monkeypatch)
    monkeypatch.setattr(os, "access", lambda *_: False)
    mentions(workspace.refused(*WITH_DATA), "out.onnx", "not writable")


@pytest.mark.parametrize("report", ["calib.npz", "calib.npz/report", ""])
def test_reports_that_cannot_be_written_are_found_before_the_work(workspace, monkeypatch, report):
    forbid_work(monkeypatch)
    mentions(workspace.refused(*WITH_DATA, "--report", report), "is a file" if report else "folder ''")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "tempfile.mkdtemp", "pathlib.Path.replace"])
def test_a_full_disk(workspace, monkeypatch, where):
    monkeypatch.setattr(where, full_disk)
    mentions(workspace.refused(*WITH_DATA, "--budget", "0.1"), "out.onnx", "No space left", "free some space")


def test_a_full_disk_under_the_report_leaves_the_output_alone(workspace, monkeypatch):
    monkeypatch.setattr(Path, "write_text", full_disk)
    (workspace.folder / "rep").mkdir()
    mentions(workspace.refused(*WITH_DATA, "--report", "rep"), "rep", "No space left")


def test_files_that_must_not_grow(workspace, process):
    """A real limit of the system: the model does not fit, so writes fail with EFBIG, and SIGXFSZ must not kill."""
    before = workspace.files()
    prelude = (
        "import resource, sys\n"
        "from onnxcollapse.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "main(sys.argv[1:], prog_name='onnxcollapse')\n"
    )
    done = process(*OPTIMIZE, prelude=prelude)
    mentions(one_line(done.stderr, done.returncode), "out.onnx", "File too large")
    assert done.stdout == ""
    assert workspace.files() == before


@pytest.mark.parametrize("step", ["rewriting", "saving"])
def test_an_interruption(workspace, monkeypatch, step):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    where = {"rewriting": "onnxcollapse.rewriting.lossy.LossyStage.run", "saving": "os.fsync"}[step]
    monkeypatch.setattr(where, interrupt)
    assert workspace.refused(*WITH_DATA, status=130) == "interrupted"
    assert (workspace.folder / "out.onnx").read_bytes() == PRECIOUS


def test_an_interruption_between_the_two_files_of_a_model_puts_the_first_back(
    workspace, external, monkeypatch
):
    before = workspace.files()
    real, moved = Path.replace, []

    def interrupt(path, target):
        if moved:
            moved.clear()
            raise KeyboardInterrupt
        if path.suffix != ".before":
            moved.append(path)
        return real(path, target)

    np.savez(workspace.folder / "calib.npz", x=rows(200, 8))
    before = workspace.files()
    monkeypatch.setattr(Path, "replace", interrupt)
    result = workspace.run("optimize", "model.onnx", "-o", "model.onnx")
    one_line(result.stderr, result.exit_code, status=130)
    assert workspace.files() == before


def test_ctrl_c_in_a_process_of_its_own(workspace, process):
    """The metric presses it while the model is being measured."""
    (workspace.folder / "mine.py").write_text(
        "import os, signal\n\n"
        "def f(outputs, reference, batch):\n    os.kill(os.getpid(), signal.SIGINT)\n    return 0.0\n"
    )
    before = workspace.files()
    done = process(*WITH_DATA, "--metric", "mine.py:f")
    assert one_line(done.stderr, done.returncode, status=130) == "interrupted"
    assert done.stdout == ""
    assert workspace.files() == before
