# SPDX-License-Identifier: Apache-2.0
"""What was tried, kept, rolled back and left alone, and why; the report and the tests read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from onnxcollapse.rewriting.proposal import Saving

Outcome = Literal["kept", "declined", "rolled-back"]


def plain(value: Any, digits: int | None = None) -> Any:
    """Makes plain JSON types: numbers of numpy become Python's, and those that JSON has no word for text.

    Args:
        value: Anything made of dicts, lists, tuples, texts and numbers.
        digits: Significant digits to round floats to, so that a journal shows what is meant and not the last
            bit; None for all.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    return value


DIGITS = 6
"""Significant digits of the floats in a journal."""


@dataclass(frozen=True)
class Entry:
    """One thing that happened to one site.

    Attributes:
        outcome: ``kept``, ``declined`` (left as it was) or ``rolled-back`` (tried and undone).
        pass_name: The pass with its options as `Pass.describe` gives them.
        site: Name of the site.
        variant: Which alternative of the site.
        reason: Why; for what was kept, what was done.
        predicted_error: Relative error at the site itself, in closed form on held-out statistics.
        impact: Error at the outputs of this rewrite alone on some held-out samples; None if not measured.
        error: Error at the outputs on the held-out part once it was applied with all before it; None likewise.
        saving: What it took away: where it was kept, measured behind all that was kept before it, so that savings add
            up; else measured by applying it alone, or estimated from variants of its site that were measured. Of exact
            rewrites that were applied as a group, what the pass predicted for each. Latency is that of it alone.
    """

    outcome: Outcome
    pass_name: str
    site: str
    variant: str = ""
    reason: str = ""
    predicted_error: float = 0.0
    impact: float | None = None
    error: float | None = None
    saving: Saving = field(default_factory=Saving)

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as plain JSON types."""
        record = asdict(self)
        record["pass"] = record.pop("pass_name")
        if not self.saving.latency:
            del record["saving"]["latency"]  # it was not measured
        return dict(sorted(plain(record, DIGITS).items()))


@dataclass
class Journal:
    """All entries in the order in which they happened.

    Holds no times, so that equal runs give equal journals, unless latency is what is to be saved.

    Attributes:
        facts: What the run was about: model, data, split, metric, budget, providers asked for and obtained.
    """

    entries: list[Entry] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Appends an entry, unless it only repeats a decline word for word."""
        if not (entry.outcome == "declined" and entry in self.entries):
            self.entries.append(entry)

    def knows(self, pass_name: str) -> bool:
        """Whether a pass, named as `Pass.describe` does, has left an entry."""
        return any(entry.pass_name == pass_name for entry in self.entries)

    def of(self, outcome: Outcome) -> list[Entry]:
        """Returns the entries with one outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns facts and entries as plain JSON types."""
        return {"facts": plain(self.facts, DIGITS), "entries": [entry.to_dict() for entry in self.entries]}

    def to_json(self) -> str:
        """Returns the journal as an indented JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
