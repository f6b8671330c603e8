# SPDX-License-Identifier: Apache-2.0
"""How far long work is; silent unless somebody, such as the command line, listens."""

from __future__ import annotations

from types import TracebackType


class Task:
    """One stretch of work with a known or unknown number of steps. The base class ignores what it is told."""

    def advance(self, steps: int = 1) -> None:
        """Tells that some steps are done."""

    def update(self, done: int, total: int) -> None:
        """Tells how many steps of how many are done."""

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the stretch; subclasses take their bar away here."""


class Progress:
    """Makes tasks; the base class makes silent ones."""

    def task(self, description: str, total: int) -> Task:
        """Begins a stretch of work; `total` is 0 while unknown."""
        return Task()
