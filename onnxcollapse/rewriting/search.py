# SPDX-License-Identifier: Apache-2.0
"""Looks for the best selection of priced candidates: what was predicted is corrected by what is measured."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.exchange import Exchange
from onnxcollapse.rewriting.extents import LATENCY, Extents
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.proposal import Proposal, Saving
from onnxcollapse.rewriting.selection import Candidate, choose
from onnxcollapse.verification.metrics import additive_power

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Selections that a round builds and measures."""

NEAR = 0.9
"""Share of the budget from which on it counts as spent."""

SIZINGS = 16
"""Selections that are sized, without data, to meet a target."""

SLACK = 0.25
"""Share of the wanted saving by which a latency may be below its target."""

CLOSE = 0.01
"""Share of what the target leaves that may be saved beyond it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A model with some candidates applied and fitted, its error, and what was repaired in it."""

    model: Model
    chosen: tuple[Candidate, ...]
    done: Mapping[tuple[str, str, str], Proposal]
    error: float
    repaired: tuple[tuple[Pass, Proposal], ...] = ()


Attempt = Callable[[Model, Sequence[Candidate]], "tuple[Trial | None, float | None]"]
"""Builds and measures a selection: the trial where it is inside the budget, and the error, None where it has none."""


class Search:
    """Finds a selection by a few trials.

    Args:
        start: The model that candidates were made for.
        kept: What was kept before and stays.
        rest: What is chosen among.
        budget: What is accepted and wanted.
        extents: Measures what is saved.
        attempt: Builds and measures a selection.
        pricing_metric: Of the candidates' impacts; None where passes say what they cost, in units of their own.
    """

    def __init__(
        self,
        start: Model,
        kept: Sequence[Candidate],
        rest: Sequence[Candidate],
        budget: Budget,
        extents: Extents,
        attempt: Attempt,
        pricing_metric: str | None,
    ) -> None:
        self._start, self._kept, self._rest = start, kept, rest
        self._budget, self._extents, self._attempt = budget, extents, attempt
        self._savings: dict[frozenset[Any], float] = {}
        self._already = 0.0
        self._measure = extents.measure
        self._power = 1 if pricing_metric is None else additive_power(pricing_metric)
        self._comparable = pricing_metric == budget.metric

    def run(self, error: float) -> Trial | None:
        """The best trial inside the budget, None where there is none.

        Args:
            error: Of the model as it is, in the metric of the impacts.
        """
        self._already = error
        if self._budget.target is None:
            return self._as_much_as_fits() if self._comparable else self._as_much_as_turns_out_to_fit()
        wanted = self._extents.missing(self._start)
        if self._measure == LATENCY:
            return self._fast_enough(wanted)
        chosen = self._reaching(wanted)
        return self._attempt(self._start, [*self._kept, *chosen])[0] if chosen else None

    def _as_much_as_fits(self) -> Trial | None:
        """Saves as much as the budget allows: the error that is aimed at follows the one that was reached."""
        power, cap = self._power, self._budget.cap
        room = max(cap**power - self._already**power, 0.0) ** (1 / power)
        best: Trial | None = None
        low, high, aim, seen = 0.0, math.inf, room, set[frozenset[Any]]()
        for _ in range(ATTEMPTS):
            chosen = self._allowed(aim)
            selection = frozenset(item.key for item in chosen)
            if not chosen or selection in seen:
                break
            seen.add(selection)
            trial, error = self._attempt(self._start, [*self._kept, *chosen])
            if error is None:
                return best
            if trial is not None:
                best, low = trial, aim
                if error >= NEAR * cap:
                    break
                further = aim * min(0.98 * cap / max(error, 1e-12), 2.0)
                aim = min(further, (aim + high) / 2)
            else:
                high = aim
                aim = max(aim * max(0.95 * cap / error, 0.25), (low + aim) / 2 if low else 0.0)
        return best

    def _as_much_as_turns_out_to_fit(self) -> Trial | None:
        """Saves as much as the budget allows where prices are in another metric, so that they only give the order.

        Halves, in logarithms, what lies between the cheapest candidate and all of them together.
        """
        everything = self._allowed(math.inf)
        if not everything:
            return None
        prices = [max(item.impact - self._already, 1e-12) for item in self._rest]
        low, high = min(prices), sum(max(item.impact - self._already, 1e-12) for item in everything)
        aim, left = math.sqrt(low * high), ATTEMPTS
        best: Trial | None = None
        known: dict[frozenset[Any], bool] = {}
        for _ in range(SIZINGS):
            chosen = self._allowed(aim)
            selection = frozenset(item.key for item in chosen)
            if chosen and selection not in known:
                if not left:
                    break
                left -= 1
                trial, error = self._attempt(self._start, [*self._kept, *chosen])
                if error is None:
                    return best
                known[selection] = trial is not None
                if trial is not None:
                    best = trial
                    if error >= NEAR * self._budget.cap:
                        break
            if known.get(selection, True):  # also where nothing is as cheap
                low = aim
            else:
                high = aim
            if low >= high:
                break
            aim = math.sqrt(low * high)
        return best

    def _saving(self, ask: float) -> list[Candidate]:
        return choose(self._rest, self._measure, needed=ask, power=self._power, already=self._already)

    def _allowed(self, aim: float) -> list[Candidate]:
        chosen = choose(self._rest, self._measure, allowed=aim, power=self._power, already=self._already)
        if self._measure == LATENCY or not _overlap(chosen):
            return chosen
        return self._exchange.smaller(chosen, aim**self._power)

    def _fast_enough(self, wanted: float) -> Trial | None:
        """Reaches a latency: savings of stretches do not add up to that of the model, so what is asked for follows."""
        best: Trial | None = None
        ask, seen = wanted, set[frozenset[Any]]()
        for _ in range(ATTEMPTS):
            chosen = self._saving(ask)
            selection = frozenset(item.key for item in chosen)
            if not chosen or selection in seen:
                break
            trial, _ = self._attempt(self._start, [*self._kept, *chosen])
            if trial is None:
                break
            seen.add(selection)
            missing = self._extents.missing(trial.model)
            if best is None or missing <= 0.0:
                best = trial
            if -SLACK * wanted <= missing <= 0.0:
                break
            ask *= wanted / max(wanted - missing, 0.25 * wanted)
        return best

    def _reaching(self, wanted: float) -> list[Candidate]:
        """Chooses what saves enough; where savings of neighbours overlap, more is asked for until it does."""
        low, high, ask = 0.0, math.inf, wanted
        best: list[Candidate] = []
        for _ in range(SIZINGS):
            chosen = self._saving(ask)
            if not chosen or (ask == wanted and not _overlap(chosen)):
                return chosen
            saved = self._before - self._size(chosen)
            logger.debug("asked to save %.4g, %d rewrites save %.4g of %.4g", ask, len(chosen), saved, wanted)
            if saved >= wanted:
                best, high = chosen, ask
                if saved - wanted <= CLOSE * (self._before - wanted):
                    break
            else:
                low = ask
            wider = ask * min(max(wanted / max(saved, 1.0), 1.01) ** 1.5, 2.0)
            ask = (low + high) / 2 if math.isfinite(high) else wider
            if sum(item.saving.of(self._measure) for item in chosen) < low:
                break  # this is all there is
        return self._exchange.better(best, self._before - wanted) if best else chosen

    @functools.cached_property
    def _exchange(self) -> Exchange:
        def cost(item: Candidate) -> float:
            return max(item.impact**self._power - self._already**self._power, 0.0)

        return Exchange(self._rest, self._measure, self._size, cost)

    def _size(self, chosen: Sequence[Candidate]) -> float:
        """What the model measures with a selection, as its rewrites were fitted for their own.

        Rewrites that overlap are applied together; groups that do not are sized one by one, and once.
        """
        saved = 0.0
        for group in _groups([*self._kept, *chosen]):
            known = frozenset(item.key for item in group)
            if known not in self._savings:
                self._savings[known] = self._saved(group)
            saved += self._savings[known]
        return self._before - saved

    def _saved(self, group: Sequence[Candidate]) -> float:
        """What rewrites save together; what they save alone where they do not fit together."""
        trial = self._start.alone().clone()
        try:
            for item in sorted(group, key=lambda item: item.order):
                apply(trial, item.maker, item.proposal, outline=True)
        except ModelError as problem:
            logger.debug("a selection cannot be sized: %s", problem)
            return sum(item.saving.of(self._measure) for item in group)
        return self._before - self._extents.amount(trial)

    @functools.cached_property
    def _before(self) -> float:
        return self._extents.amount(self._start)


def marginal(
    start: Model,
    chosen: Sequence[Candidate],
    done: Mapping[tuple[str, str, str], Proposal],
    extents: Extents,
) -> dict[tuple[str, str, str], Saving]:
    """What each rewrite takes away behind those before it, so that all of them add up to what is saved.

    Args:
        start: The model that they were made for.
        chosen: What was applied.
        done: How it was fitted.
        extents: Measures; latencies stay 0, as they do not add up.

    Raises:
        ModelError: One of them cannot be applied again.
    """
    model, found = start.alone().clone(), {}
    before = extents.of(model)
    for item in sorted(chosen, key=lambda item: item.order):
        apply(model, item.maker, done[item.key])
        after = extents.of(model)
        found[item.key], before = before - after, after
    return found


def _overlap(chosen: Sequence[Candidate]) -> bool:
    """Whether some share a weight."""
    return len(_groups(chosen)) < len(chosen)


def _groups(chosen: Sequence[Candidate]) -> list[list[Candidate]]:
    """Those that overlap, directly or through others, together."""
    groups: list[list[Candidate]] = []
    for item in chosen:
        touched = [group for group in groups if any(item.overlaps(other) for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append([item, *itertools.chain.from_iterable(touched)])
    return groups
