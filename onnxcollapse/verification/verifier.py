# SPDX-License-Identifier: Apache-2.0
"""Measures candidates against one reference on the same data: the global gate."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TypeVar

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.calibration.providers import Provider, chain
from onnxcollapse.calibration.walk import Feeds, Walk
from onnxcollapse.errors import MetricError, ModelError
from onnxcollapse.model.model import Model
from onnxcollapse.model.skeleton import Imprint
from onnxcollapse.verification import metrics
from onnxcollapse.verification.generation import Continuations
from onnxcollapse.verification.perplexity import PERPLEXITY, no_tokens, takes_tokens

CACHE_BYTES = 256 << 20
"""Reference outputs up to this size are kept, larger ones computed again."""

REMEMBERED = 4
"""Models whose errors are remembered: those measured last, since their weights are held."""

T = TypeVar("T")

DISTANCE = "rel-l2"
"""The metric of rewrites that are to keep the function, whatever else a model is held against."""


class Verifier:
    """Measures candidates against one reference on the same data.

    The reference's outputs are kept where they are small; else the states before its last segment are, on disk. A
    model that was measured is not run again, and one that is the reference is not run beside it.

    Attributes:
        metric: Its metric's spec.
        pricing_metric: The metric for variants that run in segments, which cannot generate: "kl" instead of
            "continuation", else the same.
        cuts: Where models are cut to be run.
    """

    def __init__(
        self,
        reference: Model,
        data: Dataset,
        metric: str = "rel-l2",
        provider: str = "auto",
        cuts: Sequence[str] = (),
    ) -> None:
        """Prepares a verifier; the reference runs when it is first needed.

        Args:
            reference: The model the candidates come from.
            data: Data for it.
            metric: Metric spec.
            provider: See open_session; all models run on it.
            cuts: Tensors to cut the models at, so that one segment's weights are in memory at a time.

        Raises:
            MetricError: The metric is unknown, or is for language models and the reference is none.
        """
        self.metric, self.cuts = metric, tuple(cuts)
        metrics.check(metric)
        self.pricing_metric = "kl" if metric == metrics.CONTINUATION else metric
        if metric in (PERPLEXITY, metrics.CONTINUATION) and not takes_tokens(reference):
            raise no_tokens(metric)  # here and not after the work that comes before the first measurement
        self._reference = reference.alone().clone()
        self._imprint = self._reference.imprint()
        self._data, self._provider = data, provider
        self._continuations: dict[DataPart, Continuations] = {}
        self._walks: dict[tuple[DataPart, int | None], Walk] = {}
        self._cache: dict[tuple[DataPart, int | None], list[Feeds]] = {}
        self._cached_bytes = 0
        self._known: OrderedDict[Imprint, dict[_Key, float]] = OrderedDict()
        self._obtained: Provider | None = None

    @property
    def provider(self) -> Provider:
        """What models run on: as the last one did, or as one would."""
        return self._obtained or Provider(self._provider, chain(self._provider)[0])

    def error(self, model: Model, part: DataPart = "heldout", limit: int | None = None) -> float:
        """The metric's error of a candidate at its outputs.

        Args:
            model: The candidate.
            part: The part of the data.
            limit: About how many samples of it, None for all; prompts at most for "continuation".

        Returns:
            The error; infinite when an output becomes NaN.

        Raises:
            MetricError: An output that is no KV cache is missing or has another shape.
            ModelError: The candidate cannot run.
        """
        if self.metric == metrics.CONTINUATION:
            return self._continued(model, part, limit)
        return self._measured(self.metric, model, part, limit)

    def pricing_error(self, model: Model, part: DataPart = "heldout", limit: int | None = None) -> float:
        """Likewise in the pricing metric."""
        return self._measured(self.pricing_metric, model, part, limit)

    def distance(self, model: Model, beside: Verifier | None = None) -> float:
        """A candidate's relative L2 error on the held-out part, whatever the metric is.

        Args:
            model: The candidate.
            beside: Another verifier, or this one: what it will say of the candidate is measured in the same run.

        Raises:
            MetricError, ModelError: See `error`.
        """
        return self._measured(DISTANCE, model, "heldout", None, beside)

    def _continued(self, model: Model, part: DataPart, limit: int | None) -> float:
        if part not in self._continuations:
            self._continuations[part] = Continuations(self._reference, self._data, part, self._provider)
        found = self._continuations[part]
        error = found.error(model, limit)
        self._obtained = found.provider
        return error

    def _measured(
        self, metric: str, model: Model, part: DataPart, limit: int | None, beside: Verifier | None = None
    ) -> float:
        imprint = model.imprint()
        key = (metric, part, limit)
        if key not in self._of(imprint):
            tallies = [_Tally(self, metric)]
            if beside is not None and beside.metric != metrics.CONTINUATION:
                tallies.append(_Tally(beside, beside.metric))
            self._run(tallies, model, imprint, part, limit)
            for tally in tallies:
                if tally.problem is None:
                    tally.owner._of(imprint)[tally.spec, part, limit] = tally.value()
        return self._of(imprint)[key]

    def _of(self, imprint: Imprint) -> dict[_Key, float]:
        """What is known of a model, which is now the one that was asked about last."""
        known = self._known.setdefault(imprint, {})
        self._known.move_to_end(imprint)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _run(
        self, tallies: Sequence[_Tally], model: Model, imprint: Imprint, part: DataPart, limit: int | None
    ) -> None:
        """Runs a candidate once beside every reference; a problem of the first tally is one of the candidate."""
        owners = list(dict.fromkeys(tally.owner for tally in tallies))
        same = next((place for place, owner in enumerate(owners) if owner._imprint == imprint), None)
        references = zip(*(owner.references(part, limit) for owner in owners), strict=True)
        steps: Iterator[tuple[Feeds, Feeds]]
        if same is None:
            steps = self._outputs(model, part, limit)
        else:
            steps = ((batch, {}) for batch in self._data.batches(part, limit))
        for (batch, outputs), wanted in zip(steps, references, strict=True):
            for tally in tallies:
                got = outputs if same is None else wanted[same]
                tally.update(got, wanted[owners.index(tally.owner)], batch)
            if tallies[0].problem is not None:
                raise tallies[0].problem

    def _outputs(self, model: Model, part: DataPart, limit: int | None) -> Iterator[tuple[Feeds, Feeds]]:
        """Every batch with the candidate's outputs; only those of its last segment are in memory."""
        wanted = self.wanted(model)
        walk = Walk(model, self._data, self.cuts, parts=[part], limit=limit, provider=self._provider)
        try:
            walk.run(wanted)
            for step in walk.finish(wanted):
                yield step.batch, step.outputs
            self._obtained = walk.provider
        finally:
            walk.close()

    def close(self) -> None:
        """Frees the reference's states and outputs."""
        for walk in self._walks.values():
            walk.close()
        self._walks.clear()
        self._cache.clear()
        self._continuations.clear()
        self._known.clear()
        self._cached_bytes = 0

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wanted(self, model: Model) -> list[str]:
        """Outputs that the metric looks at."""
        return list(_seen(self.metric, {spec.name: spec for spec in model.signature().outputs}))

    def references(self, part: DataPart, limit: int | None = None) -> Generator[Feeds]:
        """Gives the reference's outputs by batch: from memory where they are there, else from its last segment."""
        key = (part, limit)
        if key in self._cache:
            yield from self._cache[key]
            return
        wanted = self.wanted(self._reference)
        if key not in self._walks:
            walk = Walk(
                self._reference, self._data, self.cuts, parts=[part], limit=limit, provider=self._provider
            )
            self._walks[key] = walk
            walk.run(wanted)
        kept: list[Feeds] | None = []
        size = 0
        for step in self._walks[key].finish(wanted):
            size += sum(getattr(array, "nbytes", 0) for array in step.outputs.values())
            if kept is not None and self._cached_bytes + size <= CACHE_BYTES:
                kept.append(step.outputs)
            else:
                kept = None
            yield step.outputs
        self._obtained = self._walks[key].provider
        if kept is not None:
            self._cache[key] = kept
            self._cached_bytes += size
            self._walks.pop(key).close()


_Key = tuple[str, DataPart, int | None]


class _Tally:
    """One metric's running sums over what a candidate and one verifier's reference give.

    Attributes:
        owner: The verifier.
        spec: The metric.
        problem: Why it could not be measured, or None.
    """

    def __init__(self, owner: Verifier, spec: str) -> None:
        self.owner, self.spec = owner, spec
        self.problem: MetricError | ModelError | None = None
        self._metric = metrics.metric(spec)

    def update(self, outputs: Feeds, reference: Feeds, batch: Feeds) -> None:
        """Adds a batch, unless there was a problem before it."""
        if self.problem is not None:
            return
        try:
            self._metric.update(_seen(self.spec, outputs), _seen(self.spec, reference), batch)
        except (MetricError, ModelError) as problem:
            self.problem = problem

    def value(self) -> float:
        """The error."""
        return self._metric.value()


def _seen(spec: str, outputs: Mapping[str, T]) -> Mapping[str, T]:
    """The outputs that a metric looks at: all for a user's, for a built-in one those that are no caches."""
    if metrics.is_users(spec):
        return outputs
    return {name: array for name, array in outputs.items() if not is_cache_name(name)} or outputs
