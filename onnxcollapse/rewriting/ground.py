# SPDX-License-Identifier: Apache-2.0
"""What every look at a model stands on: the graph that is read, its data, where it is cut, and who measures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnxcollapse.calibration import Dataset, Plan, plan
from onnxcollapse.model import Model, walk
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.exact import ExactStage
from onnxcollapse.rewriting.extents import Extents
from onnxcollapse.rewriting.journal import Journal
from onnxcollapse.rewriting.lossy import LossyStage
from onnxcollapse.rewriting.merged import Merged
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.verification import Verifier


class Ground:
    """A model that the user gave, made ready for the two stages.

    Args:
        given: The user's model.
        data: Calibration data for it; None without any.
        budget: What is accepted and wanted.
        passes: Those that will run.
        provider: Where calibration and measurement run.
        memory: Bytes of resident memory to stay under; None for half of what is free.
        opening: Shared by runs that differ in the target's share only.

    Attributes:
        merged: The branches of a merged decoder; None for other models.
        model: What is rewritten: the model given, or the branch without a cache.
        data: The data for that, in batches that fit.
        cuts: Where the model is cut to be run in parts; nowhere where memory suffices.
        tolerance: The error that reassociated arithmetic alone explains.
        extents: Measures what is saved.
        verifier: Measures errors; None without data.

    Raises:
        OnnxCollapseError: Model, data, metric or provider cannot be used.
    """

    def __init__(
        self,
        given: Model,
        data: Dataset | None,
        budget: Budget,
        passes: Sequence[Pass],
        provider: str,
        memory: int | None,
        opening: Opening,
    ) -> None:
        self.tolerance = _tolerance(given)
        self.merged = Merged.of(given, data, provider, self.tolerance)
        self.model = given if self.merged is None else self.merged.lead
        self._provider, self._memory, self._opening, self._budget = provider, memory, opening, budget
        measure = budget.target.measure if budget.target else None
        whole_data = data
        if data is not None:
            data.count("heldout")  # too little data to be split fails here and not after the work
            data = data if self.merged is None else data.fed_to(self.model)
        opening.claim(given, whole_data, budget.error, budget.metric, measure, list(passes), provider, memory)
        running: Plan | None = None
        if data is not None:
            fed = data
            running = opening.once("plan", lambda: plan(self.model, memory, fed))
            data = data.in_batches_of(running.batch)
        self.data = data
        self.cuts: Sequence[str] = () if running is None else running.cuts
        self.extents = Extents(self.model, budget.target, data, provider)
        self.verifier = None if running is None else self._verifier(running.measuring)

    def exact_stage(
        self, work: Model, passes: Sequence[Pass], journal: Journal, verifier: Verifier | None = None
    ) -> ExactStage:
        """The exact stage on a copy of the model.

        Args:
            work: The copy, edited in place.
            passes: Exact passes.
            journal: Receives every outcome.
            verifier: Measures against the copy as it is, where it is not the model any more.
        """
        reference, against = self.model, self.verifier
        beside: Verifier | None = self.verifier
        if verifier is not None:
            # A third session beside those of the two models is for where memory is no matter.
            reference, against, beside = work, verifier, None if self.cuts else self.verifier
        measured = _exactness(reference, against, beside)
        return ExactStage(work, passes, journal, measured, self.tolerance)

    def tidy(self, work: Model, passes: Sequence[Pass], journal: Journal) -> None:
        """Runs exact passes on what follows a copy."""
        if self.merged is not None:
            self.merged.tidy(work, passes, journal)

    def lossy_stage(
        self, work: Model, passes: Sequence[Pass], journal: Journal, progress: Progress | None
    ) -> LossyStage | None:
        """The lossy stage on a copy of the model; None without data, or where no pass needs one."""
        if self.data is None or self.verifier is None or not passes:
            return None
        return LossyStage(
            work,
            passes,
            self.data,
            self.verifier,
            self._budget,
            journal,
            extents=self.extents,
            plan=self.work_plan(work),
            provider=self._provider,
            progress=progress,
            opening=self._opening,
            check=None if self.merged is None else self.merged.check,
        )

    def work_plan(self, work: Model) -> Plan:
        """Where a copy is cut to be read and priced."""
        return self._opening.once("lossy plan", lambda: plan(work, self._memory))

    def _verifier(self, cuts: Sequence[str]) -> Verifier | None:
        data = self.data
        if data is None:
            return None
        return self._opening.once(
            "verifier", lambda: Verifier(self.model, data, self._budget.metric, self._provider, cuts)
        )


def _tolerance(model: Model) -> float:
    """Returns the error at the outputs that reassociated arithmetic alone explains in the model's narrowest type."""
    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return 1e-2 if any(tensor.dtype in narrow for tensor in walk.tensors(model.ir)) else 1e-4


def _exactness(
    model: Model, verifier: Verifier | None, beside: Verifier | None = None
) -> Callable[[Model], float] | None:
    """Returns what measures exact rewrites: relative L2 where an output is a float, whatever the budget's metric.

    Args:
        model: What they are to keep the function of.
        verifier: Measures against it; None without data.
        beside: Measures what will be asked next of the model that is left, and does so in the same run.
    """
    if verifier is None:
        return None
    floating = any(
        spec.dtype is not None and spec.dtype.is_floating_point() for spec in model.signature().outputs
    )
    return functools.partial(verifier.distance, beside=beside) if floating else verifier.error
