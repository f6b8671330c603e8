# SPDX-License-Identifier: Apache-2.0
"""Writes a report folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxcollapse.errors import OptionError
from onnxcollapse.report.html import render
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "journal.json").write_text(result.journal.to_json(), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(render(result, summary), encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"report folder '{folder}' cannot be written: {error.strerror}; choose another"
        ) from error
