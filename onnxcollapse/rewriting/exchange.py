# SPDX-License-Identifier: Apache-2.0
"""Improves a selection whose rewrites overlap by exchanging variants, with what each saves beside the others.

Alone, a site's saving counts what its neighbours take away as well: a narrower layer makes the weights before and
behind it smaller, and so does a lower rank of one of them. So a selection that was chosen by savings alone is only a
start. Here every site may move to another variant near its own, or to none; what a move saves is sized beside the
others as they are, which holds as long as no neighbour moves at the same time. The best set of such moves is one
small integer programme, and it is solved again from where they lead until nothing gets better. It is solved with
neighbours apart, and with all that may move: then savings are estimates, but one neighbour can give another room.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcollapse.rewriting.selection import Candidate, exclusive, solve

logger = logging.getLogger(__name__)

STEPS = 24
"""Sets of moves at most."""

REACH = 3
"""Variants by which a site moves at once."""

GAIN = 1e-3
"""Share of the error by which a step has to lower it."""


@dataclass(frozen=True, eq=False)
class Move:
    """One site of a selection takes another variant.

    Attributes:
        site: Pass and site.
        to: The variant, None for none.
        saved: What it saves more than now.
        cost: What it costs more than now.
        keys: The site and pairs of it and each neighbour: of moves that share one only one is sized right.
    """

    site: tuple[str, str]
    to: Candidate | None
    saved: float
    cost: float
    keys: frozenset[object]

    @property
    def holds(self) -> frozenset[str]:
        """What moves exclude each other by in any case."""
        return frozenset() if self.to is None else self.to.nodes


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
        for (one, a), (other, b) in itertools.combinations(self._sites.items(), 2):
            if a[0].overlaps(b[0]):
                self._near[one].add(other)
                self._near[other].add(one)

    def improved(self, chosen: Sequence[Candidate], room: float) -> list[Candidate]:
        """A selection of less error that is as small.

        Args:
            chosen: The selection to begin with, inside the room.
            room: Largest size.
        """
        best = list(chosen)
        for _ in range(STEPS):
            here = {item.key[:2]: item for item in best}
            moves = [move for site in self._sites for move in self._moves(site, here)]
            steps = [self._step(best, moves, room - self._size(best), apart) for apart in (True, False)]
            now, then, step = self._total(best), math.inf, best
            for found in steps:
                if found is not None and self._total(found) < then:
                    then, step = self._total(found), found
            logger.debug(
                "%d of %d rewrites exchanged: %.4g -> %.4g", len(set(step) - set(best)), len(step), now, then
            )
            if not then < (1.0 - GAIN) * now:
                break
            best = step
        return best

    def _step(
        self, chosen: list[Candidate], moves: Sequence[Move], spare: float, apart: bool
    ) -> list[Candidate] | None:
        """The selection after the best set of moves, neighbours `apart` or not; None where none is inside the room."""
        if not moves:
            return None
        saved = np.array([move.saved for move in moves])
        cost = np.array([move.cost for move in moves])
        saved_unit, cost_unit = (max(float(np.abs(array).max()), 1e-30) for array in (saved, cost))
        rule = exclusive([move.keys if apart else [move.site, *move.holds] for move in moves])
        asked = spare
        for _ in range(3):
            taken = solve(cost / cost_unit, [rule, (saved / saved_unit, -asked / saved_unit, np.inf)])
            if taken is None:
                return None
            after = {item.key[:2]: item for item in chosen}
            for move in itertools.compress(moves, taken):
                if move.to is None:
                    del after[move.site]
                else:
                    after[move.site] = move.to
            found = sorted(after.values(), key=lambda item: item.order)
            over = self._size(found) - self._size(chosen) - spare
            if over <= 0:
                return found
            asked -= over  # savings between two variants that were sized are estimated
        return None

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
        keys = frozenset([site, *(frozenset((site, other)) for other in self._near[site])])
        without = self._size(others) if others else None
        before = 0.0 if now is None else self._saved([now], others, without)[0]
        paid = 0.0 if now is None else self._cost(now)
        moves = [] if now is None else [Move(site, None, -before, -paid, keys)]
        for nodes in dict.fromkeys(item.nodes for item in near):
            same = [item for item in near if item.nodes == nodes]
            for item, saved in zip(same, self._saved(same, others, without), strict=True):
                moves.append(Move(site, item, saved - before, self._cost(item) - paid, keys))
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
