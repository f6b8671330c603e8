# SPDX-License-Identifier: Apache-2.0
"""Measures candidates against one reference on the same data: the global gate."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.calibration.providers import Provider, chain
from onnxcollapse.calibration.walk import Feeds, Walk
from onnxcollapse.model.model import Model
from onnxcollapse.verification import metrics
from onnxcollapse.verification.generation import Continuations
from onnxcollapse.verification.perplexity import PERPLEXITY, no_tokens, takes_tokens

CACHE_BYTES = 256 << 20
"""Reference outputs up to this size are kept, larger ones computed again."""


class Verifier:
    """Measures candidates against one reference on the same data.

    The reference's outputs are kept where they are small; else the states before its last segment are, on disk.

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
        self._reference = reference.clone()
        self._data, self._provider = data, provider
        self._continuations: dict[DataPart, Continuations] = {}
        self._walks: dict[tuple[DataPart, int | None], Walk] = {}
        self._cache: dict[tuple[DataPart, int | None], list[Feeds]] = {}
        self._cached_bytes = 0
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

    def _continued(self, model: Model, part: DataPart, limit: int | None) -> float:
        if part not in self._continuations:
            self._continuations[part] = Continuations(self._reference, self._data, part, self._provider)
        found = self._continuations[part]
        error = found.error(model, limit)
        self._obtained = found.provider
        return error

    def _measured(self, metric: str, model: Model, part: DataPart, limit: int | None) -> float:
        result = metrics.metric(metric)
        walk = Walk(model, self._data, self.cuts, parts=[part], limit=limit, provider=self._provider)
        for batch, outputs, reference in self._pairs(walk, model, part, limit):
            result.update(outputs, reference, batch)
        return result.value()

    def _pairs(
        self, walk: Walk, model: Model, part: DataPart, limit: int | None
    ) -> Iterator[tuple[Feeds, Feeds, Feeds]]:
        """Every batch with the candidate's and the reference's outputs; only the last segment's are in memory."""
        wanted = self.wanted(model)
        try:
            walk.run(wanted)
            for step, reference in zip(walk.finish(wanted), self.references(part, limit), strict=True):
                yield step.batch, step.outputs, reference
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
        self._cached_bytes = 0

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wanted(self, model: Model) -> list[str]:
        """Outputs that the metric looks at: all for a user's, for a built-in one those that are no caches."""
        names = [spec.name for spec in model.signature().outputs]
        if metrics.is_users(self.metric):
            return names
        return [name for name in names if not is_cache_name(name)] or names

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
        if kept is not None:
            self._cache[key] = kept
            self._cached_bytes += size
            self._walks.pop(key).close()
