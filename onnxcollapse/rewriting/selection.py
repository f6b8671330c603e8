# SPDX-License-Identifier: Apache-2.0
"""Chooses among candidates: which of them to try together, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.proposal import Proposal, Saving


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposal with what it really saves and costs.

    Attributes:
        maker: The pass that proposed it.
        position: Index of the site in graph order; rewrites are applied front to back.
        nodes: Keys of the nodes that the site holds; candidates that share one exclude each other.
        saving: Measured by applying it alone.
        impact: Error at the outputs of it alone, on a sample.
        tensors: Names of the tensors that the site's nodes compute.
    """

    maker: Pass
    proposal: Proposal
    position: int
    nodes: frozenset[str]
    saving: Saving = field(default_factory=Saving)
    impact: float = 0.0
    tensors: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[str, str, str]:
        """Pass, site and variant."""
        return self.maker.describe(), self.proposal.site, self.proposal.variant


def node_key(node: ir.Node) -> str:
    """Identifies a node in every copy of its graph, a nameless one too; one that a rewrite put in its place differs."""
    return f"{node.name or ''}->{next((value.name for value in node.outputs if value.name), '')}"


def compatible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keeps each candidate that shares no node with one before it."""
    taken: set[str] = set()
    kept = []
    for candidate in candidates:
        if not candidate.nodes & taken:
            taken |= candidate.nodes
            kept.append(candidate)
    return kept


def ranked(candidates: Sequence[Candidate], measure: str = "params") -> list[Candidate]:
    """Orders candidates by error per unit saved, cheapest first, and leaves out those that exclude each other.

    What was asked for by name comes before all that is only chosen.
    """

    def price(candidate: Candidate) -> tuple[bool, float, int]:
        saved = candidate.saving.of(measure)
        cost = candidate.impact / saved if saved > 0 else float("inf")
        return not candidate.maker.on_request, cost, candidate.position

    return compatible(sorted(candidates, key=price))


def most_saving(candidates: Sequence[Candidate], measure: str) -> list[Candidate]:
    """Orders candidates by what they save, most first, and leaves out those that exclude each other.

    For a target that the cheapest variants of all sites together do not reach.
    """

    def order(candidate: Candidate) -> tuple[bool, float, float]:
        return not candidate.maker.on_request, -candidate.saving.of(measure), candidate.impact

    return compatible(sorted(candidates, key=order))


def affordable(candidates: Sequence[Candidate], cap: float) -> list[Candidate]:
    """Returns the longest run from the front whose impacts add up to at most `cap`.

    Errors do not add up exactly, so this is only the first guess that is then measured.
    """
    total, chosen = 0.0, []
    for candidate in candidates:
        total += candidate.impact
        if total > cap:
            break
        chosen.append(candidate)
    return chosen


def reaching(candidates: Sequence[Candidate], measure: str, needed: float) -> list[Candidate]:
    """Returns the shortest run from the front that saves at least `needed`, or all when none does."""
    saved, chosen = 0.0, []
    for candidate in candidates:
        if saved >= needed:
            break
        saved += candidate.saving.of(measure)
        chosen.append(candidate)
    return chosen


def admit(
    group: Sequence[Candidate],
    attempt: Callable[[Sequence[Candidate]], bool],
    refuse: Callable[[Candidate], None],
) -> None:
    """Tries a group as a whole and halves it while it fails, the cheaper half first.

    Args:
        group: Candidates, cheapest first.
        attempt: Applies and measures a group on top of what was kept; keeps it and returns True, or rolls back.
        refuse: Told each candidate that failed by itself.
    """
    if not group or attempt(group):
        return
    if len(group) == 1:
        refuse(group[0])
        return
    middle = (len(group) + 1) // 2
    admit(group[:middle], attempt, refuse)
    admit(group[middle:], attempt, refuse)
