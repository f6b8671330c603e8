# SPDX-License-Identifier: Apache-2.0
"""Improves a selection whose rewrites overlap by exchanging variants, with what each saves beside the others.

Alone, a site's saving counts what its neighbours take away as well: a narrower layer makes the weights before and
behind it smaller, and so does a lower rank of one of them. So a selection that was chosen by savings alone is only a
start. Here every site may move to another variant near its own, or to none; what a move saves is sized beside the
others as they are, which holds as long as no neighbour moves at the same time. The best set of such moves is one
small integer programme, and it is solved again from where they lead until nothing gets better. It is solved with
neighbours apart, and with all that may move: then savings are estimates, but one neighbour can give another room. What
comes for a neighbour that goes saves more than beside it, so sets are tried, too, that seem to be a little too large.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcollapse.rewriting.selection import Candidate, exclusive, solve

logger = logging.getLogger(__name__)

STEPS = 24
"""Sets of moves at most."""

REACH = 3
"""Variants by which a site moves at once."""

GAIN = 1e-3
"""Share of the error, or of the size, by which a step has to lower it."""


@dataclass(frozen=True, eq=False)
class Move:
    """One site of a selection takes another variant.

    Attributes:
        site: Pass and site.
        to: The variant, None for none.
        saved: What it saves more than now.
        cost: What it costs more than now.
        overlap: What it would save more without its neighbours.
        keys: Pairs of the site and each neighbour: of moves that share one only one is sized right.
    """

    site: tuple[str, str]
    to: Candidate | None
    saved: float
    cost: float
    overlap: float
    keys: frozenset[Hashable]

    def holds(self, apart: bool) -> list[Hashable]:
        """What only one of all moves may hold; of neighbours that stay `apart` only one may move."""
        return [self.site, *(self.keys if apart else ()), *(() if self.to is None else self.to.nodes)]


class Exchange:
    """Exchanges variants of a selection.

    Args:
        rest: All candidates.
        measure: What is saved.
        size: Sizes a model with a selection applied.
        cost: What a candidate's error counts; costs add up.
    """

    def __init__(
        self,
        rest: Sequence[Candidate],
        measure: str,
        size: Callable[[Sequence[Candidate]], float],
        cost: Callable[[Candidate], float],
    ) -> None:
        self._measure, self._size, self._cost = measure, size, cost
        self._sites: dict[tuple[str, str], list[Candidate]] = {}
        for item in rest:
            self._sites.setdefault(item.key[:2], []).append(item)
        for variants in self._sites.values():
            variants.sort(key=lambda item: item.saving.of(measure))
        self._near: dict[tuple[str, str], set[tuple[str, str]]] = {site: set() for site in self._sites}
        whole = {site: _union(variants) for site, variants in self._sites.items()}
        for (one, a), (other, b) in itertools.combinations(whole.items(), 2):
            if a.overlaps(b):
                self._near[one].add(other)
                self._near[other].add(one)

    def better(self, chosen: Sequence[Candidate], room: float) -> list[Candidate]:
        """A selection of less error that is small enough.

        Args:
            chosen: The selection to begin with, inside the room.
            room: Largest size.
        """

        def step(now: Sequence[Candidate], moves: Sequence[Move], apart: bool) -> list[Candidate] | None:
            spare, found = room - self._size(now), []
            for hoped in (0.0,) if apart else (0.0, max(move.overlap for move in moves)):
                fitting = self._fitting(now, moves, apart, spare, hoped)
                found += [] if fitting is None else [fitting]
            return min(found, key=self._total, default=None)

        return self._climb(chosen, step, self._total)

    def _fitting(
        self, now: Sequence[Candidate], moves: Sequence[Move], apart: bool, spare: float, hoped: float
    ) -> list[Candidate] | None:
        """The selection after the best moves that need no more than `spare`, with more hoped for at first."""
        asked = spare + hoped
        for _ in range(3):
            found = _taken(now, moves, [m.cost for m in moves], [-m.saved for m in moves], asked, apart)
            over = math.inf if found is None else self._size(found) - self._size(now) - spare
            if found is None or over <= 0:
                return found
            asked -= over  # savings between two variants that were sized are estimated
        return None

    def smaller(self, chosen: Sequence[Candidate], allowed: float) -> list[Candidate]:
        """A selection that saves more at an error that is allowed.

        Args:
            chosen: The selection to begin with, at such an error.
            allowed: Largest sum of costs.
        """

        def step(now: Sequence[Candidate], moves: Sequence[Move], apart: bool) -> list[Candidate] | None:
            spare, costs = allowed - self._total(now), [m.cost for m in moves]
            found = [
                _taken(now, moves, [-m.saved - hoped * m.overlap for m in moves], costs, spare, apart)
                for hoped in ((0.0,) if apart else (0.0, 1.0))
            ]
            # A solver's tolerance lets a sum of costs be a little too large.
            inside = [one for one in found if one is not None and self._total(one) <= allowed * (1 + 1e-9)]
            return min(inside, key=self._size, default=None)

        return self._climb(chosen, step, self._size)

    def _climb(
        self,
        chosen: Sequence[Candidate],
        step: Callable[[Sequence[Candidate], Sequence[Move], bool], list[Candidate] | None],
        value: Callable[[Sequence[Candidate]], float],
    ) -> list[Candidate]:
        """Takes steps while they lower a value, each the better one of neighbours apart and together."""
        best = list(chosen)
        for _ in range(STEPS):
            here = {item.key[:2]: item for item in best}
            moves = [move for site in self._sites for move in self._moves(site, here)]
            steps = [step(best, moves, apart) for apart in (True, False)] if moves else []
            found = min((one for one in steps if one is not None), key=value, default=best)
            now, then = value(best), value(found)
            changed = len(set(found) - set(best))
            logger.debug("%d of %d rewrites exchanged: %.4g -> %.4g", changed, len(found), now, then)
            if not then < (1.0 - GAIN) * now:
                break
            best = found
        return best

    def _total(self, chosen: Sequence[Candidate]) -> float:
        return sum(map(self._cost, chosen))

    def _moves(self, site: tuple[str, str], here: dict[tuple[str, str], Candidate]) -> list[Move]:
        """All moves of one site."""
        variants, now = self._sites[site], here.get(site)
        place = -1 if now is None else variants.index(now)
        near = [item for item in variants[max(place - REACH, 0) : place + REACH + 1] if item is not now]
        others = [here[other] for other in self._near[site] if other in here]
        held = frozenset[str]().union(*(item.nodes for key, item in here.items() if key != site))
        near = [item for item in near if not item.nodes & held]
        keys = frozenset[Hashable](frozenset((site, other)) for other in self._near[site])
        without = self._size(others) if others else None
        before = 0.0 if now is None else self._saved([now], others, without)[0]
        paid = 0.0 if now is None else self._cost(now)
        moves = [] if now is None else [Move(site, None, -before, -paid, 0.0, keys)]
        for nodes in dict.fromkeys(item.nodes for item in near):
            same = [item for item in near if item.nodes == nodes]
            for item, saved in zip(same, self._saved(same, others, without), strict=True):
                overlap = max(item.saving.of(self._measure) - saved, 0.0)
                moves.append(Move(site, item, saved - before, self._cost(item) - paid, overlap, keys))
        return moves

    def _saved(
        self, same: Sequence[Candidate], others: list[Candidate], without: float | None
    ) -> list[float]:
        """What variants of a site save beside others: the first and the last are sized, between them it is linear."""
        alone = [item.saving.of(self._measure) for item in same]
        if without is None:
            return alone
        sized = [without - self._size([*others, item]) for item in dict.fromkeys((same[0], same[-1]))]
        return np.interp(alone, [alone[0], alone[-1]][: len(sized)], sized).tolist()


def _taken(
    now: Sequence[Candidate],
    moves: Sequence[Move],
    worth: Sequence[float],
    use: Sequence[float],
    spare: float,
    apart: bool,
) -> list[Candidate] | None:
    """The selection after those moves whose `worth` adds up to the least, and whose `use` to no more than `spare`."""
    values, uses = np.array(worth), np.array(use)
    value_unit, use_unit = (max(float(np.abs(array).max()), 1e-30) for array in (values, uses))
    rules = [exclusive([move.holds(apart) for move in moves]), (uses / use_unit, -np.inf, spare / use_unit)]
    taken = solve(values / value_unit, rules)
    if taken is None:
        return None
    after = {item.key[:2]: item for item in now}
    for move in itertools.compress(moves, taken):
        if move.to is None:
            del after[move.site]
        else:
            after[move.site] = move.to
    return sorted(after.values(), key=lambda item: item.order)


def _union(variants: Sequence[Candidate]) -> Candidate:
    """One that holds what any variant of a site does."""
    return replace(variants[0], tensors=frozenset[str]().union(*(item.tensors for item in variants)))
