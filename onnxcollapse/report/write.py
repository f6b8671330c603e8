# SPDX-License-Identifier: Apache-2.0
"""Writes a report folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxcollapse.errors import OptionError
from onnxcollapse.report.html import render
from onnxcollapse.rewriting.journal import plain
from onnxcollapse.rewriting.pipeline import Result


def write_report(result: Result, summary: dict[str, Any], folder: Path) -> None:
    """Writes ``report.html``, ``report.json`` and ``journal.json``; the journal holds no times.

    Args:
        result: What `pipeline.optimize` returned.
        summary: The document that ``--json`` prints.
        folder: Made when it is missing.

    Raises:
        OptionError: The folder cannot be written.
    """
    texts = {
        "journal.json": result.journal.to_json(),
        "report.json": json.dumps(plain(summary), indent=1, allow_nan=False) + "\n",
        "report.html": render(result, summary),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"report folder '{folder}' cannot be written: {error.strerror}; choose another"
        ) from error
