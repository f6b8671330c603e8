# SPDX-License-Identifier: Apache-2.0
"""What runs towards different shares of one measure have in common: everything up to the first choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from onnxcollapse.rewriting.journal import Entry, Journal

T = TypeVar("T")


class Opening:
    """Remembers what the first of several runs computed, for the others.

    The exact stage, the statistics, the proposals and the prices of the first round know the measure that a target
    names but not its share. A run by itself has an opening of its own.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._owner: tuple[Any, ...] | None = None

    def claim(self, *owner: Any) -> None:
        """Says what a run is about, which has to be the same for all that share the opening.

        Raises:
            ValueError: It is not.
        """
        if self._owner is None:
            self._owner = owner
        elif self._owner != owner:
            raise ValueError("runs that share an opening differ in more than the share; give each its own")

    def once(self, what: str, make: Callable[[], T]) -> T:
        """Makes something, or returns what a run before this one made."""
        if what not in self._known:
            self._known[what] = make()
        made: T = self._known[what]
        return made

    def noted(self, what: str, journal: Journal, make: Callable[[], T]) -> T:
        """Does `once` for what adds entries to a journal: a later run's journal gets the same entries."""
        before = len(journal.entries)

        def keep() -> tuple[T, tuple[Entry, ...]]:
            return make(), tuple(journal.entries[before:])

        made, entries = self.once(what, keep)
        if len(journal.entries) == before:
            journal.entries.extend(entries)
        return made
