# SPDX-License-Identifier: Apache-2.0
"""The whole way from a model to a smaller one: exact stage, lossy stage, exact stage again, final measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxcollapse.calibration import Dataset
from onnxcollapse.calibration.providers import chain, options_of
from onnxcollapse.errors import BudgetNotMetError
from onnxcollapse.model import Model, Size, flops, provenance, size
from onnxcollapse.rewriting.budget import Budget, Target
from onnxcollapse.rewriting.extents import LATENCY
from onnxcollapse.rewriting.ground import Ground
from onnxcollapse.rewriting.journal import Entry, Journal
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.registry import defaults
from onnxcollapse.rewriting.settling import settle
from onnxcollapse.rewriting.storage import shared_weights
from onnxcollapse.rewriting.transaction import extent
from onnxcollapse.verification import Verifier

UNMEASURED = "there is no data, or the model cannot be told to decode"
NEEDS_DATA = "needs calibration data: give --calib to have its effect predicted and measured"

MORE_OPERATORS = (
    "the rewrites leave {} more operators than there were: with small batches a GPU spends its time on launching them, "
    "and fewer FLOPs may then take longer; `onnxcollapse bench` tells, and a target of latency goes by what it measures"
)


@dataclass
class Result:
    """A smaller model and everything that is known about how it came about.

    Attributes:
        model: The rewritten model; the one given is untouched.
        journal: What was kept, declined and rolled back, and why.
        error: Error at the outputs on the held-out part; None without data.
        met: Whether budget and target were met.
        before: Size of the model given.
        after: Size of the rewritten model.
        flops_before: FLOPs of one calibration sample; dynamic dimensions are 1 without data.
        flops_after: Likewise.
        provider: Execution provider that measured; empty when nothing was.
        seconds: Wall time.
        notes: What else the user should know.
        latency: Median seconds of one sample before and after, measured in turns; None unless the target names it.
    """

    model: Model
    journal: Journal
    budget: Budget
    error: float | None
    met: bool
    before: Size
    after: Size
    flops_before: int
    flops_after: int
    provider: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    latency: tuple[float, float] | None = None

    def extent(self, measure: str) -> tuple[float, float]:
        """Returns ``params``, ``bytes``, ``flops`` or ``latency`` before and after."""
        if measure == LATENCY:
            return self.latency or (math.nan, math.nan)
        if measure == "flops":
            return self.flops_before, self.flops_after
        return getattr(self.before, measure), getattr(self.after, measure)

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary that ``--json`` prints, as plain JSON types."""
        return {
            "params_before": self.before.params,
            "params_after": self.after.params,
            "bytes_before": self.before.bytes,
            "bytes_after": self.after.bytes,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            **dict(zip(("latency_before", "latency_after"), self.latency or (None, None), strict=True)),
            "metric": self.budget.metric,
            "error": self.error,
            "budget": self.budget.error,
            "target": str(self.budget.target) if self.budget.target else None,
            "met": self.met,
            "provider": self.provider,
            "seconds": round(self.seconds, 3),
            "rewrites": [
                {
                    "pass": entry.pass_name,
                    "site": entry.site,
                    "variant": entry.variant,
                    "params_saved": entry.saving.params,
                    "bytes_saved": entry.saving.bytes,
                    "flops_saved": entry.saving.flops,
                    "predicted_error": entry.predicted_error,
                    "impact": entry.impact,
                    "detail": entry.reason,
                }
                for entry in self.journal.of("kept")
            ],
            "declined": [
                {
                    "pass": entry.pass_name,
                    "site": entry.site,
                    "variant": entry.variant,
                    "reason": entry.reason,
                }
                for entry in self.journal
                if entry.outcome != "kept"
            ],
            "notes": self.notes,
        }


def _journal_for(
    model: Model, data: Dataset | None, budget: Budget, passes: Sequence[Pass], seed: int
) -> Journal:
    journal = Journal()
    journal.facts = {
        "model": model.path.name if model.path else None,
        "passes": [item.describe() for item in passes],
        "metric": budget.metric,
        "budget": budget.error,
        "target": str(budget.target) if budget.target else None,
        "seed": seed,
        "data": None if data is None else {"samples": data.samples, "evidence": data.evidence},
    }
    return journal


