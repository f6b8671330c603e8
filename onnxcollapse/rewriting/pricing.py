# SPDX-License-Identifier: Apache-2.0
"""What a candidate costs at the outputs and saves: measured for a few variants of a site, interpolated between."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import Dataset, Plan
from onnxcollapse.errors import MetricError, ModelError
from onnxcollapse.model import Model
from onnxcollapse.model.operations import concrete
from onnxcollapse.model.weights import identity
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.extents import LATENCY, Extents
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Saving
from onnxcollapse.rewriting.selection import Candidate
from onnxcollapse.rewriting.transaction import extent
from onnxcollapse.verification import Outcome, Trials, Variant, Verifier

logger = logging.getLogger(__name__)

ANCHORS, FEW_ANCHORS = 5, 3
"""Variants of a site that are measured: the one that fits best, the worst, and those between; fewer in a model of so
many sites that FEWEST samples each would cost more than FORWARDS runs."""

FORWARDS = 2.0
"""All measurements together cost about this many runs of the calibration data; segments count as equally long."""

FEWEST = 2
"""Samples that a candidate is measured on at least."""


@dataclasses.dataclass(frozen=True)
class Price:
    """A candidate with its saving and its effect at the outputs, and why it is not wanted or None."""

    candidate: Candidate
    objection: str | None = None
    measured: bool = True


class Pricer:
    """Prices candidates on held-out samples.

    The fit part would flatter fits with few rows; the measurement orders candidates and leaves out hopeless ones.

    Args:
        model: What candidates are made from.
        data: The data.
        verifier: Measures at the outputs.
        budget: What is accepted and wanted.
        plan: Where the model may be cut.
        provider: See open_session.
        extents: Measures what is saved.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        verifier: Verifier,
        budget: Budget,
        plan: Plan,
        provider: str,
        extents: Extents,
    ) -> None:
        self._extents = extents
        self._model, self._data, self._verifier, self._budget = model.alone(), data, verifier, budget
        self._points, self._provider = plan.points, provider
        self._shapes = _shapes(model, data)

    def price(self, candidates: Sequence[Candidate], progress: Progress, label: str) -> list[Price]:
        """Prices every candidate, those of one site by few measurements.

        Args:
            candidates: All candidates.
            progress: Told how far the work is.
            label: What to call it there.

        Returns:
            A price each, site by site in graph order.
        """
        sites: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in candidates:
            sites.setdefault(candidate.key[:2], []).append(candidate)
        for variants in sites.values():
            variants.sort(key=lambda candidate: candidate.proposal.predicted_error)
        many = len(sites) * ANCHORS * FEWEST / 2 > FORWARDS * self._data.samples
        count = FEW_ANCHORS if many else ANCHORS
        anchors = {
            key: _anchors(variants, count) if variants[0].maker.graded else variants
            for key, variants in sites.items()
        }
        told = [item for item in candidates if item.proposal.cost is not None]
        asked = [item for found in anchors.values() for item in found if item.proposal.cost is None]
        measured = self._measure(asked, progress, label) | {item.key: self._told(item) for item in told}
        prices = []
        for key, variants in sites.items():
            known = [measured[item.key] for item in anchors[key]]
            prices += [measured.get(item.key) or self._estimated(item, known) for item in variants]
        return prices

    def _estimated(self, candidate: Candidate, known: Sequence[Price]) -> Price:
        price = _between(candidate, known, self._judge)
        problem = objection(candidate.maker, price.candidate.saving, self._budget)
        return price if problem is None else dataclasses.replace(price, objection=price.objection or problem)

    def _measure(
        self, candidates: Sequence[Candidate], progress: Progress, label: str
    ) -> dict[tuple[str, str, str], Price]:
        whole = [item for item in candidates if item.maker.on_request]
        rest = [item for item in candidates if not item.maker.on_request]
        prices = {item.key: self._measure_whole(item) for item in whole}
        if not rest:
            return prices
        variants = {str(place): self._variant(item) for place, item in enumerate(rest)}
        trials = Trials(self._model, self._data, self._verifier, self._points, provider=self._provider)
        trials.limit = self._samples(variants, trials)
        self._owners = _owners(self._model, trials)
        self._readers = Counter(name for segment in trials.segments for name in segment.reads)
        with progress.task(label, len(rest)) as task:
            for _ in trials.run(variants):
                task.advance()
        for place, item in enumerate(rest):
            prices[item.key] = self._priced(item, trials.outcomes[str(place)])
        return prices

    def _priced(self, candidate: Candidate, outcome: Outcome) -> Price:
        saving = outcome.told if isinstance(outcome.told, Saving) else Saving()
        tried = dataclasses.replace(candidate, saving=saving, impact=outcome.error)
        return Price(tried, outcome.problem) if outcome.problem is not None else self._judge(tried)

    def _judge(self, tried: Candidate, measured: bool = True, *, whole: bool = False) -> Price:
        """Holds a price against the budget, where both are in one metric: that of whole models always is."""
        comparable = whole or self._verifier.pricing_metric == self._verifier.metric
        impact, cap = tried.impact, self._budget.cap if comparable else math.inf
        if not math.isfinite(impact):
            return Price(tried, "its error at the outputs is not finite", measured)
        if impact > cap:
            how = "moves" if measured else "is estimated to move"
            return Price(
                tried, f"alone it {how} the outputs by {impact:.4g}, over the budget of {cap:g}", measured
            )
        return Price(tried, measured=measured)

    def _variant(self, candidate: Candidate) -> Variant:
        def change(scratch: Model) -> tuple[object, str | None]:
            before, shared, read = extent(scratch, self._shapes), _tensors(scratch), _read(scratch)
            apply(scratch, candidate.maker, candidate.proposal)
            if any(self._readers[name] == 1 for name in read - _read(scratch)):
                saving = self._saved_elsewhere(candidate)
            else:
                saving = before - extent(scratch, self._shapes)
                saving = self._without_shared(saving, shared, _tensors(scratch))
            if self._extents.measure == LATENCY:
                saving = dataclasses.replace(saving, latency=self._faster(candidate))
            return saving, objection(candidate.maker, saving, self._budget)

        return Variant(candidate.tensors | {candidate.proposal.site}, change)

    def _saved_elsewhere(self, candidate: Candidate) -> Saving:
        """What goes in the whole model, where a segment before it computes something for what goes alone.

        So do those that hold the keys and values of an encoder's states for every layer of its decoder.
        """
        trial = self._model.clone()
        apply(trial, candidate.maker, candidate.proposal)
        return self._whole - self._extents.of(trial)

    def _faster(self, candidate: Candidate) -> float:
        """Seconds that a candidate saves."""
        trial = self._model.clone()
        apply(trial, candidate.maker, candidate.proposal)
        return self._extents.faster(self._model, trial, candidate)

    def _without_shared(
        self, saving: Saving, before: dict[object, ir.TensorProtocol], after: dict[object, ir.TensorProtocol]
    ) -> Saving:
        """What other segments still read is not saved when this one lets go of it."""
        kept = [before[key] for key in before.keys() - after.keys() if self._owners.get(key, 1) > 1]
        numbers = [tensor for tensor in kept if tensor.dtype.is_floating_point()]
        return dataclasses.replace(
            saving,
            params=saving.params - sum(tensor.size for tensor in numbers),
            bytes=saving.bytes - sum(tensor.nbytes for tensor in kept),
        )

    @functools.cached_property
    def _whole(self) -> Saving:
        return self._extents.of(self._model)

    def _measure_whole(self, candidate: Candidate) -> Price:
        """A candidate that may edit the graph anywhere."""
        trial = self._model.clone()
        try:
            apply(trial, candidate.maker, candidate.proposal)
            saving = self._extents.saving(self._model, self._whole, trial, candidate)
            error = self._verifier.error(trial)
        except (MetricError, ModelError) as problem:
            return Price(dataclasses.replace(candidate, impact=math.inf), str(problem))
        return self._judge(dataclasses.replace(candidate, saving=saving, impact=error), whole=True)

    def _told(self, candidate: Candidate) -> Price:
        """A candidate of which the pass itself says what it costs."""
        trial = self._model.clone()
        cost = candidate.proposal.cost or 0.0
        try:
            apply(trial, candidate.maker, candidate.proposal)
        except ModelError as problem:
            return Price(dataclasses.replace(candidate, impact=math.inf), str(problem))
        saving = self._extents.saving(self._model, self._whole, trial, candidate)
        tried = dataclasses.replace(candidate, saving=saving, impact=cost)
        return Price(tried, objection(candidate.maker, saving, self._budget))

    def _samples(self, variants: Mapping[str, Variant], trials: Trials) -> int:
        """As many as keep the measurements within FORWARDS runs of all the data."""
        parts = len(trials.segments)
        runs = sum((parts - trials.place(variant)) / parts for variant in variants.values())
        fit = int(FORWARDS * self._data.samples / max(runs, 1.0))
        return max(min(fit, self._data.count("heldout")), FEWEST)


