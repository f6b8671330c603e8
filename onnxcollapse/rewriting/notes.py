# SPDX-License-Identifier: Apache-2.0
"""What the lossy stage writes in the journal: entries of a round are put right while it goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from onnxcollapse.rewriting.journal import Entry, Journal, Outcome
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.proposal import Decline, Proposal, Saving
from onnxcollapse.rewriting.selection import Candidate

T = TypeVar("T")
Key = tuple[str, str, str]


class Notes:
    """Writes down what became of candidates.

    Args:
        journal: Where.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._began = 0

    def begin(self) -> None:
        """A round begins; entries before it are left alone from now on."""
        self._began = len(self._journal.entries)

    def candidate(self, item: Candidate, outcome: Outcome, reason: str, error: float | None = None) -> None:
        """Notes what became of a candidate, and the error of the model with it."""
        maker, site, variant = item.key
        impact = item.impact if math.isfinite(item.impact) else None
        predicted = item.proposal.predicted_error
        self._journal.add(Entry(outcome, maker, site, variant, reason, predicted, impact, error, item.saving))

    def declined(self, maker: Pass, decline: Decline) -> None:
        """Notes that a pass leaves a site as it is."""
        self._journal.add(Entry("declined", maker.describe(), decline.site, reason=decline.reason))

    def searched(
        self, maker: Pass, planned: Sequence[Proposal], count: int, error: float, cap: float
    ) -> None:
        """Notes what a pass found by a search of its own, of which the first `count` were kept."""
        name = maker.describe()
        for place, item in enumerate(planned):
            outcome: Outcome = "kept" if place < count else "rolled-back"
            reason = item.detail if place < count else f"{item.detail}; over the budget of {cap:g}"
            self._journal.add(
                Entry(outcome, name, item.site, item.variant, reason, item.predicted_error, None, error)
            )
        if not planned:
            self._journal.add(Entry("declined", name, "graph", reason="its own search accepted nothing"))

    def repaired(self, makers: Iterable[Pass], done: Sequence[tuple[Pass, Proposal]], error: float) -> None:
        """Notes what was refitted; a later selection of the same round begins anew, and so do its repairs."""
        entries, names = self._journal.entries, {item.describe() for item in makers}
        entries[self._began :] = [e for e in entries[self._began :] if e.pass_name not in names]
        for maker, proposal in done:
            predicted, site = proposal.predicted_error, proposal.site
            self._journal.add(
                Entry("kept", maker.describe(), site, "", proposal.detail, predicted, None, error)
            )

    def idle(self, makers: Iterable[Pass], *, changed: bool) -> None:
        """Says of each pass that repairs and did nothing why that is."""
        nothing = "nothing lossy was kept that it could repair; run it beside passes that save something"
        for maker in makers:
            name = maker.describe()
            if all(entry.pass_name != name for entry in self._journal.of("kept")):
                reason = "refitting lowered the error nowhere" if changed else nothing
                self._journal.add(Entry("declined", name, "graph", reason=reason))

    def fitted(self, done: Mapping[Key, Proposal]) -> None:
        """Lets the entries of what this round kept before say how it was fitted in the end."""

        def anew(entry: Entry, proposal: Proposal) -> Entry:
            return dataclasses.replace(
                entry, reason=proposal.detail, predicted_error=proposal.predicted_error
            )

        self._change(done, anew)

    def saved(self, savings: Mapping[Key, Saving]) -> None:
        """Lets the entries of what this round kept say what each saved behind those before it."""

        def anew(entry: Entry, saving: Saving) -> Entry:
            return dataclasses.replace(
                entry, saving=dataclasses.replace(saving, latency=entry.saving.latency)
            )

        self._change(savings, anew)

    def _change(self, known: Mapping[Key, T], anew: Callable[[Entry, T], Entry]) -> None:
        entries = self._journal.entries
        for index, entry in enumerate(entries[self._began :], self._began):
            found = known.get((entry.pass_name, entry.site, entry.variant))
            if found is not None and entry.outcome == "kept":
                entries[index] = anew(entry, found)
