# SPDX-License-Identifier: Apache-2.0
"""What a person at a terminal sees."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from onnxcollapse.cli.bars import RichProgress
from onnxcollapse.cli.console import Bars, console
from onnxcollapse.rewriting import Progress


def at_a_terminal(*arguments: str, folder) -> tuple[int, str, str]:
    """Runs the command with a terminal for stderr; returns its status, stdout and what the terminal got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxcollapse", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = bytearray()
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout.decode(), shown.decode()


def test_bars_show_at_a_terminal_and_go_away(workspace):
    arguments = ("optimize", "model.onnx", "-o", "out.onnx", "--calib", "calib.npz", "--budget", "0.1")
    status, stdout, shown = at_a_terminal(*arguments, folder=workspace.folder)
    assert status == 0
    assert "Wrote out.onnx" in stdout
    assert "\x1b" not in stdout
    assert "pricing" in shown
    assert shown.rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\r"))
    status, _, shown = at_a_terminal(*arguments, "--json", folder=workspace.folder)
    assert (status, shown) == (0, "")


def test_bars_are_silent_without_a_terminal(capsys):
    with Bars(quiet=False) as progress:
        assert type(progress) is Progress
        with progress.task("work", 3) as task:
            task.advance()
            task.update(2, 3)
    assert capsys.readouterr() == ("", "")


def test_bars_move_and_are_taken_away(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Bars(quiet=False) as progress:
        assert isinstance(progress, RichProgress)
        with progress.task("work", 3) as task:
            task.advance()
            task.update(2, 3)
            [shown] = progress._bars.tasks
            assert (shown.description, shown.completed, shown.total) == ("work", 2, 3)
        assert progress._bars.tasks == []
        with pytest.raises(RuntimeError), progress.task("unknown length", 0):
            raise RuntimeError
        assert progress._bars.tasks == []


def test_tables_are_wide_where_there_is_no_terminal(capsys):
    assert console().width == 160
