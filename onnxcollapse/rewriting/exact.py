# SPDX-License-Identifier: Apache-2.0
"""The exact stage: rewrites that keep the function, repeated until none is left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from onnxcollapse.errors import MetricError, ModelError
from onnxcollapse.model import Model
from onnxcollapse.rewriting.journal import Entry, Journal
from onnxcollapse.rewriting.passes import Pass, offers_of, sites_of
from onnxcollapse.rewriting.proposal import Decline, Proposal, Saving
from onnxcollapse.rewriting.selection import Candidate, admit, compatible, node_key
from onnxcollapse.rewriting.transaction import Transaction, extent

logger = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Each round only works on what the one before uncovered; real models settle after two or three."""


class ExactStage:
    """Runs exact passes on a model in place.

    Args:
        model: Edited in place.
        passes: Exact passes, in the order in which they run.
        journal: Receives what was kept and declined.
        measure: Gives the error at the outputs of a model; None without data, when nothing can be measured.
        tolerance: Largest error that rounding explains in the model's data types.
    """

    def __init__(
        self,
        model: Model,
        passes: Sequence[Pass],
        journal: Journal,
        measure: Callable[[Model], float] | None,
        tolerance: float,
    ) -> None:
        self._model = model
        self._passes = passes
        self._journal = journal
        self._measure = measure
        self._tolerance = tolerance
        self._extent = Saving()

    def run(self) -> bool:
        """Runs all passes to their fixed point; returns whether anything changed.

        The outcome is measured once at the end. Should the outputs have moved, everything is undone and done
        again with a measurement after every step, so that the rewrite that moved them is found and left out.
        """
        if not self._passes:
            return False
        snapshot, noted = self._model.clone(), len(self._journal.entries)
        self._extent = start = extent(self._model)
        changed = self._settle(verify=False)
        if changed and self._moved() is not None:
            logger.info("exact rewrites moved the outputs; repeating them one by one")
            self._model.become(snapshot)
            self._extent = start
            del self._journal.entries[noted:]
            changed = self._settle(verify=True)
        return changed

    def _moved(self) -> str | None:
        """Says how far the outputs are from the original's when that is more than rounding explains."""
        if self._measure is None:
            return None
        try:
            error = self._measure(self._model)
        except (MetricError, ModelError) as problem:
            return str(problem)  # an output has another shape, or the runtime takes the model no more
        if error <= self._tolerance:
            return None
        return f"the outputs moved by {error:.3g}, more than the {self._tolerance:g} that rounding explains"

    def _settle(self, *, verify: bool) -> bool:
        changed = False
        for _ in range(MAX_ROUNDS):
            kept = [self._run_pass(item, verify) for item in self._passes if self._has_work(item)]
            if not any(kept):
                break
            changed = True
        return changed

    def _has_work(self, item: Pass) -> bool:
        """A pass that was asked for by name runs once in all."""
        return not (item.on_request and self._journal.knows(item.describe()))

    def _run_pass(self, item: Pass, verify: bool) -> bool:
        """Applies all that one pass proposes in one transaction; halves it when that fails.

        What the pass itself does not expect to pay is applied by itself: no saving of another may hide what it costs.
        """
        kept: list[Candidate] = []
        reasons: dict[str, str] = {}

        def attempt(group: Sequence[Candidate]) -> bool:
            reason = self._apply(item, [candidate.proposal for candidate in group], verify)
            if reason is None:
                kept.extend(group)
            else:
                reasons.update({candidate.proposal.site: reason for candidate in group})
            return reason is None

        def refuse(candidate: Candidate) -> None:
            site, variant = candidate.proposal.site, candidate.proposal.variant
            self._journal.add(Entry("declined", item.describe(), site, variant, reasons[site]))

        candidates = self._candidates(item)
        paying = [candidate for candidate in candidates if candidate.proposal.saving.objection() is None]
        admit(paying, attempt, refuse)
        for candidate in candidates:
            if candidate not in paying:
                admit([candidate], attempt, refuse)
        return bool(kept)

    def _candidates(self, item: Pass) -> list[Candidate]:
        found = []
        for position, site in enumerate(sites_of(item, self._model)):
            said = [site] if isinstance(site, Decline) else offers_of(item, site, None)
            for decline in said:
                if isinstance(decline, Decline):
                    self._journal.add(Entry("declined", item.describe(), decline.site, reason=decline.reason))
            offers = [offer for offer in said if isinstance(offer, Proposal)]
            if offers and not isinstance(site, Decline):
                nodes = frozenset(map(node_key, site.nodes))
                found.append(Candidate(item, offers[0], position, nodes))
        return compatible(found)

    def _apply(self, item: Pass, proposals: list[Proposal], verify: bool) -> str | None:
        """Applies proposals in a transaction; returns why it was rolled back, or None when it was kept."""
        with Transaction(self._model) as transaction:
            try:
                item.apply(self._model, proposals)
                transaction.commit()
            except ModelError as error:
                transaction.undo()
                return str(error)
            left = extent(self._model)
            saving = self._extent - left
            reason = (None if item.on_request else saving.objection()) or (self._moved() if verify else None)
            if reason is not None:
                transaction.undo()
                return reason
        self._extent = left
        self._note(item, proposals, saving)
        return None

    def _note(self, item: Pass, proposals: list[Proposal], saving: Saving) -> None:
        for proposal in proposals:
            own = saving if len(proposals) == 1 else proposal.saving
            self._journal.add(
                Entry("kept", item.describe(), proposal.site, proposal.variant, proposal.detail, saving=own)
            )
