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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcollapse.calibration import Dataset, Plan
from onnxcollapse.errors import DataError, MetricError, ModelError
from onnxcollapse.model import Model
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.extents import Extents
from onnxcollapse.rewriting.fitting import Fitter, Place, apply
from onnxcollapse.rewriting.journal import Entry, Journal, Outcome
from onnxcollapse.rewriting.passes import Pass, offers_of, sites_of
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Decline, Proposal, Saving
from onnxcollapse.rewriting.selection import (
    Candidate,
    admit,
    affordable,
    most_saving,
    node_key,
    ranked,
    reaching,
)
from onnxcollapse.verification import States, Verifier

logger = logging.getLogger(__name__)

PRICE_SAMPLES = 64
"""Held-out samples on which a candidate's effect at the outputs is measured. The fit part would flatter fits with few
rows, and the measurement only orders candidates and leaves out hopeless ones."""

MAX_ROUNDS = 12


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why the last group was rolled back, and its error on the held-out part where it could be measured."""

    reason: str = ""
    error: float | None = None


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
    ) -> None:
        self._model = model
        self._passes = passes
        self._verifier = verifier
        self._budget = budget
        self._journal = journal
        self._plan = plan
        self._progress = progress or Progress()
        self._fitter = Fitter(model.clone(), data, plan, provider, self._progress)
        self._extents = extents
        self._refused: set[tuple[tuple[str, str, str], frozenset[str]]] = set()
        self._offered: dict[tuple[str, str, frozenset[str]], frozenset[Any]] = {}
        self._waiting: dict[tuple[str, str, str], Candidate] = {}
        self._taken: list[Candidate] = []
        self._failure = _Failure()
        self._began = 0
        self.error = verifier.error(model)
        self.changed = False

    def run(self) -> None:
        """Runs rounds until none can keep more or the target is reached."""
        for number in range(MAX_ROUNDS):
            if not self._passes or self._missing() <= 0 or not self._round(number):
                break
        done = {other.key[:2] for other in self._taken}
        for candidate in [other for key, other in self._waiting.items() if key[:2] not in done]:
            self._note(candidate, "declined", self._why_passed_over(candidate))

    def _missing(self) -> float:
        """How much still has to be saved for the target; infinite without one, so that all that fits is saved."""
        return self._extents.missing(self._model)

    # One round

    def _round(self, number: int) -> bool:
        """Prices, chooses and applies; returns whether another round has something new to look at."""
        start, self._began = self._model.clone(), len(self._journal.entries)
        priced = self._price(start, self._candidates(start), number)
        self._waiting |= {candidate.key: candidate for candidate in priced}
        measure = self._extents.measure
        queue = ranked(priced, measure)
        if sum(candidate.saving.of(measure) for candidate in queue) < self._missing() < math.inf:
            queue = most_saving(priced, measure)
        kept: list[Candidate] = []

        def attempt(group: Sequence[Candidate]) -> bool:
            return self._attempt(start, kept, group)

        refused = len(self._refused)
        for group in self._groups(queue, measure):
            admit(group, attempt, self._roll_back)
            if self._missing() <= 0:
                break
        passed_over = len(queue) < len(priced)  # excluded by others, some of which may have failed
        return bool(kept) or (passed_over and len(self._refused) > refused)

    def _groups(self, queue: list[Candidate], measure: str) -> Iterable[list[Candidate]]:
        """Splits the queue: first what should do, then the rest one by one, in case there is room left."""
        if self._budget.target is None:
            first = affordable(queue, self._budget.cap - self.error)
        else:
            first = reaching(queue, measure, self._missing())
        yield first
        for candidate in queue[len(first) :]:
            yield [candidate]

    def _candidates(self, model: Model) -> list[Candidate]:
        """Asks every pass for its sites and, after one run for all their statistics, for its proposals."""
        order = {node: index for index, node in enumerate(model.graph)}
        places = [place for item in self._passes for place in self._places(item, model, order)]
        found = []
        for place, statistics in self._fitter.statistics(model, places):
            offers = []
            for offer in offers_of(place.maker, place.site, statistics):
                if isinstance(offer, Decline):
                    self._decline(place.maker, offer)
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
                self._decline(item, site)
                continue
            nodes = [node for node in site.nodes if node in order]
            first = min((order[node] for node in nodes), default=0)
            tensors = frozenset(value.name or "" for node in nodes for value in node.outputs)
            place = Place(item, site, first, frozenset(map(node_key, nodes)), tensors)
            offered = self._offered.get(place.key)
            if offered is None or offered - self._refused:
                yield place

    def _price(self, start: Model, candidates: list[Candidate], number: int) -> list[Candidate]:
        """Applies each candidate alone and measures what it saves and what it costs at the outputs.

        Only what lies behind the candidate's layer runs. Variants of a site that fit worse than one that broke the
        budget are not run: the error at the site ranks variants of one site.
        """
        priced, whole = [], self._extents.of(start)
        broke: dict[tuple[str, str], float] = {}
        with (
            self._progress.task(f"round {number + 1}: pricing", len(candidates)) as task,
            self._verifier.states(start, self._plan.points, limit=PRICE_SAMPLES) as states,
        ):
            for candidate in candidates:
                task.advance()
                place, predicted = candidate.key[:2], candidate.proposal.predicted_error
                if predicted >= broke.get(place, math.inf):
                    unmeasured = dataclasses.replace(candidate, impact=math.inf)
                    self._refuse(
                        unmeasured, "declined", "a variant with less error at the site breaks the budget"
                    )
                    continue
                reason, saving, impact = self._trial(start, whole, candidate, states)
                tried = dataclasses.replace(candidate, saving=saving, impact=impact)
                if reason is None:
                    priced.append(tried)
                    continue
                self._refuse(tried, "declined", reason)
                if math.isfinite(impact):
                    broke[place] = min(predicted, broke.get(place, math.inf))
        return priced

    def _trial(
        self, start: Model, whole: Saving, candidate: Candidate, states: States
    ) -> tuple[str | None, Saving, float]:
        trial = start.clone()
        try:
            apply(trial, candidate.maker, candidate.proposal)
        except ModelError as error:
            return str(error), Saving(), math.inf
        saving = self._extents.saving(start, whole, trial, candidate)
        objection = self._objection(candidate.maker, saving)
        if objection is not None:
            return objection, saving, math.inf
        try:
            impact = self._verifier.error_from(states, states.place(candidate.tensors), trial)
        except (MetricError, ModelError) as error:
            return str(error), saving, math.inf  # an output is another one, or no runtime takes the model
        if not math.isfinite(impact):
            return "its error at the outputs is not finite", saving, impact
        if impact > self._budget.cap:
            return (
                f"alone it moves the outputs by {impact:.4g}, over the budget of {self._budget.cap:g}",
                saving,
                impact,
            )
        return None, saving, impact

    def _objection(self, maker: Pass, saving: Saving) -> str | None:
        """Says why a rewrite with this saving is not wanted, or None."""
        if maker.on_request:
            return None
        target = self._budget.target
        if target is not None and saving.of(target.measure) <= 0:
            return f"saves no {target.measure}, which the target names"
        return saving.objection()

    def _attempt(self, start: Model, kept: list[Candidate], group: Sequence[Candidate]) -> bool:
        """Builds the model with what was kept and the group, and keeps it when the held-out error fits."""
        try:
            trial, done = self._fitter.realize(start, [*kept, *group])
            error = self._verifier.error(trial)
        except (DataError, MetricError, ModelError) as problem:
            self._failure = _Failure(f"together with what was kept before it: {problem}")
            return False
        if not error <= self._budget.cap:
            logger.info("%d rewrites together: error %.4g, rolled back", len(kept) + len(group), error)
            held_out = f"with what was kept before it the held-out error is {error:.4g}"
            self._failure = _Failure(f"{held_out}, over the budget of {self._budget.cap:g}", error)
            return False
        kept.extend(group)
        self._taken.extend(group)
        self._model.ir = trial.ir
        self.changed = self._fitter.changed = True
        self.error = error
        for candidate in group:
            proposal = done[candidate.key]
            self._note(dataclasses.replace(candidate, proposal=proposal), "kept", proposal.detail, error)
        self._note_new_fits(done)
        return True

    def _note_new_fits(self, done: Mapping[tuple[str, str, str], Proposal]) -> None:
        """Lets the entries of what this round kept before say how it was fitted in the end."""
        entries = self._journal.entries
        for index, entry in enumerate(entries[self._began :], self._began):
            proposal = done.get((entry.pass_name, entry.site, entry.variant))
            if proposal is not None and entry.outcome == "kept":
                entries[index] = dataclasses.replace(
                    entry, reason=proposal.detail, predicted_error=proposal.predicted_error
                )

    def _decline(self, item: Pass, decline: Decline) -> None:
        self._journal.add(Entry("declined", item.describe(), decline.site, reason=decline.reason))

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
        met = self._missing() <= 0
        return "alone it fits, but " + (
            "the target was reached without it" if met else "the rounds ended first"
        )

    def _note(self, candidate: Candidate, outcome: Outcome, reason: str, error: float | None = None) -> None:
        self._waiting.pop(candidate.key, None)
        maker, site, variant = candidate.key
        predicted = candidate.proposal.predicted_error
        impact = candidate.impact if math.isfinite(candidate.impact) else None
        self._journal.add(
            Entry(outcome, maker, site, variant, reason, predicted, impact, error, candidate.saving)
        )