def objection(maker: Pass, saving: Saving, budget: Budget) -> str | None:
    """Says why a rewrite with this saving is not wanted, or None."""
    if maker.on_request:
        return None
    target = budget.target
    if target is not None and saving.of(target.measure) <= 0:
        return f"saves no {target.measure}, which the target names"
    return saving.objection()


def _anchors(variants: Sequence[Candidate], count: int) -> list[Candidate]:
    """Those of a site's variants, by rising error at the site, that are measured."""
    if len(variants) <= count:
        return list(variants)
    places = np.linspace(0, len(variants) - 1, count).round().astype(int)
    return [variants[place] for place in dict.fromkeys(places.tolist())]


def _between(
    candidate: Candidate, known: Sequence[Price], judge: Callable[[Candidate, bool], Price]
) -> Price:
    """Estimates a variant from those measured: impact by a power of its error, savings by predicted parameters."""
    finite = [price.candidate for price in known if math.isfinite(price.candidate.impact)]
    if not finite:
        problem = next((price.objection for price in known if price.objection), "could not be measured")
        return Price(dataclasses.replace(candidate, impact=math.inf), problem, measured=False)
    x = np.array([item.proposal.predicted_error for item in finite])
    y = np.array([item.impact for item in finite])
    wanted, error = candidate.proposal.saving.params, candidate.proposal.predicted_error

    def distance(item: Candidate) -> tuple[float, float]:
        return abs(item.proposal.saving.params - wanted), abs(item.proposal.predicted_error - error)

    nearest = min(finite, key=distance)
    predicted = nearest.proposal.saving.params
    ratio = wanted / predicted if predicted > 0 else 1.0  # a pass need not predict what it saves
    impact, saved = _power_law(error, x, y), nearest.saving
    saving = Saving(
        round(saved.params * ratio),
        round(saved.bytes * ratio),
        round(saved.flops * ratio),
        saved.nodes,
        saved.latency * ratio,
    )
    tried = dataclasses.replace(candidate, saving=saving, impact=impact)
    return judge(tried, False)


