# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one page to read, one document for machines, and the journal."""

from onnxcollapse.report.html import render
from onnxcollapse.report.write import write_report

__all__ = ["render", "write_report"]
