# SPDX-License-Identifier: Apache-2.0
"""What benchmarks that make rows by model and method share: their arguments, commands and tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine


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


def put(
    name: str, row: dict[str, Any], key: Callable[[dict[str, Any]], Hashable], order: Iterable[Hashable]
) -> None:
    """Writes a row in the place of the one of the same key.

    Args:
        name: Of the results.
        row: The row.
        key: What makes a row the same as an earlier one.
        order: All keys as they are to follow each other.
    """
    known = {key(old): old for old in machine.read(name)} | {key(row): row}
    place = {one: number for number, one in enumerate(order)}
    machine.write(name, sorted(known.values(), key=lambda one: place.get(key(one), len(place))))


def by_model(rows: Sequence[dict[str, Any]], models: Iterable[str], names: Sequence[str]) -> str:
    """Rows as text: a table for each model, what a row has not left empty."""
    lines = []
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        if mine:
            cells = (tuple("" if row.get(name) is None else str(row[name]) for name in names) for row in mine)
            lines += [model, *aligned([names, *cells]), ""]
    return "\n".join(lines)
