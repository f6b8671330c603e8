# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and the picture of a sweep."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from onnxcollapse.model import files
from onnxcollapse.report.picture import draw
from onnxcollapse.rewriting.journal import plain

NO_PICTURE = 'no picture without matplotlib: pip install "onnxcollapse[report]" and sweep again'

FILES = ("sweep.csv", "sweep.json", "sweep.png")


def write_sweep(document: dict[str, Any], folder: Path) -> None:
    """Writes ``sweep.csv``, ``sweep.json`` and, where matplotlib is installed, ``sweep.png``: all or none.

    Args:
        document: What ``onnxcollapse sweep --json`` prints; where there is no picture, its notes say so.
        folder: Where to; it exists. A picture of an earlier sweep does not stay beside new tables.

    Raises:
        ModelError: The files cannot be written.
    """
    picture: bytes | None = None
    try:
        picture = draw(document)
    except ImportError:
        if NO_PICTURE not in document["notes"]:
            document["notes"].append(NO_PICTURE)
    contents = {
        "sweep.csv": _csv(document).encode(),
        "sweep.json": (json.dumps(plain(document), indent=1, allow_nan=False) + "\n").encode(),
    }
    if picture is not None:
        contents["sweep.png"] = picture
    with files.staging(folder / "sweep.csv") as staged:
        for name, content in contents.items():
            (staged / name).write_bytes(content)
        files.commit([staged / name for name in contents], folder)
        if picture is None:
            (folder / "sweep.png").unlink(missing_ok=True)


def _csv(document: Mapping[str, Any]) -> str:
    rows = [{key: _cell(value) for key, value in row.items()} for row in document["targets"]]
    file = StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """Truth as JSON spells it; the rest as it is, nothing as an empty cell."""
    return str(value).lower() if isinstance(value, bool) else value
