# SPDX-License-Identifier: Apache-2.0
"""How large a model is in the measure that the target names; latency is measured and never inferred."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcollapse.bench import StretchTimer
from onnxcollapse.bench.stretch import Kind
from onnxcollapse.calibration import Dataset, open_data
from onnxcollapse.calibration.sessions import main_values
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model, size
from onnxcollapse.rewriting.budget import Target
from onnxcollapse.rewriting.proposal import Saving
from onnxcollapse.rewriting.transaction import extent
from onnxcollapse.structure.constants import constant
from onnxcollapse.structure.dominators import captured

if TYPE_CHECKING:
    from onnxcollapse.rewriting.selection import Candidate

logger = logging.getLogger(__name__)

LATENCY = "latency"

RESOLUTION = 0.02
"""A stretch that is faster by less than this share is not faster: medians differ by as much from run to run."""

MARGIN = 0.02
"""Rewrites are chosen until the latency is this share below the target, which a measurement of its own then decides."""


class Extents:
    """Sizes of a user's model and of those made of it.

    Args:
        original: The user's model; a target is a share of it.
        target: What is wanted; None to save as much as the budget allows.
        data: Calibration data, one sample of which is what FLOPs are counted for and latency is measured on; None for
            dynamic dimensions of 1 and drawn numbers.
        provider: Where latency is measured.
    """

    def __init__(
        self, original: Model, target: Target | None, data: Dataset | None, provider: str = "auto"
    ) -> None:
        self._original, self._target = original, target
        self._shapes = None if data is None else data.shapes()
        self._timer: StretchTimer | None = None
        if target is not None and target.measure == LATENCY:
            self._timer = StretchTimer(_sample(original, data), provider)
        self._kinds: tuple[ir.Model | None, Mapping[str, Kind]] = (None, {})
        self._whole: float | None = None

    @property
    def measure(self) -> str:
        """What is to be saved: the target's measure, or parameters."""
        return self._target.measure if self._target else "params"

    def of(self, model: Model) -> Saving:
        """Everything that is counted in a model; its latency is not, since only pairs of models are measured."""
        return extent(model, self._shapes)

    def amount(self, model: Model) -> float:
        """A model in the one measure that counts; FLOPs, which take shape inference, only where they are that."""
        if self.measure in ("params", "bytes", "nodes"):
            return float(getattr(size(model), self.measure))
        return self.of(model).of(self.measure)

    def saving(self, start: Model, whole: Saving, trial: Model, candidate: Candidate) -> Saving:
        """What a candidate takes away.

        Args:
            start: The model it was made for, which is not edited.
            whole: What `of` returned for it.
            trial: A copy with the candidate applied.
            candidate: The candidate.
        """
        return dataclasses.replace(whole - self.of(trial), latency=self.faster(start, trial, candidate))

    def faster(self, start: Model, trial: Model, candidate: Candidate) -> float:
        """Seconds that a candidate takes away, see `saving`; 0 unless latency is the target."""
        if self._timer is None:
            return 0.0
        before, after = self._stretches(self._timer, start, trial, candidate)
        logger.debug("%s: %.4g s becomes %.4g s", candidate.proposal.site, before, after)
        return before - after if abs(before - after) > RESOLUTION * before else 0.0

    def missing(self, model: Model) -> float:
        """How much still has to be saved for the target; infinite without one, so that all that fits is saved."""
        if self._target is None:
            return math.inf
        share = self._target.share
        if self._timer is not None:
            before, now = self._timer.compare_whole(self._original, model)
            return now - share * (1.0 - MARGIN) * before
        if self._whole is None:
            self._whole = self.amount(self._original)
        return self.amount(model) - share * self._whole

    def latency(self, model: Model) -> tuple[float, float] | None:
        """Seconds of the original and of another model on one sample, measured anew; None unless it is the target."""
        return None if self._timer is None else self._timer.compare_whole(self._original, model, again=True)

    def _stretches(
        self, timer: StretchTimer, start: Model, trial: Model, candidate: Candidate
    ) -> tuple[float, float]:
        """Seconds of a candidate's nodes before and after, or of the whole models where it cannot be cut out."""
        site = candidate.proposal.site
        inputs = _boundary(start, candidate)
        if inputs:
            if self._kinds[0] is not start.ir:
                self._kinds = (start.ir, timer.tensors(start))
            try:
                return timer.compare(start, trial, inputs, site, self._kinds[1])
            except OnnxCollapseError as error:
                logger.debug("%s is measured with the whole model: %s", site, error)
        return timer.compare_whole(start, trial)


def _boundary(model: Model, candidate: Candidate) -> list[str]:
    """Names of the tensors that a candidate's nodes read and do not make, in their order in the graph."""
    values = main_values(model.graph)
    made = {values[name] for name in candidate.tensors if name in values}
    made |= _up_to(values.get(candidate.proposal.site), made)
    nodes = dict.fromkeys(node for node in (value.producer() for value in made) if node is not None)
    order = {node: index for index, node in enumerate(model.graph)}
    found: dict[str, None] = {}
    for node in sorted(nodes, key=lambda node: order.get(node, -1)):
        for value in (*node.inputs, *captured(node)):
            if value is not None and value not in made and value.name and constant(value) is None:
                found[value.name] = None
    return list(found)


def _up_to(value: ir.Value | None, made: set[ir.Value], depth: int = 4) -> set[ir.Value]:
    """The tensors on the way from what a candidate's nodes make to what its site yields."""
    node = None if value is None or value in made or not depth else value.producer()
    if value is None or node is None:
        return set()
    before = [operand for operand in node.inputs if operand is not None]
    further = set[ir.Value]().union(*(_up_to(operand, made, depth - 1) for operand in before))
    return {value} | further if further or any(operand in made for operand in before) else set()


def _sample(model: Model, data: Dataset | None) -> Mapping[str, np.ndarray]:
    """One sample, or one batch where the model fixes its size."""
    if data is None:
        fixed = [spec.shape[0] for spec in model.signature().inputs if spec.shape]
        rows = max((size for size in fixed if isinstance(size, int)), default=1)
        data = open_data(f"random:{max(rows, 1)}", model)
    return next(iter(data.batches("all", limit=1)))
