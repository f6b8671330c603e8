# SPDX-License-Identifier: Apache-2.0
"""The lossy stage: proposals priced at the outputs, chosen under one budget, applied front to back, measured.

A round goes: sites -> statistics (one run for all) -> proposals -> price of each at the outputs (on a few held-out
samples) -> choice -> application front to back, each site fitted again to what the rewritten model before it
really produces -> measurement on the held-out part -> keep, or halve what failed. Rounds repeat while they
keep something, because a rewrite makes new sites.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from onnxcollapse.calibration import Dataset, Plan
from onnxcollapse.errors import DataError, MetricError, ModelError
from onnxcollapse.model import Model
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.extents import Extents
from onnxcollapse.rewriting.fitting import Fitter, Place, apply
from onnxcollapse.rewriting.journal import Journal, Outcome
from onnxcollapse.rewriting.notes import Notes
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.passes import Pass, blamed, offers_of, sites_of
from onnxcollapse.rewriting.pricing import Pricer
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Decline, Proposal
from onnxcollapse.rewriting.search import NEAR, Search, Trial, marginal
from onnxcollapse.rewriting.selection import Candidate, admit, ranked
from onnxcollapse.verification import FinalState, Verifier

logger = logging.getLogger(__name__)

MAX_ROUNDS = 12


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why the last group was rolled back, its error on the held-out part where it could be measured, and the group."""

    reason: str = ""
    error: float | None = None
    tried: tuple[Candidate, ...] = ()


