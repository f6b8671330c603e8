# SPDX-License-Identifier: Apache-2.0
"""The command line in a folder with a model, its data and a file that must not be lost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from onnxcollapse.cli import main
from tests.support import mlp, rows

PRECIOUS = b"what was here before"


class Workspace:
    """Runs commands in a folder that holds model.onnx, calib.npz and out.onnx."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_model(mlp([8, 64, 8], "PRelu", slopes=[[0.98]]))
        np.savez(folder / "calib.npz", x=rows(200, 8))
        (folder / "out.onnx").write_bytes(PRECIOUS)

    def write_model(self, model, name: str = "model.onnx", **options) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        model.save(self.folder / name, **options)

    def files(self) -> dict[str, bytes]:
        """Everything in the folder, hidden files and links included."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if "__pycache__" in name:
                continue
            found[name] = path.read_bytes() if path.is_file() else b"<folder>"
        return found

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, [str(item) for item in arguments], prog_name="onnxcollapse")

    def optimize(self, *arguments: object, out: str = "out.onnx", calib: str | None = "calib.npz") -> Result:
        data = [] if calib is None else ["--calib", calib]
        return self.run("optimize", "model.onnx", "-o", out, *data, *arguments)

    def summary(self, *arguments: object, **options) -> dict:
        """Runs optimize --json, which must succeed in silence."""
        result = self.optimize(*arguments, "--json", **options)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return json.loads(result.stdout)

    def refused(self, *arguments: object, status: int = 2) -> str:
        """Runs a command that must fail in one line on stderr and change nothing; returns the line."""
        before = self.files()
        result = self.run(*arguments)
        line = one_line(result.stderr, result.exit_code, status)
        assert result.stdout == ""
        assert self.files() == before, "a failed run changed the folder"
        return line


def one_line(stderr: str, exit_code: int, status: int = 2) -> str:
    """Checks that a command failed with a status and nothing but one line of its own."""
    assert exit_code == status, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("onnxcollapse: ")
    return lines[0].removeprefix("onnxcollapse: ")


def mentions(line: str, *words: str) -> None:
    """Checks that an error says all that it should."""
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


@contextmanager
def logging_restored():
    """Takes back how the command line sets up logging: to a stream that is closed when the command has run."""
    root, ours = logging.getLogger(), logging.getLogger("onnxcollapse")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def start(*arguments: object, folder: Path, prelude: str | None = None, **environment: str):
    """Runs ``python -m onnxcollapse`` as a process of its own, or Python code that ends in doing so."""
    code = ["-m", "onnxcollapse"] if prelude is None else ["-c", prelude]
    return subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )
