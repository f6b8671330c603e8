# SPDX-License-Identifier: Apache-2.0
"""What benchmarks that make rows by model and method share: their arguments, commands and tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def parser(doc: str | None, models: Sequence[str], methods: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the folder of models, the choice of models and methods, and `--missing`."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("-o", "--output", type=Path, required=True, help="folder for models")
    found.add_argument("--models", nargs="*", choices=list(models), default=list(models))
    found.add_argument("--methods", nargs="+", choices=list(methods), default=[], metavar="METHOD")
    found.add_argument("--missing", action="store_true", help="leave out rows that have been written already")
    return found


def run(*arguments: str, accepted: Sequence[int] = (0,), path: str | None = None) -> str:
    """Runs Python with arguments and gives what it prints.

    Args:
        arguments: As after `python`.
        accepted: Exit statuses; with others than 0 something has to be printed.
        path: PYTHONPATH; None for that of this process.

    Raises:
        ValueError: It ends otherwise.
    """
    surroundings = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, env=surroundings
    )
    if done.returncode not in accepted or (not done.stdout and accepted != (0,)):
        raise ValueError(
            f"{' '.join(arguments[:3])} ended with {done.returncode}: {done.stderr.strip()[-250:]}"
        )
    return done.stdout


def aligned(lines: Sequence[Iterable[str]]) -> list[str]:
    """Lines of cells with every column as wide as its widest cell."""
    cells = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