def optimize(
    model: Model,
    data: Dataset | None = None,
    *,
    budget: Budget | None = None,
    passes: Sequence[Pass] | None = None,
    provider: str = "auto",
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
    opening: Opening | None = None,
) -> Result:
    """Makes a model smaller inside a budget; see the module for the order of things.

    Args:
        model: Left as it is.
        data: Calibration data; without it only exact rewrites run.
        budget: Largest error at the outputs and what is wanted; by default 1 % relative L2.
        passes: Those to run; by default all that are registered and need no options.
        provider: Where calibration and measurement run.
        seed: Recorded; the data was split with it.
        memory: Bytes of resident memory to stay under; by default half of what is free. A model too large for that
            runs layer by layer.
        progress: Told how far the work is.
        opening: Shared by runs that differ in the target's share only, see `frontier`.

    Returns:
        The smaller model with its journal and sizes.

    Raises:
        OnnxCollapseError: The model, data, metric or provider cannot be used.
    """
    began = time.perf_counter()
    budget = budget or Budget()
    measure = budget.target.measure if budget.target else None
    chosen = list(defaults(measure=measure) if passes is None else passes)
    exact = [item for item in chosen if item.exact]
    lossy = list(dict.fromkeys(item for item in chosen if not item.exact))
    journal = _journal_for(model, data, budget, chosen, seed)
    opening = opening or Opening()
    ground = Ground(model, data, budget, chosen, provider, memory, opening)
    merged, verifier = ground.merged, ground.verifier
    work, notes = ground.model.clone(), list[str]()
    gone: frozenset[str] = frozenset()

    def settled() -> Model:
        ground.exact_stage(work, exact, journal).run()
        ground.tidy(work, exact, journal)
        return work.clone()

    work.become(opening.noted("exact", journal, settled).clone())
    operators = size(work).nodes
    stage = ground.lossy_stage(work, lossy, journal, progress)
    if stage is not None and ground.data is not None and verifier is not None:
        stage.run()
        gone = stage.gone
        if stage.changed:
            with Verifier(work.clone(), ground.data, budget.metric, provider, verifier.cuts) as beside:
                ground.exact_stage(work, exact, journal, beside).run()
                ground.tidy(work, exact, journal)
    elif lossy:
        for item in lossy:
            journal.add(Entry("declined", item.describe(), "graph", reason=NEEDS_DATA))
        notes.append(
            "exact rewrites only: --calib DATA would let " + ", ".join(i.name for i in lossy) + " run too"
        )
    error = verifier.error(work) if verifier is not None else None
    shapes = ground.data.shapes() if ground.data is not None else None
    done = dict.fromkeys(entry.pass_name for entry in journal.of("kept"))
    made = work if merged is None else merged.join(work) if done else model.clone()
    if merged is not None and merged.gap is None and done:
        notes.append("that the branch with a cache still computes the same was not measured: " + UNMEASURED)
    warning = settle(model, made, gone) if lossy else None
    if warning is not None:
        notes.append(warning)
    if data is not None and any(item.storage and item.describe() in done for item in lossy):
        notes.append(shared_weights(model, made, None if ground.cuts else ground.data, provider))
    more = size(work).nodes - operators
    if more > 0 and measure != LATENCY:
        notes.append(MORE_OPERATORS.format(more))
    if data is not None and not data.evidence:
        notes.append("the calibration data is random: the error reached says nothing about real inputs")
    if done:
        provenance.record(made, "passes", " ".join(done))
    latency = ground.extents.latency(work)
    obtained = verifier.provider.obtained if verifier is not None else chain(provider)[0] if latency else ""
    journal.facts["provider"] = {
        "requested": provider,
        "obtained": obtained or None,
        "options": options_of(provider, obtained) if obtained else {},
    }
    result = Result(
        made,
        journal,
        budget,
        error,
        error is None or error <= max(budget.cap, ground.tolerance),
        size(model),
        size(made),
        flops(ground.model, shapes=shapes),
        extent(work, shapes).flops,
        provider=obtained,
        notes=notes,
        latency=latency,
    )
    result.met = result.met and _reaches(result, budget.target)
    result.seconds = time.perf_counter() - began
    return result


def _reaches(result: Result, target: Target | None) -> bool:
    """Whether a result is as small as the target wants it."""
    if target is None:
        return True
    before, after = result.extent(target.measure)
    return after <= target.share * before


def shortfall(result: Result) -> str | None:
    """Says what a result misses, or None when budget and target are met."""
    if result.met:
        return None
    target = result.budget.target
    wanted = f"target {target}" if target else f"budget {result.budget.error}"
    measure = target.measure if target else "params"
    before, after = result.extent(measure)
    verb = "is" if measure == LATENCY else "are"
    error = "not measured" if result.error is None else f"{result.error:.4g}"
    return (
        f"{wanted} not met: {after / before if before else 1:.1%} of the {measure} {verb} left, error {error}"
    )


def require_met(result: Result) -> None:
    """Raises `BudgetNotMetError` when a result misses its budget or target."""
    missed = shortfall(result)
    if missed is not None:
        raised = "" if result.budget.error is None else " raise the budget,"
        raise BudgetNotMetError(
            f"{missed}; ask for less,{raised} or write the best model with --allow-partial"
        )