def _power_law(x: float, known_x: np.ndarray, known_y: np.ndarray) -> float:
    """Interpolates log y over log x; beyond the ends y is proportional to x."""
    tiny = 1e-12
    a, b = np.log(np.maximum(known_x, tiny)), np.log(np.maximum(known_y, tiny))
    at = math.log(max(x, tiny))
    if at <= a[0]:
        return float(np.exp(b[0] + at - a[0]))
    if at >= a[-1]:
        return float(np.exp(b[-1] + at - a[-1]))
    return float(np.exp(np.interp(at, a, b)))


def _shapes(model: Model, data: Dataset) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors for one sample."""
    graph = concrete(model, shapes=data.shapes(model))
    return {
        info.name: tuple(max(dim.dim_value, 1) for dim in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.output, *graph.value_info)
        if info.type.tensor_type.HasField("shape")
    }


def _tensors(model: Model) -> dict[object, ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return {identity(v.const_value): v.const_value for v in values if v.const_value is not None}


def _read(model: Model) -> set[str]:
    """Names of the inputs that something reads."""
    return {value.name for value in model.graph.inputs if value.name and value.uses()}


def _owners(model: Model, trials: Trials) -> dict[object, int]:
    """How many segments read each weight."""
    homes = {name: segment.index for segment in trials.segments for name in segment.makes}

    def readers(value: ir.Value) -> set[int]:
        """Segments that read a constant, also behind nodes that only constants lead to."""
        found: set[int] = set()
        for node in value.consumers():
            place = next((homes[v.name] for v in node.outputs if v.name in homes), None)
            found |= {place} if place is not None else set[int]().union(*map(readers, node.outputs))
        return found

    places: dict[object, set[int]] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            places.setdefault(identity(value.const_value), set()).update(readers(value))
    return {key: len(found) for key, found in places.items()}
