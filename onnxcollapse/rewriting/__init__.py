# SPDX-License-Identifier: Apache-2.0
"""Rewriting: the protocol of a pass, the journal, transactions, and the pipeline under one budget."""

from onnxcollapse.rewriting.budget import Budget, Target
from onnxcollapse.rewriting.journal import Entry, Journal
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.progress import Progress, Task
from onnxcollapse.rewriting.proposal import Decline, GraphSite, Proposal, Saving, Site

__all__ = [
    "Budget",
    "Decline",
    "Entry",
    "GraphSite",
    "Journal",
    "Pass",
    "Progress",
    "Proposal",
    "Saving",
    "Site",
    "Target",
    "Task",
]
