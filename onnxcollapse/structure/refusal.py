# SPDX-License-Identifier: Apache-2.0
"""Why a place in the graph is not what it looks like: a reason instead of a bare False."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Refusal:
    """A place that was looked at and left.

    Attributes:
        node_name: The node (or, for nameless nodes, its first output) that was looked at.
        reason: The fact that speaks against it, fit for a report.
        candidate: False when the place never resembled what was looked for (a `Relu` is no Linear); such
            refusals are answers to a direct question and do not belong in a report.
    """

    node_name: str
    reason: str
    candidate: bool = True

    @property
    def name(self) -> str:
        """What the place is called in reports."""
        return self.node_name

    def __str__(self) -> str:
        return f"{self.node_name}: {self.reason}"


class RefusedError(Exception):
    """Carries a reason out of a search; the search's entry point turns it into a `Refusal`."""

    def __init__(self, reason: str, *, candidate: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.candidate = candidate

    def at(self, node: ir.Node) -> Refusal:
        """The refusal of `node` for this reason."""
        return Refusal(label(node), self.reason, self.candidate)


def label(node: ir.Node) -> str:
    """A name for `node` in messages: its own, else its first output's."""
    if node.name:
        return node.name
    return (node.outputs[0].name if node.outputs else None) or node.op_type
