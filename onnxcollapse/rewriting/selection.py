# SPDX-License-Identifier: Apache-2.0
"""Chooses among candidates: which of them to try together, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from scipy import optimize, sparse

from onnxcollapse.quiet import STDOUT, quiet
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.proposal import Proposal, Saving

Rule = tuple[np.ndarray | sparse.csr_array, float, float]
"""Coefficients of items [items] or [rules, items], and what their sum over taken items lies between."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposal with what it really saves and costs.

    Attributes:
        maker: The pass that proposed it.
        position: Index of the site in graph order; rewrites are applied front to back.
        nodes: Keys of what the site holds of its nodes; candidates that share one exclude each other.
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

    @property
    def order(self) -> tuple[int, bool]:
        """Rewrites are applied in this order: front to back, at one place ranks before widths."""
        return self.position, self.proposal.cuts != "rank"

    def overlaps(self, other: Candidate) -> bool:
        """Whether both may cut one weight: they share nodes, or what one yields makes the channels of the other."""
        return (
            self.proposal.site in other.tensors
            or other.proposal.site in self.tensors
            or not self.tensors.isdisjoint(other.tensors)
        )


def held(node: ir.Node, cuts: str) -> tuple[str, ...]:
    """Keys of what a rewrite holds of a node, see `Proposal.cuts`."""
    return tuple(f"{node_key(node)} {what}" for what in ("width", "rank") if cuts in (what, "both"))


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

    def price(candidate: Candidate) -> tuple[bool, float, tuple[int, bool]]:
        saved = candidate.saving.of(measure)
        cost = candidate.impact / saved if saved > 0 else float("inf")
        return not candidate.maker.on_request, cost, candidate.order

    return compatible(sorted(candidates, key=price))


def choose(
    candidates: Sequence[Candidate],
    measure: str,
    *,
    needed: float | None = None,
    allowed: float = float("inf"),
    power: int = 1,
    already: float = 0.0,
) -> list[Candidate]:
    """Chooses one variant or none for each site: a knapsack with multiple choice, solved by HiGHS.

    Errors are taken to add up in their `power`; savings to add up. Both only guide what is then measured.

    Args:
        candidates: Priced.
        measure: What is saved.
        needed: Save at least this much at the least error; None to save as much as `allowed` lets. When nothing
            saves enough, what saves most is chosen.
        allowed: Largest error of all together.
        power: Of the error, that adds up.
        already: Error of the model that they were made for, which is part of the impact of each.

    Returns:
        The chosen, in graph order.
    """
    if not candidates:
        return []
    saved = np.array([float(item.saving.of(measure)) for item in candidates])
    cost = np.array([max(item.impact**power - already**power, 0.0) for item in candidates])
    if not np.isfinite(cost).all():
        raise ValueError("candidates without a measured impact cannot be chosen among")
    saved_unit, cost_unit = max(np.abs(saved).max(), 1e-30), max(cost.max(), 1e-30)
    s, c = saved / saved_unit, cost / cost_unit
    rules: list[Rule] = [exclusive([item.nodes or (f"site {item.key[:2]}",) for item in candidates])]
    if math.isfinite(allowed):
        rules.append((c, -np.inf, allowed**power / cost_unit))
    tie = 1e-6 / len(candidates)  # of equal savings the cheaper, of equal costs the larger
    if needed is not None:
        enough = [*rules, (s, needed / saved_unit, np.inf)]
        found = solve(c - tie * s, enough)
        if found is not None:
            return _in_order(candidates, found)
    found = solve(tie * c - s, rules)
    return [] if found is None else _in_order(candidates, found)


def solve(objective: np.ndarray, rules: Sequence[Rule]) -> np.ndarray | None:
    """Takes items so that the sum of what they have in `objective` is least: an integer programme, by HiGHS.

    Args:
        objective: float64 [items], of the order of 1.
        rules: What has to hold of the sums over taken items.

    Returns:
        Which items to take, bool [items]; None where no selection obeys the rules.
    """
    with quiet(STDOUT):  # some releases of HiGHS print there what they are at
        result = optimize.milp(
            objective,
            integrality=np.ones(len(objective), np.uint8),
            bounds=optimize.Bounds(0, 1),
            constraints=[optimize.LinearConstraint(*rule) for rule in rules],
            options={"mip_rel_gap": 1e-4, "time_limit": 30.0},
        )
    return None if result.x is None else result.x > 0.5


def exclusive(keys: Sequence[Collection[Hashable]]) -> Rule:
    """The rule that of all items that have a key at most one is taken."""
    by_key: dict[Hashable, list[int]] = {}
    for place, mine in enumerate(keys):
        for key in mine:
            by_key.setdefault(key, []).append(place)
    groups = sorted({tuple(places) for places in by_key.values()})
    rows = [row for row, places in enumerate(groups) for _ in places]
    columns = [place for places in groups for place in places]
    shape = (len(groups), len(keys))
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape), -np.inf, 1.0


def _in_order(candidates: Sequence[Candidate], taken: np.ndarray) -> list[Candidate]:
    return sorted((c for c, take in zip(candidates, taken, strict=True) if take), key=lambda c: c.order)


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