class LossyStage:
    """Runs lossy passes on a model in place, under a budget.

    Args:
        model: Edited in place.
        passes: Lossy passes; the order decides between equals only.
        data: Calibration data with a fit and a held-out part.
        verifier: Measures the error against the model that the user gave.
        budget: What is accepted and wanted.
        journal: Receives every outcome.
        extents: How large models are, and what is missing to the target.
        plan: Where models are cut to be run.
        provider: Where statistics are computed.
        progress: Told how far the work is.
        opening: Where the first round's prices are kept for runs to other shares.
        check: Raises ModelError for a model that is not to be kept, whatever its error.

    Attributes:
        error: Of the model as it is, once it ran.
        changed: Whether anything was kept.
        gone: Names of the tensors of whole layers that have left.
    """

    def __init__(
        self,
        model: Model,
        passes: Sequence[Pass],
        data: Dataset,
        verifier: Verifier,
        budget: Budget,
        journal: Journal,
        *,
        extents: Extents,
        plan: Plan,
        provider: str = "auto",
        progress: Progress | None = None,
        opening: Opening | None = None,
        check: Callable[[Model], None] | None = None,
    ) -> None:
        self._model = model
        self._check = check or (lambda model: None)
        self._opening = opening or Opening()
        self._passes = [item for item in passes if not item.repairs]
        self._repairs = [item for item in passes if item.repairs]
        self._data, self._provider = data, provider
        self._done: dict[tuple[str, str, str], Proposal] = {}
        self._verifier = verifier
        self._budget = budget
        self._journal, self._notes = journal, Notes(journal)
        self._plan = plan
        self._progress = progress or Progress()
        self._fitter = Fitter(model.alone().clone(), data, plan, provider, self._progress)
        self._extents = extents
        self._refused: set[tuple[tuple[str, str, str], frozenset[str]]] = set()
        self._offered: dict[tuple[str, str, frozenset[str]], frozenset[Any]] = {}
        self._waiting: dict[tuple[str, str, str], Candidate] = {}
        self._taken: list[Candidate] = []
        self._failure = _Failure()
        self._failures: dict[frozenset[tuple[str, str, str]], _Failure] = {}
        self._priced: list[Candidate] | None = None
        self.error = 0.0
        self.changed = False
        self.gone: frozenset[str] = frozenset()
        self._gone_before = self.gone

    def run(self) -> None:
        """Runs rounds until none can keep more or the target is reached."""
        self.error = self._opening.once("error", lambda: self._verifier.error(self._model))
        for item in self._passes:
            if item.searches:
                self._follow(item)
        for number in range(MAX_ROUNDS):
            if not self._passes or self._missing() <= 0 or self._spent() or not self._round(number):
                break
        done = {other.key[:2] for other in self._taken}
        for candidate in [other for key, other in self._waiting.items() if key[:2] not in done]:
            self._note(candidate, "declined", self._why_passed_over(candidate))
        self._notes.idle(self._repairs, changed=self.changed)

    def look(self) -> list[Candidate]:
        """What the passes offer for the model as it is, priced; nothing is applied."""
        return self._first(self._model.clone())

    def _follow(self, maker: Pass) -> None:
        """Applies what a pass has found by a search of its own, as much of it as the budget allows."""
        with blamed(maker):
            planned = maker.plan(self._model, FinalState(self._model, self._data, self._provider))
        count = len(planned)
        while count:
            trial = self._model.clone()
            for proposal in planned[:count]:
                apply(trial, maker, proposal)
            error = self._verifier.error(trial)
            if error <= self._budget.cap and self._is_sound(trial):
                self._model.become(trial)
                self.error = error
                self.changed = self._fitter.changed = True
                self.gone = self.gone.union(*(proposal.gone for proposal in planned[:count]))
                break
            count //= 2
        self._notes.searched(maker, planned, count, self.error, self._budget.cap)

    def _is_sound(self, trial: Model) -> bool:
        try:
            self._check(trial)
        except ModelError as problem:
            logger.warning("rolled back: %s", problem)
            return False
        return True

    def _spent(self) -> bool:
        """Whether what was kept has used up the budget."""
        return self.changed and self._budget.target is None and self.error >= NEAR * self._budget.cap

    def _missing(self) -> float:
        """How much still has to be saved for the target; infinite without one, so that all that fits is saved."""
        return self._extents.missing(self._model)

    # One round

    def _round(self, number: int) -> bool:
        """Prices, chooses and applies; returns whether another round has something new to look at."""
        start = self._model.clone()
        self._notes.begin()
        self._gone_before = self.gone
        self._done = {}
        priced = self._priced_anew(start, number)
        self._waiting |= {candidate.key: candidate for candidate in priced}
        refused, kept = len(self._refused), list[Candidate]()

        def attempt(group: Sequence[Candidate]) -> bool:
            trial, _ = self._attempted(start, [*kept, *group])
            if trial is None:
                return False
            self._keep(trial)
            kept.extend(group)
            return True

        for candidate in ranked([item for item in priced if item.maker.on_request]):
            admit([candidate], attempt, self._roll_back)
        rest = [item for item in priced if not item.maker.on_request]
        self._failure = _Failure()
        told = any(item.proposal.cost is not None for item in rest)
        metric = None if told else self._verifier.pricing_metric
        search = Search(start, kept, rest, self._budget, self._extents, self._attempted, metric)
        found = search.run(0.0 if told else self._priced_error()) if self._missing() > 0 else None
        if found is not None:
            self._keep(found)
            kept = list(found.chosen)
        elif self._failure.tried:
            admit(ranked(self._failure.tried, self._measure), attempt, self._roll_back)
        self._note_savings(start, kept)
        self._priced = None if kept else priced
        return bool(kept) or len(self._refused) > refused

    def _priced_anew(self, start: Model, number: int) -> list[Candidate]:
        """Prices candidates; behind a round that kept nothing all is known already, and some of it is refused."""
        if self._priced is not None:
            return [item for item in self._priced if (item.key, item.nodes) not in self._refused]
        self._failures = {}
        return self._price(start, self._candidates(start), number) if number else self._first(start)

    def _priced_error(self) -> float:
        """The error of the model as it is, in the metric of prices."""
        if self._verifier.pricing_metric == self._verifier.metric:
            return self.error
        return self._verifier.pricing_error(self._model) if self.changed else 0.0

    def _first(self, start: Model) -> list[Candidate]:
        """Prices the first round, which every share of one measure begins with."""

        def look() -> tuple[list[Candidate], dict[Any, Any], set[Any]]:
            priced = self._price(start, self._candidates(start), 0)
            return priced, dict(self._offered), set(self._refused)

        priced, offered, refused = self._opening.noted("round 1", self._journal, look)
        self._offered |= offered
        self._refused |= refused
        return list(priced)

    def _attempted(self, start: Model, chosen: Sequence[Candidate]) -> tuple[Trial | None, float | None]:
        """Builds and measures a selection: the trial where it is inside the budget, and the error where it has one.

        What failed once of a model is not built again.
        """
        selection = frozenset(item.key for item in chosen)
        if selection not in self._failures:
            trial = self._attempt(start, chosen)
            if trial is not None and self._fits(trial):
                return trial, trial.error
            self._failures[selection] = self._failure
        self._failure = self._failures[selection]
        return None, self._failure.error

    @property
    def _measure(self) -> str:
        return self._extents.measure

    def _candidates(self, model: Model) -> list[Candidate]:
        """Asks every pass for its sites and, after one run for all their statistics, for its proposals."""
        order = {node: index for index, node in enumerate(model.graph)}
        places = [place for item in self._passes for place in self._places(item, model, order)]
        found = []
        for place, statistics in self._fitter.statistics(model, places):
            if isinstance(statistics, Decline):
                self._notes.declined(place.maker, statistics)
                continue
            offers = []
            for offer in offers_of(place.maker, place.site, statistics):
                if isinstance(offer, Decline):
                    self._notes.declined(place.maker, offer)
                else:
                    offers.append(place.candidate(offer))
            self._offered[place.key] = frozenset((item.key, item.nodes) for item in offers)
            found += [item for item in offers if (item.key, item.nodes) not in self._refused]
        return found

    def _places(self, item: Pass, model: Model, order: dict[ir.Node, int]) -> Iterator[Place]:
        """Finds a pass's sites but for those that were refused already and have not changed since."""
        if item.on_request and self._journal.knows(item.describe()):
            return  # applied or refused already, and meant to run once
        for site in sites_of(item, model):
            if isinstance(site, Decline):
                self._notes.declined(item, site)
                continue
            place = Place.of(item, site, order)
            offered = self._offered.get(place.key)
            if offered is None or offered - self._refused:
                yield place

    def _price(self, start: Model, candidates: list[Candidate], number: int) -> list[Candidate]:
        """Measures what candidates save and cost at the outputs; those that are not wanted end here."""
        pricer = Pricer(
            start, self._data, self._verifier, self._budget, self._plan, self._provider, self._extents
        )
        priced = []
        for price in pricer.price(candidates, self._progress, f"round {number + 1}: pricing"):
            if price.objection is None:
                priced.append(price.candidate)
            else:
                self._refuse(price.candidate, "declined", price.objection)
        return priced

    def _attempt(self, start: Model, chosen: Sequence[Candidate]) -> Trial | None:
        """Builds the model with the chosen, fitted anew, and measures it; None where that cannot be done."""
        try:
            model, done = self._fitter.realize(start, chosen)
            error = self._verifier.error(model)
            model, error, repaired = self._repair(model, error, chosen)
            self._check(model)
        except (DataError, MetricError, ModelError) as problem:
            reason = f"together with what was kept before it: {problem}"
            self._failure = _Failure(reason, None, tuple(chosen))
            return None
        logger.info("%d rewrites together: error %.4g", len(chosen), error)
        return Trial(model, tuple(chosen), done, error, tuple(repaired))

    def _repair(
        self, model: Model, error: float, chosen: Sequence[Candidate]
    ) -> tuple[Model, float, list[tuple[Pass, Proposal]]]:
        """Lets passes that repair lower the error; a model that they do not help stays as it is."""
        if not self._repairs or not error > 0.0 or not math.isfinite(error):
            return model, error, []
        try:
            repaired, done = self._fitter.repair(model, self._repairs, chosen)
            after = self._verifier.error(repaired) if done else math.inf
        except (DataError, MetricError, ModelError) as problem:
            logger.warning("nothing is repaired: %s", problem)
            return model, error, []
        logger.info("%d projections refitted: error %.4g -> %.4g", len(done), error, after)
        return (repaired, after, done) if after < error else (model, error, [])

    def _fits(self, trial: Trial) -> bool:
        """Whether the error is inside the budget; notes why not."""
        if trial.error <= self._budget.cap:
            return True
        held_out = f"with what was kept before it the held-out error is {trial.error:.4g}"
        reason = f"{held_out}, over the budget of {self._budget.cap:g}"
        self._failure = _Failure(reason, trial.error, trial.chosen)
        return False

    def _keep(self, trial: Trial) -> None:
        """Makes a trial the model and notes what is new in it, and how what was kept before is fitted now."""
        new = [item for item in trial.chosen if item.key not in self._done]
        self._taken.extend(new)
        self._model.become(trial.model)
        self.changed = self._fitter.changed = True
        self.error = trial.error
        self.gone = self._gone_before.union(*(proposal.gone for proposal in trial.done.values()))
        for candidate in new:
            proposal = trial.done[candidate.key]
            refitted = dataclasses.replace(candidate, proposal=proposal)
            self._note(refitted, "kept", proposal.detail, trial.error)
        self._notes.fitted(trial.done)
        self._done = dict(trial.done)
        self._notes.repaired(self._repairs, trial.repaired, trial.error)

    def _note_savings(self, start: Model, kept: Sequence[Candidate]) -> None:
        """Lets the entries of what a round kept say what each saved: alone, neighbours count what they share twice."""
        try:
            savings = marginal(start, kept, self._done, self._extents) if len(kept) > 1 else {}
        except ModelError as problem:
            logger.debug("savings are those of each alone: %s", problem)
            return
        self._notes.saved(savings)

    def _roll_back(self, candidate: Candidate) -> None:
        self._refuse(candidate, "rolled-back", self._failure.reason, self._failure.error)

    def _refuse(
        self, candidate: Candidate, outcome: Outcome, reason: str, error: float | None = None
    ) -> None:
        """Notes a candidate's end; it is not tried again unless its site changes."""
        self._refused.add((candidate.key, candidate.nodes))
        self._note(candidate, outcome, reason, error)

    def _why_passed_over(self, candidate: Candidate) -> str:
        """Says why a candidate that could have been kept was not tried in the end."""
        for other in self._taken:
            if other.nodes & candidate.nodes:
                what = f"'{other.proposal.variant}' at '{other.proposal.site}'".removeprefix("'' at ")
                return f"alone it fits, but {what} was kept instead"
        if self._budget.target is None:
            return "alone it fits, but beside what was kept the budget has no room for it"
        met = self._missing() <= 0
        return "alone it fits, but " + (
            "the target was reached without it" if met else "the rounds ended first"
        )

    def _note(self, candidate: Candidate, outcome: Outcome, reason: str, error: float | None = None) -> None:
        self._waiting.pop(candidate.key, None)
        self._notes.candidate(candidate, outcome, reason, error)
